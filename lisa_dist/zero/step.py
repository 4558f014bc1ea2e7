"""The optimizer step of one group, inside DeepSpeed's step: by LisaAdamW in one pass, or on the host (--lisa_offload).

DeepSpeed's step takes the norm of all gradients and then, group by group, on each rank::

    gradients   flattened into one tensor          LisaAdamW: as they are              on the host: sent there
                cast to fp32                       not cast                            cast there
    scale       unscaled and clipped in place      one number, given to the kernel     unscaled there
    optimizer   AdamW over the master              the kernel writes moments, master   AdamW on the host
                                                   and weights in one pass
    weights     master copied to the weights       skipped                             cast, and sent to the device

Source of the order: `DeepSpeedZeroOptimizer.step`, `DeepSpeedZeroOptimizer_Stage3.step`.

As the first group of a step asks for its gradients, those of all groups on the host set out, into pinned memory and on
a stream of their own: while the host steps one group, the gradients of the next arrive. New weights go back by pinned
memory too, cast on the host; the device has them before whatever it computes next, and nobody waits.
"""

import functools
from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from lisa_dist.optim.adamw import LisaAdamW, PartitionStep
from lisa_dist.optim.states import CopyStream
from lisa_dist.zero.layout import GroupLayouts
from lisa_dist.zero.stages import STAGE_1_2, Stage


class GroupSteps:
    """What DeepSpeed's step asks of each group, where LisaAdamW or the host steps it."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, stage: Stage, layouts: GroupLayouts, copies: CopyStream):
        self._engine, self._zero, self._stage, self._layouts = engine, engine.optimizer, stage, layouts
        self._in_one_pass = isinstance(self._zero.optimizer, LisaAdamW)
        self._on_host = host_groups(self._zero)
        if self._in_one_pass:  # which takes gradients as they are where the host is the device
            masters, weights = stage.masters(self._zero), functools.partial(stage.flat_weights, self._zero)
            self._on_host = frozenset(one for one in self._on_host if masters[one].device != weights(one).device)
        self._copies = copies
        self._sent: dict[int, tuple[torch.Tensor, Callable[[], None]]] = {}  # gradients on their way to the host
        self._weights: WeightsOfStep | None = None
        self._prepared: list[PartitionStep] = []  # of the group that is about to step, between gradients and scale

    def replacements(self) -> dict[str, Any]:
        """By DeepSpeed's name, what takes its place; nothing where its own step does."""
        if not (self._in_one_pass or self._on_host):
            return {}
        scale = {"unscale_and_clip_grads": self.set_gradient_scale} if self._in_one_pass else {}
        if self._stage.is_stage_3:
            return scale | {
                "_prepare_fp32_grad_for_sub_group": self.prepare_sub_group,
                "_reassign_or_swap_out_partitioned_parameters": self.write_sub_group,
            }
        self._weights = WeightsOfStep(self._zero.parallel_partitioned_bit16_groups)
        return scale | {
            "_get_preflattened_grad_partition": self.gradient_of_group,
            "parallel_partitioned_bit16_groups": self._weights,
        }

    def gradient_of_group(self, index: int) -> torch.Tensor | None:
        """Stages 1 and 2: the gradient of a partition; None has DeepSpeed flatten what is in `averaged_gradients`."""
        assert self._weights is not None
        gradients = self._gradients(index)
        if self._in_one_pass or index in self._on_host:
            self._weights.writers[index] = functools.partial(self._write, index)
        if self._in_one_pass:
            return self._prepare(index, gradients)
        return gradients[0] if index in self._on_host else self._flattened(index)

    def prepare_sub_group(self, index: int) -> None:
        """Stage 3: give the master its gradient."""
        gradients = self._gradients(index)
        if self._in_one_pass:
            self._stage.masters(self._zero)[index].grad = self._prepare(index, gradients)
            self._zero.averaged_gradients[index] = None
        else:
            self._zero.averaged_gradients[index] = gradients
            type(self._zero)._prepare_fp32_grad_for_sub_group(self._zero, index)

    def write_sub_group(self, index: int) -> None:
        """Stage 3: the new weights; partitions of parameters are views of them."""
        if self._in_one_pass or index in self._on_host:
            self._write(index)
        else:
            type(self._zero)._reassign_or_swap_out_partitioned_parameters(self._zero, index)

    def set_gradient_scale(self, index_or_gradients: Any, total_norm: torch.Tensor | None) -> None:
        """Give LisaAdamW the factor in the place of gradients that are multiplied."""
        step = self._prepared.pop()  # it holds gradients, which are to be freed after the step
        step.gradient_scale = gradient_scale(self._zero, total_norm, step.gradients[0].device)

    def _gradients(self, index: int) -> list[Any]:
        """A group's, where it steps. Those for the host set out at once where copies overlap, else one by one."""
        for group in self._on_host if self._copies.overlaps else self._on_host & {index}:
            if self._zero.averaged_gradients[group] is not None and group not in self._sent:
                self._sent[group] = self._send(group)
        if index not in self._on_host:
            return self._as_they_are(index)
        flat, wait = self._sent.pop(index)
        wait()
        return [flat]

    def _as_they_are(self, index: int) -> list[Any]:
        flat = None if self._stage.is_stage_3 else self._flattened(index)
        return self._zero.averaged_gradients[index] if flat is None else [flat]

    def _flattened(self, index: int) -> torch.Tensor | None:
        """Stages 1 and 2: the gradients of a group where DeepSpeed has them in one buffer, as under accumulation."""
        buffer: torch.Tensor | None = type(self._zero)._get_preflattened_grad_partition(self._zero, index)
        return buffer

    def _send(self, index: int) -> tuple[torch.Tensor, Callable[[], None]]:
        """A group's gradients on the host, flat, in their dtype and padded as its partition is, and what waits."""
        gradients = self._as_they_are(index)
        numel, dtype = self._stage.masters(self._zero)[index].numel(), gradients[0].dtype
        flat, begin = torch.empty(numel, dtype=dtype, pin_memory=self._copies.overlaps), 0
        with self._copies.after_compute():
            for gradient in gradients:
                flat[begin : begin + gradient.numel()].copy_(gradient.view(-1), non_blocking=True)
                self._copies.hold(gradient)
                begin += gradient.numel()
        flat[begin:] = 0  # padding
        return flat, self._copies.mark()

    def _prepare(self, index: int, gradients: list[Any]) -> torch.Tensor:
        """Have LisaAdamW step a group with these; DeepSpeed is given a single zero, spread over the partition."""
        master, weights = self._stage.masters(self._zero)[index], self._stage.flat_weights(self._zero, index)
        writes_weights = index not in self._on_host and master.data_ptr() != weights.data_ptr()
        step = PartitionStep(
            self._layouts.pieces[index],
            gradients,
            weights if writes_weights else None,
            draw=self._engine.global_steps,
            matrices=self._layouts.matrices[index],
            add_up=functools.partial(torch.distributed.all_reduce, group=self._zero.dp_process_group),
        )
        self._prepared.append(step)
        self._zero.optimizer.prepare(master, step)
        return master.new_zeros(1).expand(master.numel())

    def _write(self, index: int) -> None:
        """Send new weights to the device, where the host does not wait; others LisaAdamW's kernel has written."""
        if index not in self._on_host:
            return
        master, weights = self._stage.masters(self._zero)[index].detach(), self._stage.flat_weights(self._zero, index)
        if weights.device.type != "cpu":
            master = torch.empty_like(weights, device="cpu", pin_memory=True).copy_(master)
        weights.copy_(master, non_blocking=True)


