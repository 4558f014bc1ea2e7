"""The `lisa-dist` command. Each verb is a module of `commands`, imported when it is asked for."""

import contextlib
import gc
import importlib
import logging
import sys
from collections.abc import Callable, Iterator

USAGE = """usage: lisa-dist train [--gpus N] --config recipe.yaml [--any_flag value]
       lisa-dist init --model llama3.1-8b --gpus 1 --gpu_memory 24GiB --recipe recipe.yaml
       lisa-dist plan --model llama3.1-8b --gpus 4 --gpu_memory 80GiB [--any_flag value]
       lisa-dist eval MODEL --tasks mmlu,gsm8k,mt_bench [--data_dir DIR] [--gpus N]
       lisa-dist export CHECKPOINT OUT
       lisa-dist report OUTPUT_DIR
       lisa-dist norms RUN [RUN ...] --out FOLDER
       lisa-dist info
       srun --ntasks-per-node=1 lisa-dist check --config recipe.yaml --output_dir DIR --gpus_per_node 8

  train   train a model by LISA, on one device or on several of this host; on more: launch/README.md
  init    write a commented recipe for a model and a budget of memory
  plan    what a run will need of memory, part by part, and the command that fits; needs no GPU and no weights
  eval    a model's scores on lm-evaluation-harness' tasks and on MT-Bench
  export  turn a checkpoint of any LISA run into a folder that from_pretrained loads, without a GPU
  report  write report.html of a run, also while it goes on or where it was cut
  norms   norms of weights and updates by block, of runs with --layer_norms: a table, a CSV, the paper's figure
  check   on every host before a run: GPUs, address, output folder, versions, time to save
  info    what is installed here, which kernels and attention a run would use and why, and what is missing

lisa-dist VERB --help has the flags of a verb.
"""
# Verbs that parse flags of their own and answer --help.
_WITH_FLAGS = ("train", "init", "plan", "eval", "check", "norms")
# Verbs with words alone, and the words.
_WITH_WORDS = {"export": ("CHECKPOINT", "OUT"), "report": ("OUTPUT_DIR",), "info": ()}


def main() -> None:
    """Run one verb of the command line."""
    # It warns of a kernel for 4-bit weights, which nothing here has.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    verb, words = sys.argv[1] if len(sys.argv) > 1 else None, sys.argv[2:]
    if verb in _WITH_FLAGS:
        _main_of(verb)(words)
        return
    asks = verb in ("-h", "--help") or words in (["-h"], ["--help"])
    if verb in _WITH_WORDS:
        needed = _WITH_WORDS[verb]
        if len(words) == len(needed) and not asks:
            _main_of(verb)(*words)
            return
        what = next(line.split(maxsplit=1)[1] for line in USAGE.splitlines() if line.startswith(f"  {verb} "))
        print(f"usage: {' '.join(['lisa-dist', verb, *needed])}\n\n{what}")
    else:
        print(USAGE, end="")
    raise SystemExit(0 if asks else 2)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Imports in the body take a sixth less: what they make stays, and the collector would walk it again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            # To the oldest generation unseen; else the first collection of the youngest would walk it all.
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def _main_of(verb: str) -> Callable[..., None]:
    with without_collection():
        return importlib.import_module(f"lisa_dist.commands.{verb}").main


if __name__ == "__main__":
    main()
