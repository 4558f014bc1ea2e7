"""`lisa-dist train --gpus N`, and `eval`: the deepspeed launcher, started and stopped as one command."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from lisa_dist.distributed.ranks import free_port
from lisa_dist.errors import UserError
from lisa_dist.train.arguments import run_parser

_RANK = ["-u", "-m", "lisa_dist.cli"]  # how the launcher starts one


def launch_if_asked(
    argv: Sequence[str], verb: str = "train", check: Callable[[Sequence[str]], object] | None = None
) -> Sequence[str]:
    """With `--gpus N` run N ranks of a verb on this host and exit as they do; else give the words back.

    Flags and recipe are checked before, by `check` where the verb is not train. SIGTERM, SIGUSR1 and SIGINT go on to
    the ranks, which end with a checkpoint: the launcher itself, sent a SIGTERM, would leave them behind.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--gpus=") else [word])]
    if "--gpus" not in words:
        return argv
    at = words.index("--gpus")
    number = words[at + 1] if at + 1 < len(words) else ""
    if not number.isdigit() or int(number) < 1:
        raise UserError(f"--gpus {number}: give a number of GPUs of this host; on CPUs it is one of ranks.")
    if "RANK" in os.environ:
        raise UserError(f"--gpus {number}: RANK is set, so a launcher has started this process already: leave it out.")
    rest = [*words[:at], *words[at + 2 :]]
    (check or run_parser().check)(rest)
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", number]
    launcher += ["--master_port", str(free_port()), "--no_local_rank", "--module", "lisa_dist.cli", verb]
    # In a session of its own: an interrupt from the keyboard comes to the ranks once, through here.
    child = subprocess.Popen([*launcher, *rest], start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda received, frame: _pass_on(child.pid, received))
    raise SystemExit(child.wait())


def _pass_on(launcher: int, number: int) -> None:
    """Send a signal to all ranks of a launcher, an interrupt as SIGTERM; while there are none, end the launcher."""
    number = signal.SIGTERM if number == signal.SIGINT else number
    below = psutil.Process(launcher).children(recursive=True)
    ranks = [process for process in below if _is_rank(process)]
    for process in ranks or [psutil.Process(launcher), *below]:
        try:
            process.send_signal(number if ranks else signal.SIGTERM)
        except psutil.NoSuchProcess:  # it has ended in between
            continue


def _is_rank(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[1:4] == _RANK
    except psutil.NoSuchProcess:
        return False
