"""Traces of steps on disk: without them a plan that is asked for again would import TRL, and run every step anew.

Each is a file in `$LISA_DIST_CACHE/traces`, by default in `~/.cache/lisa_dist/traces`, and its name is a hash of all
that a trace depends on, the versions of what runs in it and the code of this package too. An empty `LISA_DIST_CACHE`
turns it off. The files may be deleted at any time; one that is damaged is written anew.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lisa_dist.files import DamagedError, cache_folder, read_json, replacing, write_json

# Packages whose code may run in a trace, or by whose presence a model chooses its own.
_PACKAGES = ("torch", "transformers", "trl", "peft", "triton", "kernels", "causal-conv1d", "flash-linear-attention",
             "mamba-ssm")  # fmt: skip


def read_or_make(described: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The trace of a step that is `described`; a disk that takes nothing is left as it is."""
    folder = cache_folder()
    if folder is None:
        return make()
    path = folder / "traces" / f"{hashlib.sha256(f'{described} {_code()}'.encode()).hexdigest()}.json"
    with contextlib.suppress(DamagedError):  # or it is not there
        return read_json(path)
    trace = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            write_json(new, trace)
    return trace


@functools.cache
def _code() -> str:
    """Versions of packages, and a hash of this one's code, which may be edited in its place."""
    found = []
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return f"{found} {code.hexdigest()}"
