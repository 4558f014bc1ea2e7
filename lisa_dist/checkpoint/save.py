"""Save a checkpoint of a LISA run: whole or not there. `resume.py` reads it, on any world size and ZeRO stage.

A folder `checkpoint-N` contains

- the model as `save_pretrained` writes it, all blocks, frozen or not;
- `lisa_optimizer-RANK-of-RANKS.safetensors`: masters and moments of active blocks and of kept ones, by parameter name;
- `lisa_movement.safetensors`: samples of the weights at the start, by which later movement is measured;
- `lisa_state.json`: format, step, period, active layers, settings, versions, and the SHA-256 of every other file.

DeepSpeed's own checkpoints are no basis for this: they tie the optimizer to one world size, and its universal format
restores neither frozen weights nor the step counts of several groups.
"""

import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import distributed as dist

from lisa_dist.checkpoint.folders import STATE_NAME, put_in_place, staging_folder
from lisa_dist.checkpoint.optimizer_states import state_file, write_states
from lisa_dist.checkpoint.weights import MAX_SHARD_SIZE, write_configs, write_weights
from lisa_dist.core.controller import LisaController
from lisa_dist.core.movement import MOVEMENT_FILE
from lisa_dist.distributed.collectives import describe_files, together
from lisa_dist.files import write_json

FORMAT = 1
ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
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

    `writes`: whether this rank writes the model (rank 0 by default). `write_more(path)`, called on every rank, writes
    the model's configs instead of this function, and whatever else belongs to the model. `max_shard_size` in bytes.
    `folder` does not exist before all of it is on disk. Raises SaveError on every rank when one cannot write.
    """
    assert lisa.is_attached, "attach the controller to a DeepSpeed engine first"
    folder, engine, movement = Path(folder), lisa.engine, lisa.movement
    rank, world_size = dist.get_rank(), dist.get_world_size()
    writes = rank == 0 if writes is None else writes
    with staging_folder(folder, writes) as staging:
        # 1. The model's configs, or what `write_more` writes.
        with together(folder):
            if write_more is not None:
                write_more(staging)
            elif writes:
                write_configs(engine.module, staging)
        # 2. The weights of all blocks: gathered block by block under ZeRO-3, written by one rank.
        write_weights(engine, lisa.blocks, staging, writes, max_shard_size, reported_folder=folder)
        # 3. Masters and moments: each rank writes those of its own partitions.
        with together(folder):
            write_states(staging / state_file(rank, world_size), *lisa.saved_states())
            if rank == 0:
                movement.save(staging / MOVEMENT_FILE)
        # 4. Sizes and sums: the ranks share the files, and flush each to disk.
        files = describe_files(staging)
        # 5. The state, and the rename that makes it a checkpoint.
        with together(folder):
            if writes:
                write_json(staging / STATE_NAME, _describe_run(lisa) | {"files": files})
                put_in_place(staging, folder)


def _describe_run(lisa: LisaController) -> dict[str, Any]:
    """What `lisa_state.json` contains but for the list of files."""
    engine, partitions = lisa.engine, lisa.partitions
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
        "engine": {name: getattr(engine, name) for name in ENGINE_COUNTERS},
        "counters": partitions.counters(),
        "learning_rates": rates,
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
