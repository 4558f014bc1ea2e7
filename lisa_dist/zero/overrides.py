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
from lisa_dist.optim.states import CopyStream
from lisa_dist.zero import embedding_rows, gradients, masters, stage3
from lisa_dist.zero.layout import GroupLayouts
from lisa_dist.zero.stages import STAGE_1_2, STAGE_3, Stage
from lisa_dist.zero.step import GroupSteps

# What a run is right without: how gradients are measured, kept and reduced, for whatever optimizer,
GRADIENT_NAMES = (
    "has_overflow",
    "scaled_global_norm",
    "_get_norm_groups",
    "set_norm_for_param_grad_in_gpu",
    "async_inplace_copy_grad_to_fp32_buffer_from_gpu",
    "copy_grads_in_partition",
    "reduce_independent_p_g_buckets_and_remove_grads",
    "overlap_comm",
)
# the gradient of an embedding by its rows, all or none of these,
ROW_NAMES = ("get_all_grad_tensors", "get_flat_partition", "zero_grad")
# what ZeRO-3 keeps, copies of new weights, and what a switch waits for.
OTHER_NAMES = (
    "empty_cache",
    "defragment",
    "LinearFunctionForZeroStage3",
    "update_recompute_parameters",
    "parallel_partitioned_bit16_groups",
    "_reassign_or_swap_out_partitioned_parameters",
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

    AssertionError for a name without which a run would be wrong.
    """
    assert set(names) <= {*GRADIENT_NAMES, *ROW_NAMES, *OTHER_NAMES}
    assert len(set(names) & set(ROW_NAMES)) in (0, len(ROW_NAMES))
    _left_out.update(names)
    try:
        yield
    finally:
        _left_out.difference_update(names)


def is_left_out(name: str) -> bool:
    """Whether `without` leaves a name to DeepSpeed."""
    return name in _left_out


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


def override_optimizer(
    engine: deepspeed.DeepSpeedEngine, stage: Stage, layouts: GroupLayouts, copies: CopyStream
) -> None:
    """On one ZeRO optimizer, after each construction: gradients, norms and the step, as its settings need them.

    `copies` is for those between host and device.
    """
    zero = engine.optimizer
    replacements: dict[str, Any] = {}
    if layouts.of_rows is not None:
        replacements |= embedding_rows.reduced_by_rows(engine.module, zero, *layouts.of_rows)
    else:
        embedding_rows.leave(engine.module)
    replacements |= GroupSteps(engine, stage, layouts, copies).replacements()
    if not (stage.is_stage_3 or stage.offloads_optimizer(zero)):
        replacements["average_tensor"] = gradients.kept_until_reduced(zero)
        if zero.gradient_accumulation_dtype == zero.dtype:  # else DeepSpeed adds them up where they stay
            replacements["copy_grads_in_partition"] = gradients.kept_by_themselves(zero)
    if torch.distributed.get_world_size() == 1 and embedding_rows.reduces_plainly(zero, stage):
        replacements |= gradients.kept_on_one_rank(zero)
    if stage.offloads_optimizer(zero):
        if not stage.is_stage_3:
            replacements |= gradients.sent_in_chunks(zero)
    elif zero.model_parallel_group is None:  # else the parts of other ranks' matrices count too
        replacements |= gradients.norms_with_one_collective(zero, stage)
    for name, replacement in replacements.items():
        override(zero, name, replacement)
