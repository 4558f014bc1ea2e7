"""The `lisa-dist` command. Each verb hands over to its module."""

import importlib
import logging
import sys
from types import ModuleType

from lisa_dist.imports import without_collection

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
# Verbs with flags: their module, which parses them and answers --help.
_WITH_FLAGS = {
    "train": "train.run",
    "init": "commands.init",
    "plan": "memory.planner",
    "eval": "eval.evaluation",
    "check": "distributed.preflight",
    "norms": "report.norms",
}
# Verbs with words alone: module, function, and the words.
_WITH_WORDS = {
    "export": ("checkpoint.save", "export_main", ("CHECKPOINT", "OUT")),
    "report": ("report.html", "main", ("OUTPUT_DIR",)),
    "info": ("commands.info", "main", ()),
}


def main() -> None:
    """Run one verb of the command line."""
    # It warns of a kernel for 4-bit weights, which nothing here has.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    verb, words = sys.argv[1] if len(sys.argv) > 1 else None, sys.argv[2:]
    if verb in _WITH_FLAGS:
        _module(_WITH_FLAGS[verb]).main(words)
        return
    asks = verb in ("-h", "--help") or words in (["-h"], ["--help"])
    if verb in _WITH_WORDS:
        module, function, needed = _WITH_WORDS[verb]
        if len(words) == len(needed) and not asks:
            getattr(_module(module), function)(*words)
            return
        what = next(line.split(maxsplit=1)[1] for line in USAGE.splitlines() if line.startswith(f"  {verb} "))
        print(f"usage: {' '.join(['lisa-dist', verb, *needed])}\n\n{what}")
    else:
        print(USAGE, end="")
    raise SystemExit(0 if asks else 2)


def _module(name: str) -> ModuleType:
    with without_collection():
        return importlib.import_module(f"lisa_dist.{name}")


if __name__ == "__main__":
    main()
