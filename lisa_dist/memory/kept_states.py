"""Estimate what --lisa_state keep holds on the host, beside the steps that `estimate.py` is about."""

from collections import Counter
from collections.abc import Sequence

import torch

from lisa_dist.config import LisaConfig
from lisa_dist.core.groups import split_by_decay, takes_bits
from lisa_dist.core.selection import most_active
from lisa_dist.memory.state_sizes import group_state_buffers, steps_weights
from lisa_dist.memory.trace import FakeRun
from lisa_dist.memory.workload import Group
from lisa_dist.optim.build import default_state_bits
from lisa_dist.optim.states import pinned_bytes


def kept_states(
    run: FakeRun, config: LisaConfig, stage: int, world_size: int, optim: str, *, pinned: bool = True
) -> int:
    """Host bytes of --lisa_state keep, once every sampled block was active: the states of all that are inactive.

    `pinned`: in the blocks that torch allocates of pinned memory, as beside a GPU.
    """
    if config.lisa_activated_layers == 0:  # nothing is sampled, and nothing becomes inactive
        return 0
    sampled = [(name, run.blocks.outer(name)) for name in config.sampled]
    sampled += [("layers", layer) for layer in run.blocks.layers]
    default, given = default_state_bits(optim), config.state_bits
    # A kept master that is the weights goes to the host in their dtype.
    weights = run.workload.dtype
    master = weights.itemsize if steps_weights(optim, config.lisa_master, weights) else 4

    def buffers_of(name: str, kind: str, params: Sequence[torch.nn.Parameter]) -> list[int]:
        bits = given.get(name, default)
        group = Group(tuple(params), bits if takes_bits(bits, kind) else default)
        return group_state_buffers(group, stage, world_size, optim, master)

    by_block = [
        [nbytes for kind, params in split_by_decay(block).items() for nbytes in buffers_of(name, kind, params)]
        for name, block in sampled
    ]
    active = most_active(config, [layer.numel for layer in run.blocks.layers])
    inactive = sorted(by_block, key=sum)[active:]
    buffers = Counter(nbytes for buffers in inactive for nbytes in buffers if nbytes)
    return sum(pinned_bytes(nbytes, count) if pinned else nbytes * count for nbytes, count in buffers.items())
