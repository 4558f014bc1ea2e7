"""Checkpoints of a LISA run: whole or not there, resumed bit for bit, on any world size and ZeRO stage.

A folder `checkpoint-N` holds

- the model as `save_pretrained` writes it, all blocks, asleep or not;
- `lisa_optimizer-RANK-of-RANKS.safetensors`: masters and moments of active blocks and of kept ones, by parameter name;
- `lisa_movement.safetensors`: samples of the weights at the start, by which later movement is told;
- `lisa_state.json`: format, step, period, active layers, settings, versions, and the SHA-256 of every other file.

DeepSpeed's own checkpoints are no base for this: they tie the optimizer to one world size, and its universal form
restores neither frozen weights nor the step counts of several groups.

A save, on every rank::

    weights   gathered block by block under ZeRO-3; one rank writes        A resume::
    states    each rank writes what it owns                                  check    the sums of all files
    sums      each rank hashes its share of the files, flushed to disk       weights  every block
    rename    tmp-checkpoint-N becomes checkpoint-N                          layers   activated and partitioned
                                                                             states   masters, moments, counters
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

from torch import distributed as dist

from lisa_dist.checkpoint.optimizer_states import MASTER, STATE_FILES, StateFiles, state_file, write_states
from lisa_dist.checkpoint.weights import (
    MAX_SHARD_SIZE,
    export_weights,
    has_weights,
    read_weights,
    write_configs,
    write_weights,
)
from lisa_dist.config import LisaConfig, UserError
from lisa_dist.core.controller import LisaController
from lisa_dist.core.movement import MOVEMENT_FILE
from lisa_dist.distributed.collectives import check_files, describe_files, gather, raise_together, together
from lisa_dist.files import DamagedError, flush_folder, read_json, set_mode_by_umask, write_json

STATE_NAME = "lisa_state.json"
FORMAT = 1
# Folders that are no checkpoints: one being written, one that another takes the place of, one being deleted.
_STAGING, _REPLACED, _DOOMED = "tmp-", "tmp-replaced-", "tmp-deleted-"
_FOLDER = re.compile(r"checkpoint-(\d+)")
_LEFT_BEHIND = re.compile(rf"({_STAGING}|{_REPLACED}|{_DOOMED})checkpoint-\d+")
# Files of a checkpoint that an export leaves behind; weights are exported by themselves.
_NOT_THE_MODEL = (
    STATE_FILES,
    "*.safetensors",
    "*.safetensors.index.json",
    "rng_state*",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)
_PACKAGES = ("lisa_dist", "torch", "deepspeed", "transformers")


def save_checkpoint(
    lisa: LisaController,
    folder: str | Path,
    *,
    writes: bool | None = None,
    write_more: Callable[[Path], None] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write a checkpoint; every rank calls it between two optimizer steps.

    `writes` says whether this rank writes the model (rank 0 by default); `write_more(path)`, called on every rank,
    writes the model's configs in place of the save, and anything else that belongs to the model.
    Nothing stands at `folder` before all of it is on disk. Raises SaveError on every rank when one cannot write.
    """
    folder = Path(folder)
    writes = dist.get_rank() == 0 if writes is None else writes
    staging = folder.with_name(f"{_STAGING}{folder.name}")
    try:
        with together(folder):
            if writes:
                _tidy(folder.parent)
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        with together(folder):
            if write_more is not None:
                write_more(staging)
            elif writes:
                write_configs(lisa.engine.module, staging)
        write_weights(lisa.engine, lisa.blocks, staging, writes, max_shard_size, told=folder)
        with together(folder):
            file = staging / state_file(dist.get_rank(), dist.get_world_size())
            write_states(file, *lisa.saved_states())
            if dist.get_rank() == 0:
                lisa.movement.save(staging / MOVEMENT_FILE)
        files = describe_files(staging)
        with together(folder):
            if writes:
                write_json(staging / STATE_NAME, _state_of(lisa) | {"files": files})
                _put_in_place(staging, folder)
    finally:  # nothing is left there of a save that went well
        if writes:
            shutil.rmtree(staging, ignore_errors=True)


