"""What ranks must have in common, compared and broadcast: settings, the period, the active set, partitions."""

import hashlib
import json
from collections.abc import Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.core.sampling import ActiveSet


def compare_ranks(value: object, what_differs: str, where: str) -> None:
    """Compare a digest of `value`, which JSON can hold, between all ranks: 8 bytes a rank are gathered.

    Raises RuntimeError on every rank, naming those unlike rank 0. `where` says in which period this rank is.
    """
    if dist.get_world_size() == 1:  # which has nothing to wait for
        return
    digest = int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:7], "big")
    mine = torch.tensor([digest], dtype=torch.int64, device=get_accelerator().current_device_name())
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    digests = torch.cat(every).tolist()  # at once: each look at a device's tensor waits for it
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
