"""Which parts of DeepSpeed are replaced on which optimizer, and when; where each master lives.

`lisa_dist/zero/__init__.py` has the table: what DeepSpeed does, what is done instead, and why.

DeepSpeed clones an fp32 master from the weights of every group; LisaAdamW may be without, and have bf16 masters. Of
weights of the masters' dtype the clone would be a second copy of the same numbers: the master becomes a view of the
weights. The master of a group whose block is in --lisa_offload goes to the host. All clones are on the device for a
moment, at the start and in a switch, when there are no gradients and no activations.
"""

import functools
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import linear, partitioned_param_coordinator

from lisa_dist.distributed.devices import free_gpu_bytes
from lisa_dist.optim.states import CopyStream
from lisa_dist.zero import embedding_rows, gradients, stage3
from lisa_dist.zero.layout import GroupLayouts
from lisa_dist.zero.stages import STAGE_1_2, STAGE_3, Stage, override
from lisa_dist.zero.step import GroupSteps


def override_construction() -> None:
    """Process-wide, before an engine is built: masters in their place, no gradients of zeros, the GPU's free memory."""
    for stage in (STAGE_1_2, STAGE_3):
        kind: Any = stage.optimizer_class
        if not hasattr(getattr(kind, "initialize_optimizer_states", None), "__wrapped__"):
            override(kind, "initialize_optimizer_states", _placing_masters(stage, kind))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cuda":
        override(accelerator, "available_memory", free_gpu_bytes)


def override_stage_3(model: torch.nn.Module) -> None:
    """Process-wide, for models under stage 3: what a frozen weight keeps for the backward pass, and for how long."""
    stage3.remember_checkpointed_layers(model)
    override(linear, "LinearFunctionForZeroStage3", stage3.LinearFunction)
    override(partitioned_param_coordinator, "update_recompute_parameters", stage3.keep_until_layer_is_done)
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    override(coordinator, "_PartitionedParameterCoordinator__params_to_release", stage3.what_to_release)


def override_optimizer(
    engine: deepspeed.DeepSpeedEngine, stage: Stage, layouts: GroupLayouts, copies: CopyStream
) -> None:
    """On one ZeRO optimizer, after each construction: gradients, norms and the step, as its settings need them.

    `copies` is for those between host and device.
    """
    zero = engine.optimizer
    replacements: dict[str, Any] = {}
    embedding_rows.leave(engine.module)
    if layouts.of_rows is not None:
        replacements |= embedding_rows.reduced_by_rows(engine.module, zero, *layouts.of_rows)
    replacements |= GroupSteps(engine, stage, layouts, copies).replacements()
    if not (stage.is_stage_3 or stage.offloads_optimizer(zero)):
        replacements["average_tensor"] = gradients.kept_until_reduced(zero)
        if zero.gradient_accumulation_dtype == zero.dtype:  # else DeepSpeed adds them up where they stay
            replacements["copy_grads_in_partition"] = gradients.kept_by_themselves(zero)
    if torch.distributed.get_world_size() == 1 and not (stage.is_stage_3 or stage.offloads_optimizer(zero)):
        # There is nothing to overlap, only a second bucket and a wait for the device. Under offload gradients are
        # copied to the host beside the backward pass.
        replacements["overlap_comm"] = False
        if embedding_rows.reduces_plainly(zero, stage):
            replacements |= gradients.kept_on_one_rank(zero)
    if stage.offloads_optimizer(zero):
        if not stage.is_stage_3:
            replacements |= gradients.sent_in_chunks(zero)
    elif zero.model_parallel_group is None:  # else the parts of other ranks' matrices count too
        replacements |= gradients.norms_with_one_collective(zero, stage)
    for name, replacement in replacements.items():
        override(zero, name, replacement)


def _placing_masters(stage: Stage, kind: Any) -> Callable[[Any], None]:
    """A replacement for `initialize_optimizer_states`, which DeepSpeed's constructor calls once all masters exist.

    DeepSpeed's own makes a gradient of zeros for every master and drops it, 4 bytes an active element; only under
    optimizer offload the gradients stay, and only Adagrad makes its states of them: there DeepSpeed's own runs.
    """
    original = kind.initialize_optimizer_states

    @functools.wraps(original)
    def place_masters(zero: Any) -> None:
        """Replace each master that belongs on the host, or that the weights can take the place of."""
        stage3.reduce_by_parameters(parameter for group in stage.groups(zero) for parameter in group)
        if stage.offloads_optimizer(zero) or isinstance(zero.optimizer, torch.optim.Adagrad):
            original(zero)
            return
        masters: list[Any] = stage.masters(zero)
        groups = zero.optimizer.param_groups
        if len(masters) != len(groups):  # stage 3 has cut groups into sub-groups, which LISA refuses later
            return
        for index, (group, master) in enumerate(zip(groups, masters, strict=True)):
            weights = stage.flat_weights(zero, index)
            if group.get("lisa_host"):
                placed: Any = master.detach().to("cpu", copy=True)
            elif (master.dtype, master.device) == (weights.dtype, weights.device):
                placed = weights.detach()
            else:
                continue
            placed.requires_grad = master.requires_grad
            if stage.is_stage_3:
                placed.ds_id = master.ds_id
            masters[index] = placed
            if any(parameter is master for parameter in group["params"]):  # stage 3 fills groups only while they step
                group["params"] = [placed]

    return place_masters
