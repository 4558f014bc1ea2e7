"""The optimizer step of one group, inside DeepSpeed's step: by LisaAdamW in one pass, or on the host.

DeepSpeed's step takes the norm of all gradients and then, group by group, on each rank::

    gradients   flattened into one tensor          one_pass_step: as they are          host_step: sent to the host
                cast to fp32                       not cast                            cast there
    scale       unscaled and clipped in place      one number, given to the kernel     unscaled there
    optimizer   AdamW over the master              the kernel writes moments, master   AdamW on the host
                                                   and weights in one pass
    weights     master copied to the weights       skipped                             copied to the device

Source of the order: `DeepSpeedZeroOptimizer.step`, `DeepSpeedZeroOptimizer_Stage3.step`.
"""

import functools
from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from lisa_dist.optim.adamw import PartitionStep
from lisa_dist.optim.states import Piece
from lisa_dist.zero.gradients import scale_without_waiting
from lisa_dist.zero.stages import Stage


def one_pass_step(engine: deepspeed.DeepSpeedEngine, stage: Stage, pieces: list[list[Piece]]) -> dict[str, Any]:
    """Replace DeepSpeed's passes over a group's memory by what LisaAdamW needs to do all in one.

    DeepSpeed is given a single zero, spread over the partition, as the gradient. `pieces` are those of each group.
    """
    zero = engine.optimizer
    prepared: list[PartitionStep] = []  # of the group that is about to step, between its gradients and its scale

    def prepare(index: int) -> torch.Tensor:
        master, weights = stage.masters(zero)[index], stage.flat_weights(zero, index)
        flat = None if stage.is_stage_3 else type(zero)._get_preflattened_grad_partition(zero, index)
        gradients = zero.averaged_gradients[index] if flat is None else [flat]
        on_host = master.device != weights.device  # then DeepSpeed copies the master to the weights, as always
        if on_host:
            gradients = [gradient.to(master.device) for gradient in gradients]
        elif not stage.is_stage_3:
            zero.parallel_partitioned_bit16_groups.written = index
        writes_weights = not on_host and master.data_ptr() != weights.data_ptr()
        step = PartitionStep(pieces[index], gradients, weights if writes_weights else None, draw=engine.global_steps)
        prepared.append(step)
        zero.optimizer.prepare(master, step)
        return master.new_zeros(1).expand(master.numel())

    def set_gradient_scale(index_or_gradients: Any, total_norm: torch.Tensor | None) -> None:
        step = prepared.pop()  # it holds gradients, which are to be freed after the step
        step.gradient_scale = gradient_scale(zero, stage, total_norm).to(step.gradients[0].device)

    def prepare_sub_group(index: int) -> None:
        stage.masters(zero)[index].grad = prepare(index)
        zero.averaged_gradients[index] = None

    def skip_written_weights(index: int) -> None:  # the parameters' partitions are views of them
        master, weights = stage.masters(zero)[index], stage.flat_weights(zero, index)
        if master.device != weights.device:
            type(zero)._reassign_or_swap_out_partitioned_parameters(zero, index)

    if stage.is_stage_3:
        return {
            "unscale_and_clip_grads": set_gradient_scale,
            "_prepare_fp32_grad_for_sub_group": prepare_sub_group,
            "_reassign_or_swap_out_partitioned_parameters": skip_written_weights,
        }
    return {
        "unscale_and_clip_grads": set_gradient_scale,
        "_get_preflattened_grad_partition": prepare,
        "parallel_partitioned_bit16_groups": SkipWrittenWeights(zero.parallel_partitioned_bit16_groups),
    }


def gradient_scale(zero: Any, stage: Stage, total_norm: torch.Tensor | None) -> torch.Tensor:
    """The factor of the gradients, fp32 of shape [1], for clipping and the loss scale, as DeepSpeed computes it.

    `total_norm` is the norm of all gradients, times the loss scale; it is needed where gradients are clipped.
    """
    scale = torch.ones(1, device=zero.device)
    if not stage.is_stage_3:
        scale_without_waiting(zero)([scale], total_norm)
        return scale
    # Stage 3's own scales the whole gradient that it finds at the master, so its formula stands here once more.
    combined = zero.loss_scale
    if zero.clip_grad > 0.0:
        clip = ((total_norm / zero.loss_scale) + 1e-6) / zero.clip_grad
        combined = torch.clamp(clip, min=1.0) * zero.loss_scale
    return scale.mul_(1.0 / combined)


class SkipWrittenWeights(list):
    """Weights by group and rank, in which DeepSpeed does not copy the master over weights that are written already.

    DeepSpeed's step reads the entry of a group right after the optimizer has stepped it, copies the master there, and
    reads it again for the all-gather. There is no method in between that could be replaced. So the next read of the
    entry `written` returns meta tensors: copying to them does nothing.
    """

    written: int | None = None

    def __getitem__(self, index: Any) -> Any:
        entry = super().__getitem__(index)
        if self.written is None or index != self.written:
            return entry
        self.written = None
        return [torch.empty_like(weights, device="meta") for weights in entry]


def host_step(zero: Any, stage: Stage, host_groups: frozenset[int]) -> dict[str, Callable]:
    """Have the groups `host_groups`, whose masters and moments are on the host, step there.

    The norm has been taken on the device by then. The rest follows from where the master is: AdamW runs on the host,
    and the copy of the new weights goes to the device.
    """
    optimizer_class = type(zero)
    unscale: Callable[[Any, torch.Tensor | None], None] = scale_without_waiting(zero)
    if stage.is_stage_3:
        unscale = functools.partial(optimizer_class.unscale_and_clip_grads, zero)

    def gradients_on_host(index: int) -> torch.Tensor | None:
        flat = optimizer_class._get_preflattened_grad_partition(zero, index)
        if index not in host_groups:
            return flat
        if flat is not None:
            return flat.to("cpu")
        gradients = zero.averaged_gradients[index]
        flat, begins = torch.zeros(zero.partition_size[index], dtype=gradients[0].dtype, device="cpu"), 0
        for gradient in gradients:  # one at a time: flattened on the device they would be there twice
            flat[begins : begins + gradient.numel()] = gradient.flatten()
            begins += gradient.numel()
        return flat

    def sub_group_gradients_on_host(index: int) -> None:
        if index in host_groups:
            zero.averaged_gradients[index] = [gradient.to("cpu") for gradient in zero.averaged_gradients[index]]
        optimizer_class._prepare_fp32_grad_for_sub_group(zero, index)

    def unscale_where_gradients_are(index_or_gradients: Any, total_norm: torch.Tensor | None) -> None:
        gradient = stage.masters(zero)[index_or_gradients].grad if stage.is_stage_3 else index_or_gradients[0]
        unscale(index_or_gradients, None if total_norm is None else total_norm.to(gradient.device))

    if stage.is_stage_3:
        return {
            "_prepare_fp32_grad_for_sub_group": sub_group_gradients_on_host,
            "unscale_and_clip_grads": unscale_where_gradients_are,
        }
    return {
        "_get_preflattened_grad_partition": gradients_on_host,
        "unscale_and_clip_grads": unscale_where_gradients_are,
    }
