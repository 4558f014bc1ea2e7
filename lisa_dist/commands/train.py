"""`lisa-dist train` and launch/train.py: a training run, on this rank or on `--gpus` ranks that it starts."""

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from lisa_dist.commands import exit_on_error
from lisa_dist.distributed.launching import end_process, launch_if_asked
from lisa_dist.distributed.signals import catch_stop_signals
from lisa_dist.files import warning_of_failure
from lisa_dist.flags import first_argument_as, task_of
from lisa_dist.run.arguments import parse_arguments, run_parser
from lisa_dist.run.quiet import leave_out_bars_of_other_ranks, leave_out_useless_words
from lisa_dist.run.run import run
from lisa_dist.run.settle import apply_preset
from lisa_dist.zero.cpu_ops import guard_builds


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run, or start `--gpus` ranks that do. An error of the user's is one line and exit status 2."""
    leave_out_useless_words()
    threading.excepthook = _in_one_line
    with exit_on_error("lisa-dist"):
        argv = launch_if_asked(sys.argv[1:] if argv is None else argv, "train", check=_check)
        argv = first_argument_as("--config", argv)
        guard_builds()  # which parsing may begin: it starts the process group
        config = apply_preset(parse_arguments(argv), run_parser(task_of(argv)).given(argv))
        leave_out_bars_of_other_ranks()
        catch_stop_signals()
        finished = run(config, argv)
        if finished is not None:  # and no other rank waits for this one
            _write_report(finished)
        end_process()


def _check(argv: Sequence[str]) -> None:
    argv = first_argument_as("--config", argv)
    run_parser(task_of(argv)).check(argv)


def _in_one_line(failed: threading.ExceptHookArgs) -> None:
    """A file that a tracker's thread cannot write is no bug of it; the run meets the same error when it logs next."""
    if isinstance(failed.exc_value, OSError):
        print(f"{failed.thread.name if failed.thread else 'a thread'}: {failed.exc_value}", flush=True)
    else:
        threading.__excepthook__(failed)


def _write_report(folder: Path) -> None:
    """Write the report of a run that has ended and whose model is saved."""
    with warning_of_failure(f"the report in {folder}"):
        from lisa_dist.report.html import write_report  # matplotlib is for rank 0, and for the end

        print(f"wrote {write_report(folder)}", flush=True)
