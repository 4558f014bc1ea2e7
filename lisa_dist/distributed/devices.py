"""The device of this rank, its memory and its allocator; and why it can be none."""

import os
import re

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.distributed.allocator import use_expandable_segments
from lisa_dist.errors import UserError


def prepare_device() -> None:
    """Have the allocator grow its segments; of several ranks, make this one's GPU current, on which new tensors are.

    `deepspeed.init_distributed` leaves each rank at the first GPU. DeepSpeed's engine takes the rank's own only when it
    is built, which is after LISA's first collective.
    """
    check_accelerator()
    use_expandable_segments()
    if dist.is_initialized() and "LOCAL_RANK" in os.environ:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def free_gpu_bytes(device: int | torch.device | None = None) -> int:
    """Bytes that this process can still allocate on a GPU: what is free there, and what torch has cached."""
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved - allocated


def check_accelerator() -> None:
    """Raise UserError where DeepSpeed would train on what is neither a GPU of CUDA or ROCm nor a CPU."""
    name = get_accelerator().device_name()
    if name not in ("cpu", "cuda"):
        raise UserError(
            f"DeepSpeed has found an accelerator of the kind {name} here, and training is on GPUs, by CUDA or ROCm, or "
            "on CPUs: export DS_ACCELERATOR=cpu."
        )


def gpu_bytes_for_tensors(device: torch.device) -> int:
    """Bytes that this process's tensors may take of a GPU that has run a step.

    All but what it has lost by then: to CUDA's context, NCCL's buffers and other processes, which no plan knows of;
    and a fiftieth, for fragments.
    """
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - total // 50


def why_no_gpu() -> str:
    """Why torch cannot begin CUDA though this host has GPUs, in one line; nothing where it can, or need not.

    With a driver that is older than its CUDA, torch warns once and then says that there is no GPU: a run would train on
    CPUs. What begins CUDA raises, with the reason.
    """
    unwanted = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu"
    only_counted = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") == "1"  # then torch asks no more than that
    if unwanted or torch.version.cuda is None or (torch.cuda.is_available() and not only_counted):
        return ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        said = str(error).splitlines()[0]
    else:
        return ""
    if old := re.search(r"driver on your system is too old \(found version (\d+)\)", said):
        newest = f"{int(old[1]) // 1000}.{int(old[1]) % 1000 // 10}"
        return (
            f"the NVIDIA driver is for CUDA {newest} at most, and torch {torch.__version__} has CUDA "
            f"{torch.version.cuda}: update the driver, or install a torch for that CUDA (pytorch.org)"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible.startswith(("GPU-", "MIG-")) and "No CUDA GPUs are available" in said:  # asked for, where 0 may be habit
        return f"CUDA_VISIBLE_DEVICES={visible}: this host has no such GPU, nvidia-smi -L lists those that it has"
    # NVML's count of GPUs; a scheduler may have given none of them to this job.
    if torch.cuda.device_count() > 0 and "No CUDA GPUs are available" not in said:
        return f"torch cannot use the GPUs of this host ({said}): see that nvidia-smi and their driver work"
    return ""
