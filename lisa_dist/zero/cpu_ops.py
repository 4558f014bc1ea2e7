"""DeepSpeed's C++ ops: built by one process at a time, its shared memory released, its AdamW on the host counted."""

import contextlib
import fcntl
import functools
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist
from torch.utils.cpp_extension import get_default_build_root

from lisa_dist.distributed.signals import ended_by_signals
from lisa_dist.zero.stages import override

_SILENT = 3.0  # seconds after which a build is no look at one that is there, but a compilation


def build_cpu_ops(offload: bool = True) -> None:
    """Build what DeepSpeed would build at first use on CPU ranks; `offload`: its AdamW on the host too, a minute."""
    from deepspeed.ops.op_builder import CPUAdamBuilder, ShareMemCommBuilder

    guard_builds()
    if get_accelerator().device_name() == "cpu":  # a GPU has no builder of it
        ShareMemCommBuilder().load(verbose=False)
    if offload:
        CPUAdamBuilder().load(verbose=False)


def guard_builds() -> None:
    """Process-wide: DeepSpeed builds each of its C++ ops by `built_alone`, whoever asks for it first."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    jit_load = OpBuilder.jit_load

    @functools.wraps(jit_load)
    def load(builder: Any, *args: Any, **kwargs: Any) -> Any:
        with ended_by_signals(), built_alone(builder.name):
            return jit_load(builder, *args, **kwargs)

    if not hasattr(jit_load, "__wrapped__"):
        override(OpBuilder, "jit_load", load)


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
    with contextlib.ExitStack() as stack:
        stack.callback(timer.cancel)
        is_alone = False
        with contextlib.suppress(OSError):  # the file is another user's, or cannot be locked
            fcntl.flock(stack.enter_context((root / f"{name}.lisa_dist_lock").open("a")), fcntl.LOCK_EX)
            is_alone = True
        for stale in root.glob(f"**/{name}/lock") if is_alone else ():
            while _has_a_compiler(stale.parent):
                time.sleep(0.2)
            stale.unlink(missing_ok=True)
        yield
    if said.is_set():
        print(f"{name} was there after {time.monotonic() - begun:.0f} s", flush=True)


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


class CountedAdam:
    """DeepSpeed's op for AdamW on the host, recording how it computed the powers of the betas.

    It multiplies them from one step to the next, and calls pow(beta, step) after a jump of the count: the bits differ.
    A resumed run must repeat the same sequence to get the same bits: pow at `start`, then products up to `step`.
    """

    def __init__(self, op: Any):
        self._op = op
        self.start = self.step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    def adam_update(self, opt_id: int, step: int, *args: Any) -> None:
        if step not in (self.step, self.step + 1):
            self.start = step
        self.step = step
        self._op.adam_update(opt_id, step, *args)


def count_host_adam(optimizer: Any) -> None:
    """Have the host's AdamW, if the optimizer is one, record its steps."""
    op = getattr(optimizer, "ds_opt_adam", None)
    if op is not None and not isinstance(op, CountedAdam):
        override(optimizer, "ds_opt_adam", CountedAdam(op))


def host_adam_history(optimizer: torch.optim.Optimizer) -> list[int] | None:
    """Where the host's AdamW took a power of the betas and where it has come to since; None for other optimizers."""
    op = getattr(optimizer, "ds_opt_adam", None)
    return [op.start, op.step] if isinstance(op, CountedAdam) else None


def replay_host_adam(optimizer: Any, history: list[int] | None) -> None:
    """Bring the host's AdamW, if it is one, to the powers of the betas that a saved run had; moves no weight."""
    op = getattr(optimizer, "ds_opt_adam", None)
    if history is None or not isinstance(op, CountedAdam):
        return
    start, step = history
    betas = optimizer.param_groups[0]["betas"]
    other = tuple(beta / 2 for beta in betas)  # betas that change make it take the power anew
    for count, used in [(start, other), *((count, betas) for count in range(start, step + 1))]:
        nothing = [torch.zeros(1) for _ in range(4)]
        op.adam_update(optimizer.opt_id, count, 0.0, *used, 1.0, 0.0, False, *nothing)
    op.start = start
