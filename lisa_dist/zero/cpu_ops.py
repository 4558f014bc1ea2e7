"""DeepSpeed on CPU ranks: its C++ ops, built before ranks start, and its shared memory, released."""

import contextlib
import io
import os
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist
from torch.utils.cpp_extension import get_default_build_root

_LONGEST_BUILD = 15 * 60  # seconds; one takes a minute or two


def build_cpu_ops(offload: bool = True) -> None:
    """Compile the C++ ops that DeepSpeed would build at first use, so that ranks do not race to build them.

    `offload` includes the AdamW of offloaded states, which takes a minute.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder, ShareMemCommBuilder

    forget_cut_builds()
    if get_accelerator().device_name() == "cpu":
        ShareMemCommBuilder().load(verbose=False)
    if offload:
        CPUAdamBuilder().load(verbose=False)


def forget_cut_builds() -> None:
    """Remove the locks of builds that were cut, which torch would wait for without end; of a younger one it is said."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/lock"):
        if time.time() - lock.stat().st_mtime > _LONGEST_BUILD:
            lock.unlink(missing_ok=True)
        else:
            print(f"waiting for another build of it to end; if there is none, remove {lock}", flush=True)


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
