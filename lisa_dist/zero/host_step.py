"""The optimizer step of groups whose masters and moments are on the host (--lisa_offload).

As the first group of a step asks for its gradients, those of all groups on the host set out, into pinned memory and on
a stream of their own: while the host steps one group, the gradients of the next arrive. New weights go back by pinned
memory too, cast on the host; the device has them before whatever it computes next, and nobody waits.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from lisa_dist.optim.states import CopyStream
from lisa_dist.zero.stages import Stage


class GradientsToHost:
    """The gradients of the groups `groups` of one step on their way to the host, each group's as one flat tensor."""

    def __init__(self, zero: Any, stage: Stage, groups: frozenset[int], copies: CopyStream):
        self._zero, self._stage, self._groups, self._copies = zero, stage, groups, copies
        self._sent: dict[int, tuple[torch.Tensor, Callable[[], None]]] = {}

    def send(self, index: int) -> None:
        """Send what is there: of all groups where copies overlap, of group `index` where they would be in order."""
        for group in self._groups if self._copies.overlaps else self._groups & {index}:
            gradients = self._zero.averaged_gradients[group]
            if gradients is not None and group not in self._sent:
                self._sent[group] = self._queue(group, gradients)

    def take(self, index: int) -> torch.Tensor:
        """A group's gradients, in the dtype of the weights and padded as its partition is, once they have arrived."""
        flat, wait = self._sent.pop(index)
        wait()
        return flat

    def _queue(self, index: int, gradients: list[torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        if not self._stage.is_stage_3:
            flattened = type(self._zero)._get_preflattened_grad_partition(self._zero, index)
            gradients = gradients if flattened is None else [flattened]
        numel, dtype = self._stage.masters(self._zero)[index].numel(), gradients[0].dtype
        flat, begin = torch.empty(numel, dtype=dtype, pin_memory=self._copies.overlaps), 0
        with self._copies.after_compute():
            for gradient in gradients:
                flat[begin : begin + gradient.numel()].copy_(gradient.view(-1), non_blocking=True)
                self._copies.hold(gradient)
                begin += gradient.numel()
        flat[begin:] = 0  # padding
        return flat, self._copies.mark()


def send_weights(master: torch.Tensor, weights: torch.Tensor) -> None:
    """Copy a master on the host to the weights; where those are on a device, the host does not wait."""
    if weights.device.type != "cpu":
        master = torch.empty_like(weights, device="cpu", pin_memory=True).copy_(master)
    weights.copy_(master, non_blocking=True)


class WeightsOfStep(list):
    """Weights by group and rank, of which DeepSpeed's step does not copy the master over those written otherwise.

    DeepSpeed's step reads the entry of a group right after the optimizer has stepped it, copies the master there, and
    reads it again for the all-gather. There is no method in between that could be replaced. So the next read of a group
    in `writers` calls its function, which writes the weights if they are not written yet, and returns meta tensors:
    copying to them does nothing.
    """

    def __init__(self, entries: list):
        super().__init__(entries)
        self.writers: dict[int, Callable[[], None]] = {}

    def __getitem__(self, index: Any) -> Any:
        entry = super().__getitem__(index)
        if index not in self.writers:
            return entry
        self.writers.pop(index)()
        return [torch.empty_like(weights, device="meta") for weights in entry]


def host_step(zero: Any, stage: Stage, host_groups: frozenset[int], copies: CopyStream) -> dict[str, Any]:
    """Have the groups `host_groups`, whose masters and moments are on the host, step there.

    The norm has been taken on the device by then. The rest follows from where the master is: AdamW runs on the host.
    """
    optimizer_class = type(zero)
    to_host = GradientsToHost(zero, stage, host_groups, copies)

    def write(index: int) -> None:
        send_weights(stage.masters(zero)[index].detach(), stage.flat_weights(zero, index))

    def gradients_on_host(index: int) -> torch.Tensor | None:
        to_host.send(index)
        if index not in host_groups:
            return optimizer_class._get_preflattened_grad_partition(zero, index)
        zero.parallel_partitioned_bit16_groups.writers[index] = functools.partial(write, index)
        return to_host.take(index)

    def sub_group_gradients_on_host(index: int) -> None:
        to_host.send(index)
        if index in host_groups:
            zero.averaged_gradients[index] = [to_host.take(index)]
        optimizer_class._prepare_fp32_grad_for_sub_group(zero, index)

    def write_sub_group(index: int) -> None:
        if index in host_groups and zero.fp16_partitioned_groups_flat[index] is not None:
            write(index)
        else:
            optimizer_class._reassign_or_swap_out_partitioned_parameters(zero, index)

    if stage.is_stage_3:
        return {
            "_prepare_fp32_grad_for_sub_group": sub_group_gradients_on_host,
            "_reassign_or_swap_out_partitioned_parameters": write_sub_group,
        }
    return {
        "_get_preflattened_grad_partition": gradients_on_host,
        "parallel_partitioned_bit16_groups": WeightsOfStep(zero.parallel_partitioned_bit16_groups),
    }
