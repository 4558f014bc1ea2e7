"""The optimizer step of one group, inside DeepSpeed's step: by LisaAdamW in one pass, or on the host (`host_step.py`).

DeepSpeed's step takes the norm of all gradients and then, group by group, on each rank::

    gradients   flattened into one tensor          one_pass_step: as they are          host_step: sent to the host
                cast to fp32                       not cast                            cast there
    scale       unscaled and clipped in place      one number, given to the kernel     unscaled there
    optimizer   AdamW over the master              the kernel writes moments, master   AdamW on the host
                                                   and weights in one pass
    weights     master copied to the weights       skipped                             cast, and sent to the device

Source of the order: `DeepSpeedZeroOptimizer.step`, `DeepSpeedZeroOptimizer_Stage3.step`.
"""

import functools
from typing import Any

import deepspeed
import torch

from lisa_dist.optim.adamw import PartitionStep
from lisa_dist.optim.states import CopyStream
from lisa_dist.zero.host_step import GradientsToHost, WeightsOfStep, send_weights
from lisa_dist.zero.layout import GroupLayouts
from lisa_dist.zero.stages import Stage


def one_pass_step(
    engine: deepspeed.DeepSpeedEngine, stage: Stage, layouts: GroupLayouts, copies: CopyStream
) -> dict[str, Any]:
    """Replace DeepSpeed's passes over a group's memory by what LisaAdamW needs to do all in one.

    DeepSpeed is given a single zero, spread over the partition, as the gradient.
    """
    zero = engine.optimizer
    add_up = functools.partial(torch.distributed.all_reduce, group=zero.dp_process_group)
    masters = enumerate(stage.masters(zero))
    on_host = frozenset(index for index, one in masters if one.device != stage.flat_weights(zero, index).device)
    to_host = GradientsToHost(zero, stage, on_host, copies)
    prepared: list[PartitionStep] = []  # of the group that is about to step, between its gradients and its scale

    def prepare(index: int) -> torch.Tensor:
        master, weights = stage.masters(zero)[index], stage.flat_weights(zero, index)
        flat = None if stage.is_stage_3 else type(zero)._get_preflattened_grad_partition(zero, index)
        gradients = zero.averaged_gradients[index] if flat is None else [flat]
        to_host.send(index)
        if index in on_host:
            gradients = [to_host.take(index)]
        if not stage.is_stage_3:
            zero.parallel_partitioned_bit16_groups.writers[index] = functools.partial(write, index)
        writes_weights = index not in on_host and master.data_ptr() != weights.data_ptr()
        step = PartitionStep(
            layouts.pieces[index],
            gradients,
            weights if writes_weights else None,
            draw=engine.global_steps,
            matrices=layouts.matrices[index],
            add_up=add_up,
        )
        prepared.append(step)
        zero.optimizer.prepare(master, step)
        return master.new_zeros(1).expand(master.numel())

    def set_gradient_scale(index_or_gradients: Any, total_norm: torch.Tensor | None) -> None:
        step = prepared.pop()  # it holds gradients, which are to be freed after the step
        step.gradient_scale = gradient_scale(zero, stage, total_norm, step.gradients[0].device)

    def prepare_sub_group(index: int) -> None:
        stage.masters(zero)[index].grad = prepare(index)
        zero.averaged_gradients[index] = None

    def write(index: int) -> None:  # the kernel has written the others; partitions of parameters are views of them
        if index in on_host:
            send_weights(stage.masters(zero)[index].detach(), stage.flat_weights(zero, index))

    if stage.is_stage_3:
        return {
            "unscale_and_clip_grads": set_gradient_scale,
            "_prepare_fp32_grad_for_sub_group": prepare_sub_group,
            "_reassign_or_swap_out_partitioned_parameters": write,
        }
    return {
        "unscale_and_clip_grads": set_gradient_scale,
        "_get_preflattened_grad_partition": prepare,
        "parallel_partitioned_bit16_groups": WeightsOfStep(zero.parallel_partitioned_bit16_groups),
    }


def gradient_scale(zero: Any, stage: Stage, total_norm: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The factor of the gradients, fp32 of shape [1], for clipping and the loss scale, as DeepSpeed computes it.

    `total_norm`, on the host, is the norm of all gradients, times the loss scale; it is needed where they are clipped.
    """
    scale = torch.ones(1, device=device)
    if not stage.is_stage_3:
        type(zero).unscale_and_clip_grads(zero, [scale], total_norm)
        return scale
    # Stage 3's own scales the whole gradient that it finds at the master, so its formula stands here once more.
    combined = zero.loss_scale
    if zero.clip_grad > 0.0:
        clip = ((total_norm / zero.loss_scale) + 1e-6) / zero.clip_grad
        combined = torch.clamp(clip, min=1.0) * zero.loss_scale
    return scale.mul_(1.0 / combined)
