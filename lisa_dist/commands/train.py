"""`lisa-dist train` and launch/train.py: a training run, on this rank or on `--gpus` ranks that it starts."""

import os
import sys
import warnings
from collections.abc import Sequence

from lisa_dist.distributed.launching import end_process, launch_if_asked
from lisa_dist.distributed.signals import catch_stop_signals
from lisa_dist.errors import SharedError, UserError
from lisa_dist.train.arguments import parse_arguments, run_parser
from lisa_dist.train.run import run


def main(words: Sequence[str] | None = None) -> None:
    """Parse and run, or start `--gpus` ranks that do. An error of the user's is one line and exit status 2."""
    # Of names that DeepSpeed and TRL use, and will until the releases that we support end: nobody can act on them here.
    for warning in (r"`torch\.distributed\.\w+` is deprecated", "`gradient_checkpointing` is deprecated"):
        warnings.filterwarnings("ignore", warning, FutureWarning)
    try:
        words = launch_if_asked(sys.argv[1:] if words is None else words, "train", check=run_parser().check)
        arguments = parse_arguments(words)
        if arguments[0].method == "lisa":
            catch_stop_signals()
        run(*arguments, words)
        end_process()
    except SharedError as error:
        if os.environ["RANK"] == "0":
            print(f"lisa-dist: {error}", flush=True)
        raise SystemExit(2) from error
    except UserError as error:
        rank = f", rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"lisa-dist{rank}: {error}", flush=True)
        raise SystemExit(2) from error