def load_checkpoint(lisa: LisaController, folder: str | Path, state: dict | None = None) -> dict:
    """Go on from a checkpoint: weights, active layers, optimizer states, step count; returns its state.

    The controller must be attached, to an engine of any world size and ZeRO stage; the learning-rate schedule is the
    caller's. `state` is what `read_state` gave, if it was called before. Raises ValueError, naming the file or the
    setting, for a damaged checkpoint or one of another run.
    """
    folder = Path(folder)
    state = state or read_state(folder)
    changed = lisa.check_state_dict(state["lisa"])
    engine = lisa.engine
    read_weights(engine, lisa.blocks, folder)
    for name, value in state["engine"].items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    lisa.load_state_dict(state["lisa"])
    saved = StateFiles([folder / state_file(rank, state["world_size"]) for rank in range(state["world_size"])])
    pieces = lisa.partitions.pieces()
    afresh = []
    for key, held in lisa.partition_states().items():
        fields = saved.read(key, pieces[key], held.numel, lisa.partitions.coding)
        if fields is None:  # with other settings
            afresh.append(key)
            continue
        if changed and lisa.config.lisa_state == "reset_all":  # a period begins here, which its switch would have done
            fields = {MASTER: fields[MASTER]}
            afresh.append(key)
        lisa.partitions.load_state(key, fields)
    coding = lisa.partitions.coding
    lisa.keep_states(lambda key, pieces, numel: saved.read(key, pieces, numel, coding))
    lisa.partitions.load_counters(state["counters"])
    step = engine.global_steps
    began = step if changed else lisa.period * lisa.config.lisa_interval_steps
    lisa.movement.load(folder / MOVEMENT_FILE if MOVEMENT_FILE in state["files"] else None, step, began)
    if changed:
        lisa.begin_afresh(afresh)
    ratio = rate_ratio(lisa, state["lisa"])
    rates = {
        group: {name: rate * ratio for name, rate in saved.items()} for group, saved in state["learning_rates"].items()
    }
    for group in engine.optimizer.param_groups:
        group |= rates.get(group["lisa_group"], next(iter(rates.values())))  # a new slot has the rate of the others
    return state


def rate_ratio(lisa: LisaController, state: dict) -> float:
    """What --lisa_lr_power makes of a saved run's learning rates here, where power or gamma are others."""
    saved, num_layers = state["config"], len(lisa.blocks.layers)
    then = LisaConfig(
        lisa_activated_layers=saved["lisa_activated_layers"], lisa_lr_power=saved.get("lisa_lr_power", 0.0)
    )
    return lisa.config.rate_factor(num_layers) / then.rate_factor(num_layers)


def read_state(folder: Path) -> dict:
    """The checkpoint's `lisa_state.json`, once every file has been found as it was written; all ranks call it."""
    path = folder / STATE_NAME
    problems, state = [], {}
    try:
        state = read_json(path)
    except DamagedError as error:
        problems = [str(error).removesuffix(".")]
    raise_together(problems)
    if state["format"] > FORMAT:
        raise UserError(
            f"{path} has format {state['format']}, written by lisa_dist {state['versions']['lisa_dist']}; this release "
            f"reads up to {FORMAT}: upgrade lisa_dist."
        )
    check_files(folder, state["files"])
    return state


def export_checkpoint(folder: str | Path, out: str | Path) -> None:
    """Turn a checkpoint into a folder that `from_pretrained` loads and that holds nothing else; without ranks or a GPU.

    Raises ValueError when a file of the checkpoint is damaged, or `out` is there already.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / STATE_NAME).is_file():
        raise UserError(f"{folder} is no checkpoint of a LISA run: there is no {STATE_NAME} in it{_instead(folder)}.")
    if out.exists():
        raise UserError(f"{out} is there already: choose a folder that is not.")
    state = read_state(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"tmp-{out.name}-", dir=out.parent))
    try:
        export_weights(folder, staging)
        for name in state["files"]:
            if not any(fnmatch(name, pattern) for pattern in _NOT_THE_MODEL):
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, staging / name)
        describe_files(staging)  # flushes them
        _put_in_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _instead(folder: Path) -> str:
    """What to do with a folder of another method's run."""
    if has_weights(folder):
        return "; it holds a model already, which from_pretrained loads as it is"
    if (folder / "adapter_config.json").is_file():
        return "; it holds an adapter: from_pretrained loads it with its base, and peft's merge_and_unload() merges it"
    return ""


