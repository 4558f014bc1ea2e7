"""DeepSpeed on CPU ranks: its C++ ops, built before ranks start, and its shared memory, released."""

import contextlib
import fcntl
import functools
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist
from torch.utils.cpp_extension import get_default_build_root

from lisa_dist.distributed.signals import ended_by_signals
from lisa_dist.zero.overrides import override

_SILENT = 3.0  # seconds after which a build is no look at one that is there, but a compilation


def build_cpu_ops(offload: bool = True) -> None:
    """Compile the C++ ops that DeepSpeed would build at first use, so that ranks do not race to build them.

    `offload` includes the AdamW of offloaded states, which takes a minute.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder, ShareMemCommBuilder

    guard_builds()
    if get_accelerator().device_name() == "cpu":
        ShareMemCommBuilder().load(verbose=False)
    if offload:
        CPUAdamBuilder().load(verbose=False)


def guard_builds() -> None:
    """Process-wide: DeepSpeed builds each of its C++ ops by `built_alone`, whoever asks for it first."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    if not hasattr(OpBuilder.jit_load, "__wrapped__"):
        override(OpBuilder, "jit_load", _guarded(OpBuilder.jit_load))


def _guarded(jit_load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(jit_load)
    def load(builder: Any, *args: Any, **kwargs: Any) -> Any:
        with ended_by_signals(), built_alone(builder.name):
            return jit_load(builder, *args, **kwargs)

    return load


@contextlib.contextmanager
def built_alone(name: str, silent: float = _SILENT) -> Iterator[None]:
    """While the body builds the op of this name no other process of ours does; that it takes long is said, once a host.

    torch's own lock is a file that stays when its process is killed, and that every later build waits for. Ours goes
    with its process: whoever holds it knows that torch's is of a build that was cut, unless a compiler still works
    there, of a program that does not know of ours or of a process that was killed. `silent` is in seconds.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    begun, said = time.monotonic(), threading.Event()

    def say() -> None:
        said.set()
        print(f"compiling {name} of DeepSpeed in {root}, here or elsewhere, once: a minute or two", flush=True)

    timer = threading.Timer(silent, say)
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        with _locked(root / f"{name}.lisa_dist_lock") as is_alone:
            for stale in root.glob(f"**/{name}/lock") if is_alone else ():
                while _has_a_compiler(stale.parent):
                    time.sleep(0.2)
                stale.unlink(missing_ok=True)
            yield
    finally:
        timer.cancel()
    if said.is_set():
        print(f"{name} was there after {time.monotonic() - begun:.0f} s", flush=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock while the body runs; it is given False where the file is another user's, or cannot be locked."""
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
            is_held = True
        except OSError:
            is_held = False
        yield is_held


def _has_a_compiler(folder: Path) -> bool:
    """Whether ninja works in a folder, as it does where it builds."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            if "ninja" in process.name() and process.cwd() == str(folder.resolve()):
                return True
    return False


def start_deepspeed() -> None:
    """Have DeepSpeed know of the process group, and leave no name of its shared memory; every rank calls it.

    Between making its buffer and removing the name a rank waits for no other: whenever it is killed, none stays.
    """
    guard_builds()
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
