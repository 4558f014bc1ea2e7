"""The device of this rank, its memory and its allocator."""

import os

import torch
from deepspeed.accelerator import get_accelerator

_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def use_own_device() -> None:
    """Make the GPU of this rank the current one, on which new tensors and collectives are.

    `deepspeed.init_distributed` leaves each rank at the first GPU. DeepSpeed's engine takes the rank's own only when it
    is built, which is after LISA's first collective.
    """
    if "LOCAL_RANK" in os.environ:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def use_expandable_segments() -> None:
    """Have torch's CUDA allocator grow its segments, before its first allocation, unless the user has set it.

    A switch frees partitions and allocates others of other sizes, which would leave gaps in segments of fixed sizes.
    """
    if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def gpu_bytes_for_tensors(device: torch.device) -> int:
    """Bytes that this process's tensors may take of a GPU that has run a step.

    All but what it has lost by then: to CUDA's context, NCCL's buffers and other processes, which no plan knows of;
    and a fiftieth, for fragments.
    """
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - total // 50
