"""Traces of steps on disk: without them a plan that is asked for again would import TRL, and run every step anew.

Each is a file in `$LISA_DIST_CACHE/traces`, by default in `~/.cache/lisa_dist/traces`, and its name is a hash of all
that a trace depends on: the model's config, the workload, what trains, the versions of what runs in it, and the code of
this package. An empty `LISA_DIST_CACHE` turns it off. The files may be deleted at any time; one that is damaged is
written anew.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lisa_dist.files import DamagedError, cache_folder, read_json, write_json

# Packages whose code may run in a trace, or by whose presence a model chooses its own.
_PACKAGES = ("torch", "transformers", "trl", "peft", "triton", "kernels", "causal-conv1d", "flash-linear-attention",
             "mamba-ssm")  # fmt: skip


class TraceFiles:
    """Files of the traces of one model; of one that is not part of a release of transformers there are none.

    Nothing shows when the code of such a model changes.
    """

    def __init__(self, model: PreTrainedModel, settings: Any) -> None:
        """`settings`: whatever else the traces of one model may differ by, and a step does not say."""
        folder = cache_folder()
        is_released = type(model).__module__.startswith("transformers.") and "dev" not in transformers.__version__
        self._folder = folder / "traces" if folder and is_released else None
        allowed = torch.backends.cuda  # kernels of its attention
        kernels = [allowed.flash_sdp_enabled(), allowed.mem_efficient_sdp_enabled(), allowed.math_sdp_enabled()]
        self._of = [type(model).__qualname__, _described(model.config), repr(settings), kernels, *_CODE]

    def read_or_make(self, step: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The trace of a step, which plain values describe; a disk that takes nothing is left as it is."""
        if self._folder is None:
            return make()
        path = self._folder / f"{hashlib.sha256(json.dumps([self._of, step]).encode()).hexdigest()}.json"
        with contextlib.suppress(DamagedError):  # or it is not there
            return read_json(path)
        trace = make()
        staged = path.with_suffix(f".{os.getpid()}")  # other processes may write the same
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                write_json(staged, trace)
                os.replace(staged, path)
            finally:
                staged.unlink(missing_ok=True)
        return trace


def _described(value: Any) -> Any:
    """A config with all its attributes, those that are not written to config.json too, as plain values."""
    if isinstance(value, PretrainedConfig):
        return [type(value).__qualname__, _described(vars(value))]
    if isinstance(value, dict):
        return [[repr(name), _described(one)] for name, one in value.items()]
    return [_described(one) for one in value] if isinstance(value, list | tuple) else repr(value)


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
