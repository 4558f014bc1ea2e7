"""The report of a run, or of several, for a browser of this machine in the run: `lisa-dist report DIR --serve`."""

from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from lisa_dist.errors import UserError
from lisa_dist.report.html import comparison_of, render, report_of
from lisa_dist.report.run_files import read_run

HERE, PORT = "127.0.0.1", 8000
_REFRESH = 10  # seconds
_FILES = ("lisa_*.json*", "trainer_state.json", "checkpoint-*/trainer_state.json")  # what a page is made of


def server_of(folders: Sequence[str], given: str) -> HTTPServer:
    """A server of one page, the report, made anew where a file of the runs has changed; `given` is its port.

    Other paths are not found, and other methods than GET refused. Raises UserError for a port that is taken, and for an
    address: other machines may reach a port by ssh.
    """
    if not given.isdecimal() or int(given) > 65535:
        rule = "the page is for this machine alone; give a port, up to 65535, and forward it to others by ssh -L"
        raise UserError(f"--serve {given}: {rule}.")
    made: dict[tuple, bytes] = {}

    def page() -> bytes:
        seen = tuple(
            (str(path), path.stat().st_mtime_ns)
            for folder in folders
            for name in _FILES
            for path in Path(folder).glob(name)
        )
        if seen not in made:
            made.clear()
            made[seen] = _page_of(folders)
        return made[seen]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (HERE, "localhost"):  # a page of another site that has a name for this address
                self.send_error(403)
            elif self.path != "/":
                self.send_error(404)
            else:
                found = page()
                self.send_response(200)
                for name, value in (("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(found)))):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(found)

        def log_message(self, *args: object) -> None:
            """Say nothing of each request."""

    _page_of(folders)  # what cannot be read is said before a browser asks
    try:
        return HTTPServer((HERE, int(given)), Handler)
    except OSError as error:
        raise UserError(f"--serve {given}: the port cannot be had ({error.strerror}); give another.") from error


def serve(folders: Sequence[str], given: str) -> None:
    """Serve the report until Ctrl-C."""
    with server_of(folders, given) as server:
        port = server.server_address[1]
        print(f"the report is at http://{HERE}:{port}/ until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _page_of(folders: Sequence[str]) -> bytes:
    runs = [read_run(folder) for folder in folders]
    parts = report_of(runs[0]) if len(runs) == 1 else comparison_of(folders)
    goes_on = any(not run.series("train_runtime")[0] for run in runs)
    return render(parts | {"refresh": _REFRESH if goes_on else None})