def host_groups(zero: Any) -> frozenset[int]:
    """The parameter groups whose states are on the host (--lisa_offload)."""
    return frozenset(index for index, group in enumerate(zero.optimizer.param_groups) if group.get("lisa_host"))


def gradient_scale(zero: Any, total_norm: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The factor of the gradients, fp32 of shape [1], for clipping and the loss scale, as DeepSpeed computes it.

    `total_norm`, on the host, is the norm of all gradients, times the loss scale; it is needed where they are clipped.
    Stage 3's own multiplies what it finds at the master; that of stages 1 and 2 has the same formula.
    """
    scale = torch.ones(1, device=device)
    STAGE_1_2.optimizer_class.unscale_and_clip_grads(zero, [scale], total_norm)
    return scale


class WeightsOfStep(list[list[torch.Tensor]]):
    """Weights by group and rank, of which DeepSpeed's step does not copy the master over those written otherwise.

    DeepSpeed's step reads the entry of a group right after the optimizer has stepped it, copies the master there, and
    reads it again for the all-gather. There is no method in between that could be replaced. So the next read of a group
    in `writers` calls its function, which writes the weights if they are not written yet, and returns meta tensors:
    copying to them does nothing.
    """

    def __init__(self, entries: list[list[torch.Tensor]]):
        super().__init__(entries)
        self.writers: dict[int, Callable[[], None]] = {}

    def __getitem__(self, index: Any) -> Any:
        entry = super().__getitem__(index)
        if index not in self.writers:
            return entry
        self.writers.pop(index)()
        return [torch.empty_like(weights, device="meta") for weights in entry]
