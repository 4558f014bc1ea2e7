"""Ranks that a script calls as one: processes in a group of their own.

Several groups live side by side, and one that is not called takes no time: so what is compared can take turns, each
in processes that know nothing of the others. They are forked from one process that has imported torch and DeepSpeed for
all of them, and that has not touched a GPU, which would not survive it.
"""

import logging
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from multiprocessing.connection import Connection, wait

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not start it
if PathFinder.find_spec("kernels", sys.path[1:]) is None:
    sys.modules["kernels"] = None  # else bitsandbytes takes kernels.py beside this file for the package of that name


# What ranks import, once for all of them; packages alone, since the server does not look beside the script.
PRELOADED = ["deepspeed", "bitsandbytes", "peft", "lisa_dist.core.initialize", "lisa_dist.memory.planner"]


class RankError(RuntimeError):
    """A rank has raised; `kind` is the name of what it raised, and the message has its traceback."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class RankGroup:
    """`make(*args, **kwargs)` on each of `num_ranks` ranks, and calls to what it has made.

    Raises RankError when a rank has raised; the group is of no use then.
    """

    def __init__(self, num_ranks: int, make: Callable, *args, **kwargs):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            here, there = context.Pipe()
            made = (there, rank, num_ranks, port, make, args, kwargs)
            self._processes.append(context.Process(target=_serve, args=made, daemon=True))
            self._processes[-1].start()
            there.close()
            self._pipes.append(here)
        self._receive()

    def call(self, name: str, *args, **kwargs) -> list:
        """Call a method on every rank at once; what each rank gives back."""
        for pipe in self._pipes:
            pipe.send((name, args, kwargs))
        return self._receive()

    def _receive(self) -> list:
        replies, waiting = {}, {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            # The first that speaks first: when a rank fails the others fail of it, or wait for it.
            for pipe in wait(list(waiting)):
                rank = waiting.pop(pipe)
                try:
                    failed, replies[rank] = pipe.recv()
                except EOFError as error:
                    self.close()
                    raise RankError("died", f"rank {rank} has died") from error
                if failed:
                    self.close()
                    raise RankError(failed, f"rank {rank}: {replies[rank]}")
        return [replies[rank] for rank in range(len(replies))]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _serve(pipe: Connection, rank: int, num_ranks: int, port: int, make: Callable, args: tuple, kwargs: dict) -> None:
    """One rank: make, then do as told until the script ends."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    try:
        import deepspeed
        import torch

        from lisa_dist.zero.cpu_ops import release_shared_memory

        torch.set_num_threads(1)  # a rank is to have one core
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        thing = make(*args, **kwargs)
        torch.distributed.barrier()  # when all have come past DeepSpeed's start, where they open each other's memory
        release_shared_memory()  # of which a rank that is killed would leave 66 MB
        pipe.send((None, None))
        while True:
            name, args, kwargs = pipe.recv()
            pipe.send((None, getattr(thing, name)(*args, **kwargs)))
    except (EOFError, BrokenPipeError):
        return  # the script has ended
    except Exception as error:  # noqa: BLE001 - it is the script's to say
        pipe.send((type(error).__name__, traceback.format_exc()))
