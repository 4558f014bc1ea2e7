"""Resume a LISA run from a checkpoint, on any world size and ZeRO stage; or start one from the weights in a folder.

On the same number of ranks the run continues bit for bit. A file that is damaged is found before anything is changed.
Of a checkpoint from elsewhere nothing is read outside its folder, and no pickle runs code.
"""

import os
import pickle
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lisa_dist.checkpoint.folders import checkpoints_by_age, remove_leftovers
from lisa_dist.checkpoint.optimizer_states import MASTER, STATE_FILES, StateFiles, state_file
from lisa_dist.checkpoint.save import ENGINE_COUNTERS
from lisa_dist.checkpoint.weights import block_files, has_weights, read_weights, saved_blocks, weight_files
from lisa_dist.core.controller import LisaController
from lisa_dist.core.period_log import MOVEMENT_FILE
from lisa_dist.core.selection import split_by_decay
from lisa_dist.distributed.collectives import check_files, my_share, raise_shared, raise_together
from lisa_dist.files import DamagedError, find_foreign_name
from lisa_dist.optim.states import PartitionKey
from lisa_dist.run_folder import ADAPTER_FILE, IDENTITY_NAME, STATE_NAME, check_state
from lisa_dist.zero.partitions import ZeroPartitions

# What the Trainer loads by `torch.load`; the schedule is loaded by us.
_PICKLES = ("scheduler.pt", "scaler.pt", "rng_state*.pth")
# What an export or a resume reads wherever it is there.
_OF_ADAPTER = f"{Path(ADAPTER_FILE).parent}/*"
_READ_WHERE_THERE = (
    "config.json",
    "trainer_state.json",
    IDENTITY_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    *_PICKLES,
    _OF_ADAPTER,
)
# What `torch.load(weights_only=True)` raises: the first for what it refuses, the others for bytes that it never wrote.
PICKLE_ERRORS = (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, LookupError, TypeError)
_WAY_OUT = "use a copy from whoever wrote it."


