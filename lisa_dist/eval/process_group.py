"""The ranks of an evaluation: how they meet, and how an error of one ends them all."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist

from lisa_dist.distributed.collectives import raise_shared
from lisa_dist.distributed.ranks import set_rank
from lisa_dist.errors import UserError

# A rank with short items waits for the others; the launcher ends it if one of them dies.
_TIMEOUT = timedelta(days=7)
_T = TypeVar("_T")


def join_ranks() -> tuple[torch.device, bool]:
    """Start the process group, if there are several ranks; returns this rank's device and whether it was started."""
    set_rank()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    starts = int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized()
    if starts:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=_TIMEOUT)
    return device, starts


def leave_ranks() -> None:
    """Wait for all ranks, then end the process group: ranks that just exit break the others' gloo connections."""
    dist.barrier()
    dist.destroy_process_group()


def on_all_ranks(function: Callable[[], _T]) -> _T:
    """Call `function` on every rank. A UserError on any rank is raised on all, as SharedError."""
    results: list[_T] = []
    problem = None
    try:
        results.append(function())
    except UserError as error:
        problem = str(error)
    raise_shared(problem)
    return results[0]
