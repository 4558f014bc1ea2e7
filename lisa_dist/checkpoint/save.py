"""Save a checkpoint of a LISA run: whole or not there. `resume.py` reads it, on any world size and ZeRO stage.

A folder `checkpoint-N` contains

- the model as `save_pretrained` writes it, all blocks, frozen or not, each in a file of its own. A block that has not
  changed since the last checkpoint beside it is a hard link to that one's file;
- `lisa_optimizer-RANK-of-RANKS.safetensors`: masters and moments of active blocks and of kept ones, by parameter name;
- `adapter/`: with --lisa_adapters, PEFT's files of the adapters;
- `lisa_movement.safetensors`: samples of the weights at the start, by which later movement is measured;
- `lisa_state.json`: format, step, period, active layers, settings, versions, and the SHA-256 of every other file.

DeepSpeed's own checkpoints are no basis for this: they tie the optimizer to one world size, and its universal format
restores neither frozen weights nor the step counts of several groups.
"""

import contextlib
import shutil
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from torch import distributed as dist
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lisa_dist.checkpoint.folders import make_staging, put_in_place
from lisa_dist.checkpoint.optimizer_states import copy_on_host, state_file, states_on_host
from lisa_dist.checkpoint.weights import (
    BlockFile,
    block_files,
    link_unchanged,
    save_without_weights,
    write_index,
)
from lisa_dist.config_rules import ADAPTERS
from lisa_dist.core.adapters import save_config
from lisa_dist.core.controller import LisaController
from lisa_dist.core.period_log import MOVEMENT_FILE
from lisa_dist.core.run_state import SavedBlocks
from lisa_dist.distributed.collectives import background_group, describe_files, gather, together
from lisa_dist.distributed.health import host_name
from lisa_dist.files import SaveError, write_json
from lisa_dist.run_folder import STATE_FORMAT, STATE_NAME
from lisa_dist.zero.parameters import whole_weights
from lisa_dist.zero.stage3 import drop_prefetched

ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
HOST_BYTES = 8 * 1024**3  # of a rank's copies, which wait to be written
_PATIENCE = 600.0  # seconds
_PACKAGES = ("lisa_dist", "torch", "deepspeed", "transformers")

_running: "weakref.WeakKeyDictionary[LisaController, _Save]" = weakref.WeakKeyDictionary()


def save_checkpoint(
    lisa: LisaController,
    folder: str | Path,
    *,
    writes: bool | None = None,
    write_more: Callable[[Path], None] | None = None,
    in_background: bool = False,
    then: Callable[[], None] | None = None,
    host_bytes: int = HOST_BYTES,
) -> None:
    """Write a checkpoint; every rank calls it between two optimizer steps.

    `writes`: whether this rank writes what the ranks do not share (rank 0 by default). `write_more(path)`, called on
    every rank, writes the model's configs instead of this function, and whatever else belongs to the model.
    `in_background`: return once what has changed is copied to the host, and write it while training goes on;
    `finish_save` waits for that, as the next save does. `then()` comes on every rank once the checkpoint is there.
    `host_bytes`: what a rank holds in copies at most; where there is more, all are written before training goes on.

    `folder` does not exist before all of it is on disk. Raises SaveError on every rank when one cannot write.
    """
    assert lisa.is_attached, "attach the controller to a DeepSpeed engine first"
    finish_save(lisa)
    folder, writes = Path(folder), dist.get_rank() == 0 if writes is None else writes
    with _Save(lisa, folder, make_staging(folder, writes), writes, host_bytes, then) as save:
        # 1. The model's configs; or what `write_more` writes, a trainer's random states first.
        with together(folder):
            if write_more is not None:
                write_more(save.staging)
            elif writes:
                model = lisa.engine.module
                save_without_weights(lambda path: model.save_pretrained(path, state_dict={}), save.staging)
            if dist.get_rank() == 0:
                lisa.movement.save(save.staging / MOVEMENT_FILE)
        # 2. The weights of blocks that have changed, gathered block by block under ZeRO-3, and links for the others.
        save.link_and_copy_weights()
        # 3. Masters and moments: each rank copies those of its own partitions.
        save.copy_states()
        # 4. Copies to disk, sizes and sums, and the rename that makes it a checkpoint.
        if in_background:
            save.complete_in_background()
            _running[lisa] = save
        else:
            save.complete()


def finish_save(lisa: LisaController, seconds: float | None = None) -> None:
    """Wait until the save that goes on in the background is complete, where there is one; every rank calls it.

    Raises SaveError on every rank when one could not write, or after `seconds`.
    """
    save = _running.pop(lisa, None)
    if save is not None:
        save.wait(seconds)


def end_save(lisa: LisaController) -> None:
    """Where a run has raised: let the save that goes on in the background come to its end, at most ten minutes.

    The threads that write speak with each other alone, so ranks need not raise at the same place. What goes wrong is
    printed, since the run's own error is on its way.
    """
    try:
        finish_save(lisa, _PATIENCE)
    except (SaveError, RuntimeError) as error:  # of a disk, or of another rank that is gone
        if dist.get_rank() == 0:
            print(f"lisa-dist: {error}", flush=True)


