"""Where each master lives: on the device, on the host, or in the weights themselves.

DeepSpeed clones an fp32 master from the weights of every group; LisaAdamW may be without, and have bf16 masters. Of
weights of the masters' dtype the clone would be a second copy of the same numbers: the master becomes a view of the
weights. The master of a group whose block is in --lisa_offload goes to the host.

All clones are on the device for a moment, at the start and in a switch, when there are no gradients and no activations.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from lisa_dist.zero.stages import Stage


def state_initializer(stage: Stage, original: Callable[[Any], None]) -> Callable[[Any], None]:
    """A replacement for `initialize_optimizer_states`, which DeepSpeed's constructor calls once all masters exist.

    It places the masters. DeepSpeed's own makes a gradient of zeros for every master and drops it, 4 bytes an active
    element, at the start and at every switch; only under optimizer offload the gradients stay, and only Adagrad makes
    its states of them: there DeepSpeed's own runs.
    """

    @functools.wraps(original)
    def place_masters_without_gradients(zero: Any) -> None:
        if stage.offloads_optimizer(zero) or isinstance(zero.optimizer, torch.optim.Adagrad):
            original(zero)
        else:
            place_masters(zero, stage)

    return place_masters_without_gradients


def place_masters(zero: Any, stage: Stage) -> None:
    """Replace each master that belongs on the host, or that the weights can take the place of."""
    masters: list[Any] = stage.masters(zero)
    groups = zero.optimizer.param_groups
    if len(masters) != len(groups):  # stage 3 has cut groups into sub-groups, which LISA refuses later
        return
    for index, (group, master) in enumerate(zip(groups, masters, strict=True)):
        if group.get("lisa_host"):
            placed: Any = master.detach().to("cpu", copy=True)
        elif _same_kind(master, stage.flat_weights(zero, index)):
            placed = stage.flat_weights(zero, index).detach()
        else:
            continue
        placed.requires_grad = master.requires_grad
        if stage.is_stage_3:
            placed.ds_id = master.ds_id
        masters[index] = placed
        if any(parameter is master for parameter in group["params"]):  # stage 3 fills groups only while they step
            group["params"] = [placed]


def _same_kind(master: torch.Tensor, weights: torch.Tensor) -> bool:
    return (master.dtype, master.device) == (weights.dtype, weights.device)
