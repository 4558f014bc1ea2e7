"""A short warm-up of the learning rate for blocks that are activated with fresh moments.

AdamW's first steps are its largest: with the moments of one gradient every element moves by the whole learning rate.
At the start of a run the schedule's warm-up is for that; a block that is activated later meets the full rate.
"""

from collections.abc import Callable, Iterable

import torch


class ActivationWarmup:
    """Has the groups of activated blocks step with a share of their learning rate, rising over `steps` to all of it.

    In the n-th step since the switch, counted from 1, it is n / (steps + 1). The schedule and the trackers keep the
    group's own rate: it is changed for the optimizer's step alone. `steps_taken()` counts steps since the switch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, steps_taken: Callable[[], int]):
        self.groups: frozenset[str] = frozenset()  # names of parameter groups (lisa_group)
        self._steps, self._steps_taken = steps, steps_taken
        self._rates: list[tuple[dict, float | torch.Tensor]] = []
        optimizer.register_step_pre_hook(self._lower)
        optimizer.register_step_post_hook(self._restore)

    def begin(self, groups: Iterable[str]) -> None:
        """A switch has given these groups fresh moments; the others go on as they were."""
        self.groups = frozenset(groups)

    def _lower(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        share = (self._steps_taken() + 1) / (self._steps + 1)
        if share >= 1:
            return
        for group in optimizer.param_groups:
            if group["lisa_group"] in self.groups:
                self._rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * share

    def _restore(self, *_: object) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []
