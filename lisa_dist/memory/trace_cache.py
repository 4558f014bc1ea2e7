"""Traces of fake steps on disk: a model is traced once for each way of running it, whatever plans ask for it again.

A trace takes about half a second, and a plan looks at many. Each is a file of `$LISA_DIST_CACHE/traces`, by default
`~/.cache/lisa_dist/traces`, and its name is a hash of all that a trace depends on: the model's config, the workload,
what trains, the versions of what runs in it, and the code of this package. An empty `LISA_DIST_CACHE` turns it off. The
files may be deleted at any time; one that is damaged is written anew.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lisa_dist.files import DamagedError, read_json, set_mode_by_umask, write_json

VARIABLE = "LISA_DIST_CACHE"
_RUN_IN_A_TRACE = ("torch", "transformers", "trl", "peft", "triton")


@dataclass(frozen=True)
class TraceCache:
    """The traces of one model that is run in one way; `run` is whatever JSON describes both by."""

    run: Any

    def read(self, what: Any) -> dict[str, Any] | None:
        """What `write` was given for `what` trains; None where it was not."""
        path = self._path(what)
        if path is None:
            return None
        try:
            return read_json(path)
        except DamagedError:  # or not there
            return None

    def write(self, what: Any, trace: dict[str, Any]) -> None:
        """Keep a trace; where nothing can be written nothing is kept."""
        path = self._path(what)
        if path is None:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, staged = tempfile.mkstemp(dir=path.parent)  # by itself, since several ranks may write the same
            os.close(handle)
            try:
                write_json(Path(staged), trace)
                set_mode_by_umask(Path(staged))
                os.replace(staged, path)
            finally:
                Path(staged).unlink(missing_ok=True)

    def _path(self, what: Any) -> Path | None:
        folder = cache_folder()
        if folder is None:
            return None
        described = json.dumps([self.run, what, _code()], sort_keys=True, default=str)
        return folder / "traces" / f"{hashlib.sha256(described.encode()).hexdigest()}.json"


def cache_folder() -> Path | None:
    """Where this package keeps what it need not compute again; None where it is to keep nothing."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    home = os.path.expanduser("~")  # stays as it is for a user who has none
    caches = os.environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if home != "~" else None)
    return Path(caches) / "lisa_dist" if caches else None


@functools.cache
def _code() -> Sequence[str]:
    """What runs in a trace: versions of packages, and a hash of this one's code, which may be edited in its place."""
    versions = []
    for name in _RUN_IN_A_TRACE:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    code = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        code.update(path.read_bytes())
    return *versions, code.hexdigest()
