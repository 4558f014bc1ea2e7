"""`--gpus N` of `lisa-dist train` and `eval`: the deepspeed launcher as one command; and the end of a rank."""

import atexit
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import psutil
from deepspeed.accelerator import get_accelerator

from lisa_dist.distributed.ranks import forget_rank_of_parent, free_port
from lisa_dist.distributed.signals import INTERRUPT_FILE
from lisa_dist.errors import UserError
from lisa_dist.flags import take

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LAUNCHER = "LISA_DIST_LAUNCHER"  # the process that was given --gpus
_RANK = ["-u", "-m", "lisa_dist.cli"]  # how the launcher starts one


def launch_if_asked(argv: Sequence[str], verb: str, check: Callable[[Sequence[str]], object]) -> Sequence[str]:
    """With `--gpus N` run N ranks of a verb on this host and exit as they do; else return `argv`.

    `check` raises UserError for flags that no rank could use, before any is started. SIGTERM, SIGUSR1 and SIGINT go on
    to the ranks, which end with a checkpoint: the launcher itself, sent a SIGTERM, would leave them behind.
    """
    (asked,), rest = take(argv, "--gpus")
    if not asked:
        if _LAUNCHER in os.environ:  # a rank that it has started
            _end_with(int(os.environ[_LAUNCHER]))
        return argv
    number = asked[-1]
    if not re.fullmatch(r"[1-9][0-9]{0,5}", number):
        raise UserError(f"--gpus {number}: give a number of GPUs of this host; on CPUs it is one of ranks.")
    forget_rank_of_parent()
    if "RANK" in os.environ:
        raise UserError(f"--gpus {number}: RANK is set, so a launcher has started this process already: leave it out.")
    check(rest)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *_device_words(int(number))]
    launcher += ["--log_level", "critical"]  # below it the command of a rank that has said what is wrong is printed
    launcher += ["--master_port", str(free_port()), "--no_local_rank", "--module", "lisa_dist.cli", verb]
    device = "CPUs of this host" if get_accelerator().device_name() == "cpu" else "GPUs"
    print(f"starting {number} ranks on {device}: each imports torch, DeepSpeed and transformers first", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != _VISIBLE}
    environment[_LAUNCHER] = str(os.getpid())
    with tempfile.TemporaryDirectory(prefix="lisa-dist-") as folder:
        interrupt_file = Path(folder, "interrupted")
        environment[INTERRUPT_FILE] = str(interrupt_file)
        # In a session of its own: an interrupt from the keyboard comes to the ranks once, through here.
        child = subprocess.Popen([*launcher, *rest], start_new_session=True, env=environment)
        for stop in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(stop, lambda received, frame: _pass_on(child.pid, received, interrupt_file))
        status = child.wait()
    if (number_of := 256 - status) < signal.NSIG:  # of a signal, of which a rank says nothing itself
        print(f"lisa-dist: a rank was ended by signal {number_of} ({signal.strsignal(number_of)})", flush=True)
    raise SystemExit(status)


def _end_with(launcher: int) -> None:
    """Have this rank get a SIGTERM, by which it saves and ends, when the launcher is gone: a SIGKILL takes it alone."""

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(launcher).wait()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="lisa_dist launcher", daemon=True).start()


def _device_words(number: int) -> list[str]:
    """The launcher's flags for ranks on the first `number` GPUs that CUDA_VISIBLE_DEVICES shows.

    The launcher knows GPUs by their index on the host, and ignores the variable when it is told a number of them.
    """
    by_number = ["--num_gpus", str(number)]
    if get_accelerator().device_name() == "cpu":
        return by_number
    if _VISIBLE not in os.environ:
        if number > (count := get_accelerator().device_count()):
            raise UserError(f"--gpus {number}: this host has {count} GPUs.")
        return by_number
    visible = [index.strip() for index in os.environ[_VISIBLE].split(",") if index.strip()]
    if number > len(visible):
        raise UserError(
            f"--gpus {number}: {_VISIBLE}={os.environ[_VISIBLE]} shows {len(visible)} GPUs; show more, or give "
            f"--gpus {len(visible)}."
        )
    if not all(index.isdigit() for index in visible):
        raise UserError(
            f"--gpus {number} with {_VISIBLE}={os.environ[_VISIBLE]}: the deepspeed launcher takes indices of GPUs "
            f"alone; give those, or start torchrun --nproc_per_node {number} launch/train.py."
        )
    return ["--include", f"localhost:{','.join(visible[:number])}"]


def end_process() -> NoReturn:
    """Exit with status 0, skipping the interpreter's shutdown.

    A thread of gloo may not be done with the last collective when rank and model are: where it wants the interpreter
    back while that is being taken down, C++ ends the process ("terminate called without an active exception").
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons, as the interpreter would
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _pass_on(launcher: int, number: int, interrupt_file: Path) -> None:
    """Send a signal to all ranks of a launcher. While there are none, end the launcher.

    SIGINT would end a rank in a traceback before it trains. The ranks get a SIGTERM instead, and find the
    `interrupt_file`, by which they know what it stands for.
    """
    if number == signal.SIGINT:
        number = signal.SIGTERM
        interrupt_file.touch()
        print("Ctrl-C: passed on to the ranks; a rank that trains saves after its step and ends", flush=True)
    below = psutil.Process(launcher).children(recursive=True)
    ranks = []
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks += [process] if process.cmdline()[1:4] == _RANK else []
    for process in ranks or [psutil.Process(launcher), *below]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended in between
            process.send_signal(number if ranks else signal.SIGTERM)
