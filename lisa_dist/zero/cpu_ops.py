"""DeepSpeed on CPU ranks: its C++ ops, built before ranks start, and its shared memory, released."""

import contextlib
import io
import os
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist


def build_cpu_ops(offload: bool = True) -> None:
    """Compile the C++ ops that DeepSpeed would build at first use, so that ranks do not race to build them.

    `offload` includes the AdamW of offloaded states, which takes a minute.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder, ShareMemCommBuilder

    if get_accelerator().device_name() == "cpu":
        ShareMemCommBuilder().load(verbose=False)
    if offload:
        CPUAdamBuilder().load(verbose=False)


def start_deepspeed() -> None:
    """Have DeepSpeed know of the process group, and leave no name of its shared memory; every rank calls it.

    Between making its buffer and removing the name a rank waits for no other: whenever it is killed, none stays.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and builder.is_compatible(verbose=False):
        builder.load(verbose=False)  # which may take a rank longer than the others
    dist.barrier()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has built an operator
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    dist.barrier()
    release_shared_memory()


def release_shared_memory() -> None:
    """Remove the name of this rank's buffer for DeepSpeed's all-reduce on CPU, or 69 MB stay in /dev/shm.

    The memory itself stays for as long as a rank uses it. Call it when all ranks have come past DeepSpeed's start,
    where they open each other's.
    """
    if get_accelerator().device_name() != "cpu" or "MASTER_PORT" not in os.environ:
        return
    run = f"{os.getuid()}_{os.environ.get('MASTER_ADDR', '')}_{os.environ['MASTER_PORT']}"
    rank = torch.distributed.get_rank()
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{run}_{rank}").unlink(missing_ok=True)
