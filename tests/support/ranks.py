"""Run a function on several CPU ranks, as DeepSpeed on gloo sees them.

Ranks are spawned once for each world size and serve all tests, since importing torch and DeepSpeed takes longer than
most tests. A rank that raises fails the test with the traceback of every rank; a rank that hangs is killed.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

# What ranks import, once for all of them; nothing of it starts threads. The last one has the others set aside.
PRELOADED = ["deepspeed", "bitsandbytes", "trl.trainer.sft_trainer", "lisa_dist.commands.train"]
PRELOADED += ["lisa_dist.report.html", "tensorboard", "torch.utils.tensorboard", "set_aside"]

# Seconds after which what a test waits for has hung: many times what it takes on a machine that has other work.
PATIENCE = 900

# Variables by which a process is a rank.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")

# How processes begin that need not import anything again; tests/mutants.py forks them where all is imported already.
START_METHOD = "forkserver"

_pools: dict[tuple[int, bool], "_Pool"] = {}


class RankError(AssertionError):
    """At least one rank raised, died or hung."""


def run_ranks(function: Callable, world_size: int, *args, timeout: float = PATIENCE, interpret: bool = False) -> list:
    """Call the top-level `function(*args)` on every rank and return what each returned, in rank order.

    `interpret`: on ranks where Triton's kernels run in its interpreter, which must be known before Triton is imported.
    """
    key = (world_size, interpret)
    pool = _pools.get(key)
    if pool is None:
        pool = _pools[key] = _Pool(world_size, interpret)
    try:
        return pool.run(function, args, timeout)
    except RankError:
        del _pools[key]
        pool.kill()
        raise


def start_script(
    path: Path, words: Sequence[str], output: Path, environment: dict[str, str], folder: Path
) -> BaseProcess:
    """Start a Python script in a process of its own, forked where ranks are: it need not import anything again.

    `folder` is where it runs, `output` takes what it prints. Where imports are tested, a new interpreter is the way.
    """
    arguments = (str(path), list(words), str(output), environment, str(folder))
    process = rank_context().Process(target=_run_script, args=arguments, daemon=True)
    process.start()
    return process


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_ranks() -> None:
    """End all ranks."""
    while _pools:
        _pools.popitem()[1].kill()


class _Pool:
    def __init__(self, world_size: int, interpret: bool):
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn") if interpret else rank_context()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            args = (rank, world_size, str(Path(self._folder.name) / "store"), theirs, interpret)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable, args: tuple, timeout: float) -> list:
        for connection in self._connections:
            connection.send((function, args))
        deadline = time.monotonic() + timeout
        outcomes: dict[int, tuple[str, object]] = {}
        while len(outcomes) < len(self._connections):
            waiting = {self._connections[r]: r for r in range(len(self._connections)) if r not in outcomes}
            # After the first failure the others may wait for it in a collective: give them a moment, no more.
            failed = any(kind != "value" for kind, _ in outcomes.values())
            patience = 5.0 if failed else deadline - time.monotonic()
            ready = wait(list(waiting), timeout=max(0.0, patience))
            if not ready:
                outcomes |= dict.fromkeys(waiting.values(), ("hung", "did not finish"))
            for connection in ready:
                try:
                    outcomes[waiting[connection]] = connection.recv()
                except (EOFError, ConnectionResetError):
                    outcomes[waiting[connection]] = ("died", "ended without an answer")
        failures = {rank: outcome for rank, outcome in outcomes.items() if outcome[0] != "value"}
        if failures:
            raise RankError(
                "".join(f"\nrank {rank} {kind}:\n{text}" for rank, (kind, text) in sorted(failures.items()))
            )
        return [outcomes[rank][1] for rank in range(len(outcomes))]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


@contextlib.contextmanager
def without_collection():
    """On a rank: no garbage is collected, so that cycles of live bytes are seen whenever a run would collect them."""
    collect, gc.collect = gc.collect, lambda *_: 0
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect = collect


def rank_context() -> BaseContext:
    """How processes begin that have imported what ranks import."""
    context = multiprocessing.get_context(START_METHOD)
    if START_METHOD == "forkserver":
        forkserver.set_forkserver_preload(PRELOADED)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent), os.pathsep)  # where it finds the last of them
            forkserver.ensure_running()
    return context


def _stay_on_one_core() -> None:
    """Where each worker of pytest has one core at most, its ranks take turns on it.

    A rank that waits for another lets it run at once then; spread over cores, each collective waits for the scheduler.
    """
    cores = sorted(os.sched_getaffinity(0))
    if 1 < len(cores) <= int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")):
        worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


def _run_script(path: str, words: list[str], output: str, environment: dict[str, str], folder: str) -> None:
    _stay_on_one_core()
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # Where pytest itself is forked it has put others in their place.
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    multiprocessing.current_process().daemon = False  # so that it may have children
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "WITHOUT_REPORT" in environment:
        from lisa_dist.report import html

        html.write_report = lambda folder: Path(folder) / html.REPORT_NAME
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def _serve(rank: int, world_size: int, store: str, connection: Connection, interpret: bool) -> None:
    _stay_on_one_core()
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    # The store is a file, but DeepSpeed names shared memory by the port.
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=Path(store).parent.name)
    import cpuinfo
    import deepspeed
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    deepspeed.init_distributed("gloo")
    torch.distributed.barrier()
    # DeepSpeed asks for the CPU's vendor with every CPU optimizer, and the answer comes from a new process each time.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    gc.get_freeze_count = lambda: 1  # as in set_aside.py, where they are not forked
    with as_in_a_run():
        while True:
            # Else collections and counts of live bytes would walk all that was imported, and what tests have left.
            gc.collect()
            gc.freeze()
            try:
                function, args = connection.recv()
            except (EOFError, KeyboardInterrupt):
                return
            try:
                outcome = ("value", function(*args))
            except BaseException:  # noqa: BLE001 - whatever it is, the test must see it
                outcome = ("raised", traceback.format_exc())
            # A Trainer of an earlier test, not collected yet, would have transformers build models under ZeRO-3.
            unset_hf_deepspeed_config()
            connection.send(outcome)


def as_in_a_run() -> contextlib.AbstractContextManager:
    """DeepSpeed's shared memory has no name any more, and errors name flags."""
    from lisa_dist.errors import naming_flags
    from lisa_dist.zero.cpu_ops import release_shared_memory

    release_shared_memory()
    return naming_flags()
