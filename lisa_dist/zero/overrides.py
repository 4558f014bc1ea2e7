"""Replace parts of DeepSpeed: `override` sets one attribute, the other functions choose which, and when.

`lisa_dist/zero/__init__.py` has the table: what DeepSpeed does, what is done instead, and why.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import linear, partitioned_param_coordinator

from lisa_dist.distributed.devices import free_gpu_bytes
from lisa_dist.optim.adamw import LisaAdamW
from lisa_dist.optim.states import CopyStream
from lisa_dist.zero import embedding_rows, gradients, host_step, masters, stage3, step
from lisa_dist.zero.layout import GroupLayouts
from lisa_dist.zero.stages import STAGE_1_2, STAGE_3, Stage

# What `override_optimizer` replaces of how gradients are measured and sent, for whatever optimizer.
GRADIENT_NAMES = (
    "has_overflow",
    "scaled_global_norm",
    "_get_norm_groups",
    "set_norm_for_param_grad_in_gpu",
    "async_inplace_copy_grad_to_fp32_buffer_from_gpu",
    "temp_grad_buffer_for_gpu_offload",
    "_offload_grad_partition_at_boundary",
    "copy_grads_in_partition",
    "reduce_independent_p_g_buckets_and_remove_grads",
    "overlap_comm",
)
_left_out: set[str] = set()
classes_with_placed_masters: set[type] = set()  # classes of DeepSpeed's whose `initialize_optimizer_states` is replaced


def override(owner: Any, name: str, replacement: Any) -> None:
    """Put `replacement` in the place of an attribute that `owner`, an optimizer, a class or a module, must have."""
    assert hasattr(owner, name), f"{owner} has no {name}"
    if name not in _left_out:
        setattr(owner, name, replacement)


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Leave DeepSpeed's own methods in place on optimizers that are built in the body, to compare with.

    Of `GRADIENT_NAMES` alone: the other overrides depend on each other.
    """
    assert set(names) <= set(GRADIENT_NAMES)
    _left_out.update(names)
    try:
        yield
    finally:
        _left_out.difference_update(names)


def override_construction() -> None:
    """Process-wide, before an engine is built: masters in their place, no gradients of zeros, the GPU's free memory."""
    for stage in (STAGE_1_2, STAGE_3):
        kind: Any = stage.optimizer_class
        if kind not in classes_with_placed_masters:
            replacement = masters.state_initializer(stage, kind.initialize_optimizer_states)
            override(kind, "initialize_optimizer_states", replacement)
            classes_with_placed_masters.add(kind)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cuda":
        override(accelerator, "available_memory", free_gpu_bytes)


def override_stage_3(model: torch.nn.Module) -> None:
    """Process-wide, for models under stage 3: what a frozen weight keeps for the backward pass, and for how long."""
    stage3.remember_checkpointed_layers(model)
    override(linear, "LinearFunctionForZeroStage3", stage3.LinearFunction)
    override(partitioned_param_coordinator, "update_recompute_parameters", stage3.keep_until_layer_is_done)


def host_groups(zero: Any) -> frozenset[int]:
    """The parameter groups whose states are on the host (--lisa_offload)."""
    return frozenset(index for index, group in enumerate(zero.optimizer.param_groups) if group.get("lisa_host"))


def override_optimizer(
    engine: deepspeed.DeepSpeedEngine, stage: Stage, layouts: GroupLayouts, copies: CopyStream
) -> None:
    """On one ZeRO optimizer, after each construction: gradients, norms and the step, as its settings need them.

    `copies` is for those between host and device.
    """
    zero = engine.optimizer
    replacements: dict[str, Any] = {}
    on_host = host_groups(zero)
    if layouts.of_rows is not None:
        replacements |= embedding_rows.reduced_by_rows(engine.module, zero, *layouts.of_rows)
    else:
        embedding_rows.leave(engine.module)
    if isinstance(zero.optimizer, LisaAdamW):
        replacements |= step.one_pass_step(engine, stage, layouts, copies)
    elif on_host:
        replacements |= host_step.host_step(zero, stage, on_host, copies)
    if not (stage.is_stage_3 or stage.offloads_optimizer(zero)):
        replacements |= gradients.kept_by_themselves(zero)
    if torch.distributed.get_world_size() == 1 and embedding_rows.reduces_plainly(zero, stage):
        replacements |= gradients.kept_on_one_rank(zero)
    if stage.offloads_optimizer(zero):
        replacements |= gradients.sent_in_chunks(zero, stage)
    elif zero.model_parallel_group is None:  # else the parts of other ranks' matrices count too
        replacements |= gradients.norms_with_one_collective(zero, stage)
    for name, replacement in replacements.items():
        override(zero, name, replacement)
