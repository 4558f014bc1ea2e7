"""Bytes of a partition's master and moments, as each optimizer has them."""

import math

import torch

from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.optim.moments import QUANTIZED_BLOCK

_SMALLEST_QUANTIZED = 4096  # elements of a partition that bitsandbytes quantizes


def steps_weights(optim: str, master: str, weights: torch.dtype) -> bool:
    """Whether the optimizer steps the weights themselves, on the device, without a separate master."""
    return weights == torch.float32 or (optim == LISA_ADAMW and master != "fp32")


def state_bytes(partition: int, bits: int, optim: str, master: int = 4) -> int:
    """Bytes of the master (`master` bytes an element) and the two moments of a partition of so many elements."""
    return sum(state_buffers(partition, bits, optim, master))


def state_buffers(partition: int, bits: int, optim: str, master: int = 4) -> list[int]:
    """The same by tensor: the master, and of each moment its values, or its codes, scales and bitsandbytes' table."""
    scales = math.ceil(partition / QUANTIZED_BLOCK) * 4
    if bits == 8 and optim == LISA_ADAMW:
        return [partition * master, *2 * (partition, scales)]
    if bits == 8 and partition >= _SMALLEST_QUANTIZED:
        return [partition * master, *2 * (partition, scales, 256 * 4)]
    return [partition * master, *2 * (partition * 4,)]
