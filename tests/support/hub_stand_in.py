"""A hub on this machine, of the requests by which a folder is uploaded; what it is sent is kept, or refused."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        hub.asked.append(path)
        step = next((name for name in ("create", "preupload", "commit", "validate-yaml") if f"/{name}" in path), "")
        if status := hub.refuses.get(step):
            return self._answer({"error": "refused"}, status)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if step == "create":
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization") or "me", given["name"])))
            hub.private[name] = bool(given.get("private")) or given.get("visibility") == "private"
            return self._answer({"url": f"{hub.url}/{name}", "id": name, "name": name})
        if step == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if step == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/me/model/commit/{'1' * 40}"}
            return self._answer(answer)
        return self._answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._answer({"error": "not found"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Hub:
    """What was uploaded, and what is refused: a status by the request's name."""

    token = "hf_secret"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.refuses: dict[str, int] = {}
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def open(self) -> Iterator["Hub"]:
        """Answer until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