def holds_only_weights(folder: Path) -> bool:
    """Whether a folder is a model's, such as a checkpoint of another trainer, and nothing of a LISA run."""
    return has_weights(folder) and not (folder / STATE_NAME).exists() and not list(folder.glob(STATE_FILES))


def start_from_weights(lisa: LisaController, folder: Path) -> None:
    """Begin a run from the weights in a folder, in whatever precision: an attached controller at step 0 takes them."""
    read_weights(lisa.engine, lisa.blocks, folder, same_dtype=False)
    lisa.load_state_dict(lisa.state_dict())  # partitions anew, with masters from the weights
    lisa.movement.restart()


def find_checkpoint(output_dir: str | Path) -> tuple[Path, dict] | None:
    """The whole checkpoint in a folder that was saved last, and its state.

    Not that of the highest step: a run that went back to an earlier one has left later steps behind. Rank 0 says which
    damaged ones were passed over.
    """
    if dist.get_rank() == 0:
        _tidy(Path(output_dir))
    for folder in _listed_checkpoints(Path(output_dir)):
        try:
            return folder, read_state(folder)
        except DamagedError as error:
            if dist.get_rank() == 0:
                print(f"warning: {folder} is passed over: {error}", flush=True)
    return None


def rotate_checkpoints(newest: Path, limit: int | None, best: Path | None = None) -> None:
    """Delete the oldest checkpoints beside `newest`, which was just written, until `limit` are left; on one rank.

    `newest` and `best` always stay. Later steps than `newest`'s go first: a run that went back has left them behind.
    """
    if limit is None or limit < 1:
        return
    kept = {newest.resolve()} | ({best.resolve()} if best is not None and best.is_dir() else set())
    steps = {path: step for path, step in _checkpoints_in(newest.parent) if path.resolve() not in kept}
    order = sorted(steps, key=lambda path: (steps[path] < _step_of(newest), steps[path]))
    for path in order[: max(0, len(order) + len(kept) - max(limit, len(kept)))]:
        doomed = path.with_name(f"{_DOOMED}{path.name}")
        try:
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)  # a half-deleted checkpoint must not look like one
        except OSError as error:
            print(f"warning: {path} could not be deleted ({error.strerror}).", flush=True)
        shutil.rmtree(doomed, ignore_errors=True)


def _tidy(output_dir: Path) -> None:
    """Remove what killed saves have left, and put back a checkpoint that one was about to replace."""
    left = [path for path in output_dir.glob("tmp-*") if _LEFT_BEHIND.fullmatch(path.name)]
    for path in left:
        standing = path.with_name(path.name.removeprefix(_REPLACED))
        if path.name.startswith(_REPLACED) and not standing.exists():
            os.rename(path, standing)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _step_of(folder: Path) -> int:
    return int(_FOLDER.fullmatch(folder.name)[1])


def _checkpoints_in(output_dir: Path) -> Iterator[tuple[Path, int]]:
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        if _FOLDER.fullmatch(path.name) and path.is_dir():
            yield path, _step_of(path)


def _listed_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints, last saved first, as rank 0 sees them."""
    found = sorted(_checkpoints_in(output_dir), key=lambda found: (_saved_at(found[0]), found[1]), reverse=True)
    return [path for path, _ in gather(found)[0]]


def _saved_at(folder: Path) -> float:
    try:
        return read_json(folder / STATE_NAME)["saved_at"]
    except DamagedError:  # found out again, and said, where it is this one's turn
        return folder.stat().st_mtime


def _state_of(lisa: LisaController) -> dict:
    engine = lisa.engine
    rates = {
        group["lisa_group"]: {name: group[name] for name in ("lr", "initial_lr") if name in group}
        for group in engine.optimizer.param_groups
    }
    return {
        "format": FORMAT,
        "saved_at": time.time(),
        "world_size": dist.get_world_size(),
        "rows_per_step": engine.train_batch_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "model": type(engine.module).__name__,
        "lisa": lisa.state_dict(),
        "engine": {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")},
        "counters": lisa.partitions.counters(),
        "learning_rates": rates,
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


def _put_in_place(staging: Path, folder: Path) -> None:
    """Make the staged checkpoint the one at `folder`, in one step unless another one stands there."""
    for path in (staging, *staging.rglob("*")):
        set_mode_by_umask(path)
    flush_folder(staging)
    replaced = folder.with_name(f"{_REPLACED}{folder.name}")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    os.rename(staging, folder)
    flush_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
