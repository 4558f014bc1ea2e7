"""Ranks that a script calls as one: processes in a group of their own.

Several groups live side by side, and one that is not called takes no time. They are forked from one process that has
imported torch and DeepSpeed for all of them, and that has not touched a GPU: CUDA does not survive a fork.
"""

import logging
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not start it

ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ON_CPU |= {"LISA_DIST_KERNELS": "torch", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # with ninja
# What ranks import, once for all of them. The import of bitsandbytes, which the planner needs, initialises CUDA.
PRELOADED = ["torch", "deepspeed", "transformers.models.llama.modeling_llama", "lisa_dist.core.initialize"]
PRELOADED_ON_CPU = ["peft", "lisa_dist.memory.planner"]


def run_on_cpu() -> None:
    """Start CPU ranks of one thread from now on, on a machine with a GPU too."""
    os.environ |= ON_CPU


class RankError(RuntimeError):
    """A rank has raised; `kind` is the name of the exception's class, the message its traceback."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class RankGroup:
    """`make(*args, **kwargs)` on each of `num_ranks` ranks; raises RankError when one has, and is of no use then."""

    def __init__(self, num_ranks: int, make: Callable, *args, **kwargs):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED + PRELOADED_ON_CPU * (os.environ.get("CUDA_VISIBLE_DEVICES") == ""))
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            here, there = context.Pipe()
            of_rank = (there, rank, num_ranks, port, make, args, kwargs)
            self._processes.append(context.Process(target=_serve, args=of_rank, daemon=True))
            self._processes[-1].start()
            there.close()
            self._pipes.append(here)
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def call(self, name: str, *args, **kwargs) -> list:
        """Call a method on every rank at once; what each rank returns."""
        for pipe in self._pipes:
            pipe.send((name, args, kwargs))
        return self._receive()

    def _receive(self) -> list:
        replies, waiting = {}, {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            # The first reply first: when a rank fails, the others fail because of it, or wait for it.
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


class Caller:
    """A rank that calls functions."""

    def run(self, function: Callable, *args, **kwargs):
        """What the function returns."""
        return function(*args, **kwargs)


def _serve(pipe: Connection, rank: int, num_ranks: int, port: int, make: Callable, args: tuple, kwargs: dict) -> None:
    """One rank: make the object, then call its methods until the script ends."""
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
        from deepspeed.accelerator import get_accelerator
        from transformers.utils.logging import disable_progress_bar

        from lisa_dist.distributed.devices import prepare_device
        from lisa_dist.zero.cpu_ops import release_shared_memory

        disable_progress_bar()
        if get_accelerator().device_name() == "cpu":
            torch.set_num_threads(1)  # a rank is to have one core
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        prepare_device()
        made = make(*args, **kwargs)
        torch.distributed.barrier()  # when all have come past DeepSpeed's start, where they open each other's memory
        release_shared_memory()  # of which a rank that is killed would leave 66 MB
        pipe.send((None, None))
        while True:
            name, args, kwargs = pipe.recv()
            pipe.send((None, getattr(made, name)(*args, **kwargs)))
    except (EOFError, BrokenPipeError):
        return  # the script has ended
    except Exception as error:  # noqa: BLE001 - the script reports it
        pipe.send((type(error).__name__, traceback.format_exc()))
