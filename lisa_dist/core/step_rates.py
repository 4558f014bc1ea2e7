"""Learning rates of a step that are not the schedule's: a block's own scale, and a warm-up of blocks newly activated.

AdamW's first steps are its largest: with the moments of one gradient every element moves by the whole learning rate.
At the start of a run the schedule's warm-up is for that; a block that is activated later meets the full rate.
"""

from collections.abc import Callable, Iterable, Mapping

import torch


class StepRates:
    """Has parameter groups step with a share of their learning rate.

    That of their block in `scales` (embed, head, rest, layers; --lisa_lr_scale), and of a block activated with fresh
    moments one that rises over `warmup_steps` to all of it: in the n-th step since the switch, counted from 1, it is
    n / (warmup_steps + 1). The schedule and the trackers keep the group's own rate: it is changed for the optimizer's
    step alone. `steps_taken()` counts steps since the switch.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scales: Mapping[str, float],
        warmup_steps: int,
        steps_taken: Callable[[], int],
    ):
        self.warming_up: frozenset[str] = frozenset()  # names of parameter groups (lisa_group)
        self._scales, self._steps, self._steps_taken = scales, warmup_steps, steps_taken
        self._rates: list[tuple[dict, float | torch.Tensor]] = []
        if scales or warmup_steps:
            optimizer.register_step_pre_hook(self._change)
            optimizer.register_step_post_hook(self._restore)

    def begin(self, groups: Iterable[str]) -> None:
        """A switch has given these groups fresh moments; the others go on as they were."""
        self.warming_up = frozenset(groups if self._steps else ())

    def _change(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._restore()  # after a step that has raised
        rising = min(1.0, (self._steps_taken() + 1) / (self._steps + 1))
        for group in optimizer.param_groups:
            name = group["lisa_group"]
            share = rising if name in self.warming_up else 1.0
            block = name.partition("/")[0]
            share *= self._scales.get("layers" if block.startswith("slot") else block, 1.0)
            if share != 1:
                self._rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * share

    def _restore(self, *_: object) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []
