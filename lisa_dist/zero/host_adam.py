"""DeepSpeed's AdamW on the host, counted so that a resumed run gets the bits of one that was not interrupted."""

from typing import Any

import torch

from lisa_dist.zero.overrides import override


class CountedAdam:
    """DeepSpeed's op for AdamW on the host, recording how it computed the powers of the betas.

    It multiplies them from one step to the next, and calls pow(beta, step) after a jump of the count: the bits differ.
    A resumed run must repeat the same sequence to get the same bits: pow at `start`, then products up to `step`.
    """

    def __init__(self, op: Any):
        self._op = op
        self.start = self.step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    def adam_update(self, opt_id: int, step: int, *args: Any) -> None:
        if step not in (self.step, self.step + 1):
            self.start = step
        self.step = step
        self._op.adam_update(opt_id, step, *args)


def count_host_adam(optimizer: Any) -> None:
    """Have the host's AdamW, if the optimizer is one, record its steps."""
    op = getattr(optimizer, "ds_opt_adam", None)
    if op is not None and not isinstance(op, CountedAdam):
        override(optimizer, "ds_opt_adam", CountedAdam(op))


def host_adam_history(optimizer: torch.optim.Optimizer) -> list[int] | None:
    """Where the host's AdamW took a power of the betas and where it has come to since; None for other optimizers."""
    op = getattr(optimizer, "ds_opt_adam", None)
    return [op.start, op.step] if isinstance(op, CountedAdam) else None


def replay_host_adam(optimizer: Any, history: list[int] | None) -> None:
    """Bring the host's AdamW, if it is one, to the powers of the betas that a saved run had; moves no weight."""
    op = getattr(optimizer, "ds_opt_adam", None)
    if history is None or not isinstance(op, CountedAdam):
        return
    start, step = history
    betas = optimizer.param_groups[0]["betas"]
    other = tuple(beta / 2 for beta in betas)  # betas that change make it take the power anew
    for count, used in [(start, other), *((count, betas) for count in range(start, step + 1))]:
        nothing = [torch.zeros(1) for _ in range(4)]
        op.adam_update(optimizer.opt_id, count, 0.0, *used, 1.0, 0.0, False, *nothing)
    op.start = start
