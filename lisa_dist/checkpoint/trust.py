"""Checkpoints from elsewhere: nothing is read or written outside their folder, and no pickle runs code."""

import os
import pickle
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lisa_dist.checkpoint.optimizer_states import state_file
from lisa_dist.checkpoint.weights import weight_files
from lisa_dist.distributed.collectives import my_share, raise_shared
from lisa_dist.files import find_foreign_name
from lisa_dist.run_folder import IDENTITY_NAME, STATE_NAME

# What the Trainer loads by `torch.load`; the schedule is loaded by us.
_PICKLES = ("scheduler.pt", "scaler.pt", "rng_state*.pth")
# What an export or a resume reads wherever it is there.
_READ_WHERE_THERE = ("config.json", "trainer_state.json", IDENTITY_NAME, SAFE_WEIGHTS_INDEX_NAME, *_PICKLES)
# What `torch.load(weights_only=True)` raises: the first for what it refuses, the others for bytes that it never wrote.
_REFUSALS = (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, LookupError, TypeError)
_WAY_OUT = "use a copy from whoever wrote it."


def why_foreign(folder: Path, names: Iterable[str]) -> str | None:
    """What is wrong with a checkpoint whose files lead out of it, by a name or over a link; None for a good one."""
    rule = f"the files of a checkpoint lie in its folder; {_WAY_OUT}"
    if (foreign := find_foreign_name(names)) is not None:
        return f"{folder / STATE_NAME} names the file {foreign!r}: {rule}"
    home = os.path.realpath(folder)
    for path in (folder / name for name in (STATE_NAME, *names)):
        target = os.path.realpath(path)
        if os.path.commonpath([home, target]) != home:
            return f"{path} is a link to {target}: {rule}"
    return None


def why_unlisted(folder: Path, state: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint that has files without a sum which an export or a resume would read."""
    unlisted = next((name for name in _names_to_read(folder, state) if name not in state["files"]), None)
    if unlisted is None:
        return None
    return f"{folder / STATE_NAME} does not list {unlisted}: it has the sum of every file that is read; {_WAY_OUT}"


def _names_to_read(folder: Path, state: dict[str, Any]) -> Iterator[str]:
    for pattern in _READ_WHERE_THERE:
        yield from (path.name for path in folder.glob(pattern))
    yield from weight_files(folder)  # read only now that the index is known to be listed
    yield from (state_file(rank, state["world_size"]) for rank in range(state["world_size"]))


def check_pickles(folder: Path, names: Iterable[str]) -> None:
    """Raise SharedError where one of the pickles that a resume loads is refused; all ranks call it, and share them.

    `torch.load(weights_only=True)` runs no code. Its refusals come here in one line, and before weights are loaded.
    """
    problem = None
    pickles = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in _PICKLES))
    for name in my_share(pickles):
        try:
            with safe_globals():
                torch.load(folder / name, map_location="cpu", weights_only=True)
        except _REFUSALS as error:
            problem = (
                f"{folder / name} is not loaded ({type(error).__name__}): pickles of a checkpoint hold tensors and "
                f"plain values, and nothing that could run; {_WAY_OUT}"
            )
    raise_shared(problem)
