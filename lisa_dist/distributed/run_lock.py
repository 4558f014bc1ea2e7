"""One run in a folder: a lock file that names the run, and that another run takes over once this one is no more.

`lisa_run.lock` has the run's id, host and process. A heartbeat sets its time of modification, and no clock is compared
with another one: a process of this machine is looked up, and of a run elsewhere we wait for a heartbeat to come.
"""

import contextlib
import functools
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from torch import distributed as dist

from lisa_dist.distributed.collectives import raise_shared
from lisa_dist.distributed.health import host_name
from lisa_dist.errors import UserError

LOCK_NAME = "lisa_run.lock"
_INTERVAL = 5.0  # seconds between heartbeats
_SILENCE = 120.0  # seconds without one after which a run elsewhere is no more; NFS shows times up to 60 s late
_held: dict[str, "_Lock"] = {}  # the locks of this process, by their paths


@contextlib.contextmanager
def one_run_in(folder: str | Path, silence: float = _SILENCE) -> Iterator[None]:
    """No other run has `folder` while the body runs; all ranks enter it, and rank 0 holds the lock.

    A process may hold a folder several times over. Raises SharedError, which names the run that has the folder, and
    waits up to `silence` seconds to see whether a run on another host lives.
    """
    folder, problem = Path(folder), None
    if dist.is_initialized() and dist.get_rank() != 0:
        raise_shared(None)
        yield
        return
    key, lock = os.path.realpath(folder), None
    try:
        lock = _held[key] = _held[key] if is_held(folder) else _Lock(folder, silence)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"--output_dir {folder} cannot be written ({error.strerror}); make it writable, or give another one."
    raise_shared(problem)
    assert lock is not None
    lock.holders += 1
    try:
        yield
    finally:
        lock.holders -= 1
        if lock.holders == 0 and lock.process == os.getpid():  # no child of a fork
            del _held[key]
            lock.end()


def is_held(folder: Path) -> bool:
    """Whether this process holds a folder."""
    lock = _held.get(os.path.realpath(folder))
    return lock is not None and lock.process == os.getpid()


class _Lock:
    """The lock file of a folder, from construction to `end`."""

    def __init__(self, folder: Path, silence: float):
        self.holders, self.process = 0, os.getpid()
        self._path, self._done = folder / LOCK_NAME, threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
        content = {"run": run_id(), "host": host_name(), "process": self.process, "since": since}
        content |= {"machine": _machine(), "started": _started(self.process)}
        self._take(content, silence)
        threading.Thread(target=self._beat, name="lisa_dist run lock", daemon=True).start()

    def _take(self, content: dict, silence: float) -> None:
        taken_over = False
        while True:
            with contextlib.suppress(FileExistsError):
                # O_EXCL: it follows no link.
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(json.dumps(content) + "\n")
                if not taken_over:
                    return
                time.sleep(min(1.0, silence / 10))  # another run may have taken it over in the same moment
                if self._is_ours():
                    return
            holder = _read(self._path)
            if holder is None:  # it has ended just now
                continue
            if not _lives(self._path, holder, silence):
                taken_over = True
                _set_aside(self._path, holder)
            elif holder and holder == _read(self._path):
                raise UserError(
                    f"--output_dir {self._path.parent}: run {holder.get('run')} on host {holder.get('host')}, process "
                    f"{holder.get('process')}, has it since {holder.get('since')}; wait for its end, or give another "
                    "--output_dir."
                )

    def end(self) -> None:
        """Stop the heartbeat, and remove the file if it is still this run's."""
        self._done.set()
        with contextlib.suppress(OSError):  # what stays there is of a process that has ended, and hinders nobody
            if self._is_ours():
                self._path.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        return (_read(self._path) or {}).get("run") == run_id()

    def _beat(self) -> None:
        while not self._done.wait(_INTERVAL):
            with contextlib.suppress(OSError):  # a file server that does not answer now may do so at the next beat
                if self._is_ours():
                    os.utime(self._path, follow_symlinks=False)
                elif not self._done.is_set():
                    print(f"warning: {self._path} was removed or is another run's now: end one of the two.", flush=True)
                    return


def _read(path: Path) -> dict | None:
    """The content of a lock; None where there is none, {} while it is being written."""
    if path.is_symlink():  # which somebody has planted
        path.unlink(missing_ok=True)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _lives(path: Path, holder: dict, silence: float) -> bool:
    """Whether the run of a lock goes on."""
    if _machine() is not None and holder.get("machine") == _machine():
        return _is_running(holder["process"], holder["started"])
    print(
        f"{path} is of run {holder.get('run')} on host {holder.get('host')}: waiting up to {silence:.0f} s for a sign "
        "of life of it",
        flush=True,
    )
    before, deadline = _changed_at(path), time.monotonic() + silence
    while time.monotonic() < deadline:
        time.sleep(min(1.0, silence / 10))
        if _changed_at(path) != before:
            return True
    return False


def _changed_at(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return None


def _set_aside(path: Path, holder: dict) -> None:
    """Remove the lock of a run that is no more, unless another run has just taken it over."""
    if _read(path) != holder:
        return
    aside = path.with_name(f"tmp-{path.name}-{run_id()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) == holder:
            aside.unlink()
        else:  # it was, between the two reads
            os.rename(aside, path)


def run_id() -> str:
    """A name of this process's runs that no other process has."""
    return _id_of(os.getpid())


@functools.cache
def _id_of(process: int) -> str:
    return secrets.token_hex(4)


@functools.cache
def _machine() -> str | None:
    """What tells process numbers apart: the kernel since its boot, and its namespace of processes. None: unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_running(process: int, started: str | None) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, of which /proc may say nothing
        pass
    return _started(process) in (started, None)


def _started(process: int) -> str | None:
    """When a process began, in ticks since the boot, which no clock changes; "" of one that ended, None: unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]
