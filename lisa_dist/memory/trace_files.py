"""Traces of fake steps on disk: a model is traced once for each way of running it, whatever plans ask for it again.

A trace takes about half a second, and a plan looks at many. Each is a file in `$LISA_DIST_CACHE/traces`, by default in
`~/.cache/lisa_dist/traces`, and its name is a hash of all that a trace depends on: the model's config, the workload,
what trains, the versions of what runs in it, and the code of this package. An empty `LISA_DIST_CACHE` turns it off. The
files may be deleted at any time; one that is damaged is written anew.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lisa_dist.files import DamagedError, cache_folder, read_json, set_mode_by_umask, write_json

# Packages whose code may run in a trace, or by whose presence a model chooses its own.
_PACKAGES = ("torch", "transformers", "trl", "peft", "triton", "kernels", "causal-conv1d", "flash-linear-attention",
             "mamba-ssm")  # fmt: skip


class TraceFiles:
    """Files of the traces of one model.

    Of models that are not part of a release of transformers there are none: nothing says when their code changes.
    """

    def __init__(self, model: PreTrainedModel, settings: Any) -> None:
        """`settings`: whatever else the traces of one model may differ by, and a step does not say."""
        folder = cache_folder()
        is_released = type(model).__module__.startswith("transformers.") and "dev" not in transformers.__version__
        self._folder = folder / "traces" if folder and is_released else None
        self._of = [type(model).__qualname__, _described(model.config), repr(settings), _attention_kernels(), *_CODE]

    def read(self, step: Any) -> dict[str, Any] | None:
        """The trace that was written for a step; None where none was, or the file is damaged."""
        path = self._path(step)
        if path is None:
            return None
        try:
            return read_json(path)
        except DamagedError:  # or not there
            return None

    def write(self, step: Any, trace: dict[str, Any]) -> None:
        """Write the trace of a step, which plain values describe; a disk that takes nothing is left as it is."""
        path = self._path(step)
        if path is None:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, staged = tempfile.mkstemp(dir=path.parent)  # a name of its own: other processes may write the same
            os.close(handle)
            try:
                write_json(Path(staged), trace)
                set_mode_by_umask(Path(staged))
                os.replace(staged, path)
            finally:
                Path(staged).unlink(missing_ok=True)

    def _path(self, step: Any) -> Path | None:
        if self._folder is None:
            return None
        described = json.dumps([self._of, step])
        return self._folder / f"{hashlib.sha256(described.encode()).hexdigest()}.json"


def _described(value: Any) -> Any:
    """A config with all its attributes, those that are not written to config.json too, as plain values."""
    if isinstance(value, PretrainedConfig):
        return [type(value).__qualname__, _described(vars(value))]
    if isinstance(value, dict):
        return [[repr(name), _described(one)] for name, one in value.items()]
    return [_described(one) for one in value] if isinstance(value, list | tuple) else repr(value)


def _attention_kernels() -> list[bool]:
    """Which kernels of torch's attention are allowed in this process."""
    allowed = torch.backends.cuda
    return [allowed.flash_sdp_enabled(), allowed.mem_efficient_sdp_enabled(), allowed.math_sdp_enabled()]


def _code() -> list[str]:
    """The code that traces run: versions of packages, and a hash of this one's, which may be edited in its place."""
    found = []
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return [*found, code.hexdigest()]


_CODE = _code()  # now, since files may be edited while a process runs