@dataclass
class _Save(contextlib.AbstractContextManager["_Save"]):
    """A checkpoint that is being written; where an error ends it nothing of it stays."""

    lisa: LisaController
    folder: Path
    staging: Path
    writes: bool
    host_bytes: int
    then: Callable[[], None] | None
    _on_host: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = field(default_factory=dict)
    _written: list[str] = field(default_factory=list)
    _group: dist.ProcessGroup | None = None  # of the thread that writes
    _future: Future[None] | None = None

    def __post_init__(self) -> None:
        self.lisa.note_changes()
        self._changed = self.lisa.changes.take(self.lisa.engine.global_steps)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.lisa.changes.give_back(self._changed)
            if self.writes:
                shutil.rmtree(self.staging, ignore_errors=True)

    def link_and_copy_weights(self) -> None:
        """Link what has not changed, and copy what has: each file to the rank that writes it."""
        engine, rank, linked = self.lisa.engine, dist.get_rank(), None
        drop_prefetched(engine)
        self._files = block_files(engine.module, self.lisa.blocks)
        with together(self.folder):
            if self.writes:
                linked = link_unchanged(self._files, self._changed, self.lisa.changes.saved, self.staging)
                of_model = [file for file in self._files if file.block != ADAPTERS]
                file_by_name = {name: file.name for file in of_model for name in file.tensors}
                nbytes = sum(file.nbytes for file in of_model)
                if len(of_model) < len(self._files):
                    save_config(engine.module, self.staging)
                write_index(self.staging / SAFE_WEIGHTS_INDEX_NAME, file_by_name, nbytes)
        self._linked = next(found for found in gather(linked) if found is not None)
        files = [file for file in self._files if file.name not in self._linked]
        owners = assign(files, host_by_host(gather(host_name())))
        held = dict.fromkeys(owners.values(), 0)
        for file in files:
            owner = owners[file.name]
            if held[owner] + file.nbytes > self.host_bytes:
                self._write_copies()
                held = dict.fromkeys(held, 0)
            held[owner] += file.nbytes
            with deepspeed.zero.GatheredParameters(list(file.tensors.values())):
                if rank == owner:
                    copies = {name: copy_on_host(whole_weights(value)) for name, value in file.tensors.items()}
                    self._on_host[file.name] = copies, {"format": "pt"}

    def copy_states(self) -> None:
        """Copy masters and moments, and note where the run is."""
        file = state_file(dist.get_rank(), dist.get_world_size())
        self._on_host[file] = states_on_host(*self.lisa.saved_states())
        self._state = _describe_run(self.lisa)
        held = sum(copy.nbytes for copies, _ in self._on_host.values() for copy in copies.values())
        if max(gather(held)) > self.host_bytes:
            self._write_copies()

    def complete(self) -> None:
        """Write all that is on the host, and make a checkpoint of the folder."""
        self._write_copies()
        described = describe_files(self.staging, self._linked, self._written, self._group)
        with together(self.folder, self._group):
            if self.writes:
                write_json(self.staging / STATE_NAME, self._state | {"files": described})
                put_in_place(self.staging, self.folder)
        of_blocks = {file.block: file.name for file in self._files}
        saved = {name: described[name] for name in of_blocks.values()}
        self.lisa.changes.saved = SavedBlocks(self.folder, of_blocks, saved)
        if self.then is not None:
            self.then()

    def complete_in_background(self) -> None:
        """`complete` in a thread beside the one that trains."""
        self._group = background_group()
        executor = ThreadPoolExecutor(1, thread_name_prefix="lisa_dist saves")
        self._future = executor.submit(self.complete)
        executor.shutdown(wait=False)

    def wait(self, seconds: float | None) -> None:
        """Until it is complete; raises what `complete` has raised, SaveError after `seconds`."""
        assert self._future is not None
        with self:
            if not wait([self._future], seconds).done:
                raise SaveError(f"{self.staging}: not complete after {seconds:.0f} s, and given up.")
            self._future.result()

    def _write_copies(self) -> None:
        """Write this rank's copies, which are on the host no longer; every rank calls it."""
        with together(self.folder, self._group):
            for name, (tensors, about) in self._on_host.items():
                save_file(tensors, self.staging / name, metadata=about)
                self._written.append(name)
        self._on_host.clear()


def assign(files: Sequence[BlockFile], order: Sequence[int]) -> dict[str, int]:
    """Which rank writes which file: the largest first, each to the rank that has least, by `order` where several do."""
    held = dict.fromkeys(order, 0)
    owners = {}
    for file in sorted(files, key=lambda file: -file.nbytes):
        owner = min(held, key=lambda rank: held[rank])
        owners[file.name] = owner
        held[owner] += file.nbytes
    return owners


def host_by_host(hosts: Sequence[str]) -> list[int]:
    """The ranks, of which the hosts are given, in an order in which every host comes by before one comes again."""
    before = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    return sorted(range(len(hosts)), key=lambda rank: (before[rank], rank))


def _describe_run(lisa: LisaController) -> dict[str, Any]:
    """What `lisa_state.json` contains but for the list of files."""
    engine, partitions = lisa.engine, lisa.partitions
    rates = {
        group["lisa_group"]: {name: group[name] for name in ("lr", "initial_lr") if name in group}
        for group in engine.optimizer.param_groups
    }
    return {
        "format": STATE_FORMAT,
        "saved_at": time.time(),
        "world_size": dist.get_world_size(),
        "rows_per_step": lisa.rows_per_step,
        "zero_stage": engine.zero_optimization_stage(),
        "model": type(engine.module).__name__,
        "lisa": lisa.state_dict(),
        "engine": {name: getattr(engine, name) for name in ENGINE_COUNTERS},
        "counters": partitions.counters(),
        "learning_rates": rates,
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
