"""Bytes of masters and moments: of a partition, as each optimizer has them, and of those that are kept on the host."""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import FACTORED, StateBits
from lisa_dist.core.selection import most_active, split_by_decay
from lisa_dist.memory.trace import FakeRun
from lisa_dist.memory.workload import Group
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.optim.factored import places
from lisa_dist.optim.moments import QUANTIZED_BLOCK
from lisa_dist.optim.states import pinned_bytes
from lisa_dist.zero.layout import partition_numel, pieces_of_group

_SMALLEST_QUANTIZED = 4096  # elements of a partition that bitsandbytes quantizes


def steps_weights(optim: str, master: str, weights: torch.dtype) -> bool:
    """Whether the optimizer steps the weights themselves, on the device, without a separate master."""
    return weights == torch.float32 or (optim == LISA_ADAMW and master != "fp32")


def group_state_bytes(
    group: Group, stage: int, world_size: int, optim: str, master: int = 4, ranks: Sequence[int] = (0,)
) -> int:
    """Bytes of the master (`master` bytes an element) and the moments of a group's partition, of the largest."""
    return max(sum(group_state_buffers(group, stage, world_size, optim, master, rank)) for rank in ranks)


def group_state_buffers(
    group: Group, stage: int, world_size: int, optim: str, master: int = 4, rank: int = 0
) -> list[int]:
    """The same by tensor: the master, and of each moment its values, or its codes, scales and bitsandbytes' table."""
    partition = partition_numel(group.numels, stage, world_size)
    if group.bits == FACTORED:
        return [partition * master, *(4 * numel for numel in _factored_numels(group, stage, rank, world_size))]
    return state_buffers(partition, group.bits, optim, master)


def state_buffers(partition: int, bits: StateBits, optim: str, master: int = 4) -> list[int]:
    """The same of any partition of so many elements whose moments are not factored."""
    scales = math.ceil(partition / QUANTIZED_BLOCK) * 4
    if bits == 8 and optim == LISA_ADAMW:
        return [partition * master, *2 * (partition, scales)]
    if bits == 8 and partition >= _SMALLEST_QUANTIZED:
        return [partition * master, *2 * (partition, scales, 256 * 4)]
    return [partition * master, *2 * (partition * 4,)]


def _factored_numels(group: Group, stage: int, rank: int, world_size: int) -> list[int]:
    """Numbers of rows, of columns and of matrices that a rank keeps."""
    pieces = pieces_of_group(group.named_numels, stage, rank, world_size)
    here = places([group.widths[int(piece.name)] for piece in pieces], pieces)
    return [here[-1].rows.stop, here[-1].columns.stop, len(here)] if here else []


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
    # A kept master that is the weights goes to the host in their dtype.
    weights = run.workload.dtype
    master = weights.itemsize if steps_weights(optim, config.lisa_master, weights) else 4

    def buffers_of(name: str, kind: str, params: Sequence[torch.nn.Parameter]) -> list[int]:
        group = Group(tuple(params), run.bits(name, kind, optim, config.state_bits))
        return group_state_buffers(group, stage, world_size, optim, master)

    by_block = [
        [nbytes for kind, params in split_by_decay(block).items() for nbytes in buffers_of(name, kind, params)]
        for name, block in sampled
    ]
    active = most_active(config, [layer.numel for layer in run.blocks.layers])
    inactive = sorted(by_block, key=sum)[active:]
    buffers = Counter(nbytes for buffers in inactive for nbytes in buffers if nbytes)
    return sum(pinned_bytes(nbytes, count) if pinned else nbytes * count for nbytes, count in buffers.items())
