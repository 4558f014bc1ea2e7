"""LISA in a DeepSpeed loop of one's own: engine and controller in one call."""

import contextlib
import weakref
from typing import Any

import deepspeed
import torch
from torch import distributed as dist

from lisa_dist.config import LisaConfig
from lisa_dist.core.controller import LisaController
from lisa_dist.core.engine_checks import prepare_ds_config
from lisa_dist.core.sequence_parallel import SequenceParallel, check_sequence_parallel
from lisa_dist.distributed.devices import prepare_device
from lisa_dist.distributed.health import ranks_of_hosts
from lisa_dist.distributed.ranks import join_ranks
from lisa_dist.distributed.run_lock import one_run_in
from lisa_dist.ds_config import load_ds_config, precision_of, uses_optimizer_offload
from lisa_dist.optim.build import build_optimizer
from lisa_dist.zero.cpu_ops import guard_builds
from lisa_dist.zero.partitions import remove_forward_hooks
from lisa_dist.zero.stage3 import forget_sharing_ranks


def initialize(
    model: torch.nn.Module,
    ds_config: str | dict[str, Any],
    config: LisaConfig | None = None,
    *,
    lr: float = 1e-5,
    weight_decay: float = 0.0,
    optim: str = "adamw_torch",
    micro_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 1.0,
    output_dir: str | None = None,
    sequence_parallel: int = 1,
) -> tuple[deepspeed.DeepSpeedEngine, LisaController]:
    """A DeepSpeed engine that trains `model` by LISA, and its controller: the short way for a loop of one's own.

    `ds_config` is a shipped short name (zero1, zero2, zero3, zero2_offload, ...), a path, or a dict; its "auto" values
    are filled in from the arguments. Without a launcher this process is the only rank. Call `lisa.on_step_begin()`
    before every step.
    Where `sequence_parallel` ranks share each row, `lisa.sequence` says whose rows are this rank's (`data_rank` of
    `data_ranks`), and `lisa.sequence.shard(batch)` gives its part of them, for training alone.
    Until `lisa.close()`, or the end of the controller, no other run may have `output_dir`, where the logs go.
    """
    guard_builds()
    join_ranks()
    prepare_device()  # before ranks speak: those of a host share originals of frozen layers, and weights of stage 3
    filled = load_ds_config(
        ds_config,
        model=model,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_grad_norm=max_grad_norm,
        ranks_of_hosts=ranks_of_hosts(),
    )
    config = config or LisaConfig()
    prepare_ds_config(filled, config, optim, precision_of(filled))
    if sequence_parallel > 1:
        how: Any = model.config
        check_sequence_parallel(sequence_parallel, dist.get_world_size(), how, how._attn_implementation)
    offload = uses_optimizer_offload(filled)
    lisa = LisaController(model, config)
    lisa.gather_by_layers(model, filled)
    groups = lisa.param_groups(weight_decay)
    optimizer = build_optimizer(groups, optim, lr=lr, offload=offload, seed=config.lisa_seed)
    with contextlib.ExitStack() as undone:  # where something is wrong the model is given back
        undone.callback(lisa.blocks.give_back)
        forget_sharing_ranks(model)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=filled)
        undone.callback(engine.destroy)
        undone.callback(remove_forward_hooks, engine)
        if output_dir is not None:  # the ranks know of each other now
            held = contextlib.ExitStack()
            held.enter_context(one_run_in(output_dir))
            lisa.at_close = weakref.finalize(lisa, held.close)
        lisa.attach(engine, output_dir)
        if sequence_parallel > 1:
            lisa.sequence = SequenceParallel(sequence_parallel, engine.device.type)
            undone.callback(lisa.sequence.close)
            lisa.sequence.share(engine)
        undone.pop_all()
    engine.train()  # from_pretrained gives models that are to be used, not trained
    return engine, lisa
