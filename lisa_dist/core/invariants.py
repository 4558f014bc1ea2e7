"""What `--lisa_debug` checks at every switch: nothing that sleeps has moved, and ranks hold the same weights."""

import hashlib
from collections.abc import Iterable

import torch
from torch import distributed as dist

from lisa_dist.core.blocks import Block
from lisa_dist.zero.partitions import ZeroPartitions


class SleepingWeights:
    """Remembers digests of sleeping weights, as this rank holds them, from one switch to the next."""

    def __init__(self, partitions: ZeroPartitions):
        self._partitions = partitions
        self._digests: dict[str, str] = {}
        self._parameters: dict[str, torch.nn.Parameter] = {}

    def remember(self, blocks: Iterable[Block]) -> None:
        """Take the digests of these sleeping blocks, and compare them between ranks that each hold all weights."""
        self._parameters = {name: value for block in blocks for name, value in block.parameters.items()}
        self._digests = {name: self._digest(value) for name, value in self._parameters.items()}
        if self._partitions.weights_are_sharded:
            return
        every: list[dict[str, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(every, self._digests)
        differing = [rank for rank, digests in enumerate(every) if digests != every[0]]
        if differing:
            raise RuntimeError(f"sleeping weights of ranks {differing} differ from rank 0's")

    def check(self, period: int) -> None:
        """Raise RuntimeError naming every sleeping parameter that changed since `remember`."""
        moved = [name for name, value in self._parameters.items() if self._digest(value) != self._digests[name]]
        if moved:
            raise RuntimeError(f"weights that slept in period {period} have changed: {', '.join(moved)}")

    def _digest(self, parameter: torch.nn.Parameter) -> str:
        local = self._partitions.local_weights(parameter).detach().contiguous().view(-1).view(torch.uint8)
        return hashlib.sha256(local.cpu().numpy().tobytes()).hexdigest()