def load_checkpoint(lisa: LisaController, folder: str | Path, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Go on from a checkpoint: weights, active layers, optimizer states, step count; returns its state.

    The controller must be attached, to an engine of any world size and ZeRO stage; the learning-rate schedule is the
    caller's. `state` is the result of `read_state`, if it was called before. Raises ValueError, naming the file or the
    setting, for a damaged checkpoint or one of another run.
    """
    assert lisa.is_attached, "attach the controller to a DeepSpeed engine first"
    folder, engine, partitions = Path(folder), lisa.engine, lisa.partitions
    # 1. Is it whole, and of this run? Nothing is changed before both are known.
    state = state or read_state(folder)
    changed_settings = lisa.check_state_dict(state["lisa"])
    # 2. The weights of all blocks.
    read_weights(engine, lisa.blocks, folder)
    # 3. The step, then the layers of its period: activated, and partitions built over them.
    for name in ENGINE_COUNTERS:
        setattr(engine, name, state["engine"][name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    lisa.load_state_dict(state["lisa"])
    # 4. Masters and moments, into those partitions.
    _load_states(lisa, partitions, folder, state, bool(changed_settings))
    # 5. What is counted along the run: loss scale, movement of weights, learning rates.
    partitions.load_counters(state["counters"])
    step = engine.global_steps
    period_began = step if changed_settings else lisa.period * lisa.config.lisa_interval_steps
    lisa.movement.load(folder / MOVEMENT_FILE if MOVEMENT_FILE in state["files"] else None, step, period_began)
    rates = state["learning_rates"]
    for group in engine.optimizer.param_groups:  # one that the saved run did not have gets the rate of the others
        group |= rates.get(group["lisa_group"], next(iter(rates.values())))
    # 6. Blocks that do not change from here on need not be written again.
    files = block_files(engine.module, lisa.blocks)
    lisa.changes.begin(saved_blocks(folder, state["files"], files), engine.global_steps)
    return state


def _load_states(
    lisa: LisaController, partitions: ZeroPartitions, folder: Path, state: dict[str, Any], settings_changed: bool
) -> None:
    """Fill this rank's partitions, active and kept ones."""
    of_saved = state["world_size"]
    nearest = dist.get_rank() * of_saved // dist.get_world_size()
    saved = StateFiles([folder / state_file(rank, of_saved) for rank in range(of_saved)], nearest)
    pieces = partitions.pieces()
    for key, partition in lisa.partition_states().items():
        fields = saved.read(key, pieces[key], partition.numel, partitions.form_of_moments(key))
        if fields is None:  # a block that only other settings than the saved run's train
            continue
        if settings_changed and lisa.config.lisa_state == "reset_all":  # a period begins, whose switch would reset them
            fields = {MASTER: fields[MASTER]}
        partitions.load_state(key, fields)
    lisa.host_states.clear()
    for group, key, params in _kept_partitions(lisa):
        kept, numel = partitions.layout(params)
        fields = saved.read(key, kept, numel, partitions.form_of_moments(group))
        if fields is not None:
            lisa.host_states.put(key, partitions.state_of(group, kept, fields), kept)


def _kept_partitions(lisa: LisaController) -> Iterator[tuple[str, PartitionKey, list[torch.nn.Parameter]]]:
    """Inactive partitions whose states wait on the host, by the name of a parameter group of their form."""
    if lisa.config.lisa_state != "keep" or lisa.config.lisa_activated_layers == 0:  # inactive layers stay so
        return
    inactive = lisa.selection.inactive(lisa.active)
    for block in (*lisa.blocks.layers, *map(lisa.blocks.outer, lisa.block_visit_counts)):
        if block not in inactive:
            continue
        name = block.name if block.name in lisa.block_visit_counts else "slot0"
        for kind, params in split_by_decay(block).items():
            (key,) = lisa.selection.names_of([params])
            yield f"{name}/{kind}", key, params


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's `lisa_state.json`, after every file's sum was checked; all ranks call it.

    Raises on all ranks DamagedError, naming each file that is not as it was written, and UserError where a file leads
    out of the folder, or one that would be read is not among those whose sums were checked.
    """
    problems: list[str] = []
    state: dict[str, Any] = {}
    try:
        state = check_state(folder)
    except DamagedError as error:
        problems = [str(error).removesuffix(".")]
    raise_together(problems)
    raise_shared(_why_foreign(folder, state["files"]))
    check_files(folder, state["files"])
    # A file without a sum, which an export or a resume would read.
    unlisted = next((name for name in _names_to_read(folder, state) if name not in state["files"]), None)
    why = f"{folder / STATE_NAME} does not list {unlisted}: it has the sum of every file that is read; {_WAY_OUT}"
    raise_shared(None if unlisted is None else why)
    return state


def _why_foreign(folder: Path, names: Iterable[str]) -> str | None:
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


def _names_to_read(folder: Path, state: dict[str, Any]) -> Iterator[str]:
    for pattern in _READ_WHERE_THERE:
        yield from (str(path.relative_to(folder)) for path in folder.glob(pattern))
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
        except PICKLE_ERRORS as error:
            problem = (
                f"{folder / name} is not loaded ({type(error).__name__}): pickles of a checkpoint hold tensors and "
                f"plain values, and nothing that could run; {_WAY_OUT}"
            )
    raise_shared(problem)


def find_checkpoint(output_dir: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The whole checkpoint in a folder that was saved last, and its state; all ranks call it.

    Not that of the highest step: a run that was resumed from an earlier one has left later steps behind. Rank 0 warns
    of damaged ones, which are skipped.
    """
    if dist.get_rank() == 0:
        remove_leftovers(Path(output_dir))
    for folder in checkpoints_by_age(Path(output_dir)):
        try:
            return folder, read_state(folder)
        except DamagedError as error:
            if dist.get_rank() == 0:
                print(f"warning: {folder} is passed over: {error}", flush=True)
    return None


def has_only_weights(folder: Path) -> bool:
    """Whether a folder has a model, such as a checkpoint of another trainer, and nothing of a LISA run."""
    return has_weights(folder) and not (folder / STATE_NAME).exists() and not list(folder.glob(STATE_FILES))


def start_from_weights(lisa: LisaController, folder: Path) -> None:
    """Start a run from the weights in a folder, in whatever precision: an attached controller at step 0 takes them."""
    read_weights(lisa.engine, lisa.blocks, folder, same_dtype=False)
    lisa.activate_from_weights(lisa.active)
    lisa.movement.restart()
    lisa.forget_changes()
