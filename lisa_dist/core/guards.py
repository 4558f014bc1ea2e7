"""Guards of a run: ranks that differ, missed switches, values that are not finite, inactive weights that change."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.core.blocks import Block
from lisa_dist.core.sampling import ActiveSet
from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import SharedError
from lisa_dist.zero.parameters import local_weights
from lisa_dist.zero.partitions import ZeroPartitions


def compare_ranks(value: object, what_differs: str, where: str) -> None:
    """Compare a digest of `value`, as JSON, between all ranks: 8 bytes a rank are gathered.

    Raises RuntimeError on every rank, naming those unlike rank 0. `where` is the period of this rank.
    """
    if dist.get_world_size() == 1:  # which has nothing to wait for
        return
    digest = int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:7], "big")
    mine = torch.tensor([digest], dtype=torch.int64, device=get_accelerator().current_device_name())
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    digests = torch.cat(every).tolist()
    differing = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
    if differing:
        raise RuntimeError(
            f"{where}: ranks {differing} {what_differs} than rank 0 (this is rank {dist.get_rank()}): all ranks need "
            "the same model, the same --lisa_* settings, the same steps and the same package versions."
        )


def broadcast_active_set(
    sampled: ActiveSet, period: int, num_slots: int, block_names: Sequence[str], device: torch.device
) -> ActiveSet:
    """Rank 0's active set of a period, on every rank: 8 (num_slots + 2) bytes.

    `num_slots` is gamma, or the most modules that can train; `block_names` are the outer blocks that may be sampled.
    """
    if dist.get_world_size() == 1:
        return sampled
    block = block_names.index(sampled.blocks[0]) if sampled.blocks else -1
    padding = [-1] * (num_slots - len(sampled.layers))
    message = torch.tensor([period, block, *sampled.layers, *padding], dtype=torch.int64, device=device)
    dist.broadcast(message, src=0)
    sent_period, block, *layers = message.tolist()
    assert sent_period == period
    blocks = (block_names[block],) if block >= 0 else ()
    return ActiveSet(tuple(layer for layer in layers if layer >= 0), blocks)


def guard_switches(partitions: ZeroPartitions, interval_steps: int, current_period: Callable[[], int]) -> None:
    """Refuse to train on with the layers of a period that is over, in the forward pass and in the optimizer's step."""

    def check(*_: object) -> None:
        step = partitions.engine.global_steps
        if step // interval_steps != current_period():
            raise missed_switch(step, interval_steps, current_period())

    def check_forward(module: torch.nn.Module, *_: object) -> None:
        if module.training and torch.is_grad_enabled():
            check()

    partitions.optimizer.register_step_pre_hook(check)
    partitions.before_forward(check_forward)


def missed_switch(step: int, interval_steps: int, period: int) -> RuntimeError:
    """What is wrong at a step that is not of the current period."""
    return RuntimeError(
        f"step {step} is in period {step // interval_steps} (of {interval_steps} steps), but the layers of period "
        f"{period} are still active: call on_step_begin() before every step."
    )


class NonfiniteError(SharedError, RuntimeError):
    """A loss or gradients that are not finite end a run, on all ranks together."""


class NonfiniteGuard:
    """Follows an engine from step to step. DeepSpeed itself skips such a step, so weights stay intact."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, policy: str):
        self._engine, self._policy = engine, policy
        self._skipped_steps = engine.skipped_steps
        self._loss_was_finite = torch.tensor(True, device=engine.device)

    def note_loss(self, loss: torch.Tensor) -> None:
        """Remember on this rank whether the loss of a micro-batch was finite, for `check` to name the rank."""
        self._loss_was_finite &= torch.isfinite(loss.detach()).all()

    def check(self, where: str) -> None:
        """Raise NonfiniteError, on every rank, when the last step was left out and the policy is stop.

        `where` is the period of the run. In fp16 leaving steps out is the loss scaler's work.
        """
        skipped = self._engine.skipped_steps
        was_skipped, self._skipped_steps = skipped > self._skipped_steps, skipped
        finite, self._loss_was_finite = self._loss_was_finite, torch.ones_like(self._loss_was_finite)
        if not was_skipped or self._engine.fp16_enabled():
            return
        ranks = [rank for rank, was_finite in enumerate(gather(bool(finite))) if not was_finite]
        what = f"the loss of rank(s) {ranks} is not finite" if ranks else "the gradients are not finite"
        message = f"step {self._engine.global_steps}, {where}: {what}; no weight was changed"
        if self._policy == "stop":
            raise NonfiniteError(
                f"{message}. Lower the learning rate, look at the data, or give --lisa_nonfinite skip."
            )
        if dist.get_rank() == 0:
            print(f"lisa-dist: {message}, the step was skipped.", flush=True)

    def resume(self) -> None:
        """Do not count steps that the saved run skipped."""
        self._skipped_steps = self._engine.skipped_steps


class InactiveWeights:
    """Remembers digests of inactive weights, as this rank holds them, from one switch to the next; or does nothing."""

    def __init__(self, partitions: ZeroPartitions, enabled: bool):
        self._partitions, self._enabled = partitions, enabled
        self._digests: dict[str, str] = {}
        self._parameters: dict[str, torch.nn.Parameter] = {}

    def remember(self, blocks: Iterable[Block]) -> None:
        """Take the digests of these inactive blocks, and compare them between ranks that each hold all weights."""
        if not self._enabled:
            return
        self._parameters = {name: value for block in blocks for name, value in block.parameters.items()}
        self._digests = {name: self._digest(value) for name, value in self._parameters.items()}
        if self._partitions.weights_are_sharded:
            return
        every = gather(self._digests)
        differing = [rank for rank, digests in enumerate(every) if digests != every[0]]
        if differing:
            raise RuntimeError(f"inactive weights of ranks {differing} differ from rank 0's")

    def check(self, period: int) -> None:
        """Raise RuntimeError naming every inactive parameter that changed since `remember`."""
        changed = [name for name, value in self._parameters.items() if self._digest(value) != self._digests[name]]
        if changed:
            raise RuntimeError(f"weights that were inactive in period {period} have changed: {', '.join(changed)}")

    def _digest(self, parameter: torch.nn.Parameter) -> str:
        local = local_weights(parameter).detach().contiguous().view(-1).view(torch.uint8)
        return hashlib.sha256(local.cpu().numpy().tobytes()).hexdigest()
