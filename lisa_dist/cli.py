"""The `lisa-dist` command. Each verb is a module of `commands`, imported when it is asked for."""

import contextlib
import difflib
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields

from lisa_dist.commands import exit_on_error
from lisa_dist.commands.verbs import VERBS, WITH_FLAGS, WITH_WORDS, check_trl, import_verb, look_for_files, read_parser
from lisa_dist.config import LisaConfig
from lisa_dist.definitions import UnreadableError
from lisa_dist.distributed.allocator import use_expandable_segments
from lisa_dist.flags import first_argument_as, take, task_of
from lisa_dist.tasks import SFT

USAGE = """usage: lisa-dist train recipe.yaml [--gpus N] [--any_flag value]
       lisa-dist init --model llama3.1-8b --gpus 1 --gpu_memory 24GiB --recipe recipe.yaml
       lisa-dist plan --model llama3.1-8b --gpus 4 --gpu_memory 80GiB [--any_flag value]
       lisa-dist eval MODEL --tasks mmlu,gsm8k,mt_bench [--data_dir DIR] [--gpus N]
       lisa-dist chat RUN_OR_MODEL
       lisa-dist export CHECKPOINT OUT [--keep_adapter] [--push_to_hub NAME]
       lisa-dist report OUTPUT_DIR [OUTPUT_DIR ...] [--serve [PORT]]
       lisa-dist norms RUN [RUN ...] --output_dir FOLDER
       lisa-dist convert FILE [RECIPE]
       lisa-dist recipes [show NAME | copy NAME [FILE]]
       lisa-dist info
       lisa-dist completion bash|zsh
       srun --ntasks-per-node=1 lisa-dist check --config recipe.yaml --output_dir DIR --gpus_per_node 8

  train       train a model by LISA, on one device or on several of this host; on more: launch/README.md
  init        write a commented recipe for a model and a budget of memory
  plan        what a run will need of memory, part by part, and the command that fits; needs no GPU and no weights
  eval        a model's scores on lm-evaluation-harness' tasks and on MT-Bench
  chat        talk with a model, or with that of a run, in the terminal
  export      turn a checkpoint of any LISA run into a folder that from_pretrained loads, without a GPU
  report      write report.html of a run, also while it goes on or where it was cut; of several runs one page
  norms       norms of weights and updates by block, of runs with --layer_norms: a table, a CSV, the paper's figure
  check       on every host before a run: GPUs, address, output folder, versions, time to save
  convert     a configuration of Axolotl, LLaMA-Factory, ms-swift or LMFlow, as a recipe
  recipes     the recipes and examples that come with the package: listed, shown, or copied to edit
  info        what is installed here, which kernels and attention a run would use and why, and what is missing
  completion  words for the shell: eval "$(lisa-dist completion bash)"

lisa-dist VERB --help has the flags of a verb.
"""


def main() -> None:
    """Run one verb of the command line."""
    verb, argv = sys.argv[1] if len(sys.argv) > 1 else None, sys.argv[2:]
    if verb in WITH_FLAGS:
        run_verb(verb, argv)
        return
    with _printed():
        _run_arguments(verb, argv)


def _run_arguments(verb: str | None, argv: list[str]) -> None:
    """A verb that has no flags, and what is asked of the command itself."""
    if verb in ("--version", "-V", "version"):
        print(f"lisa-dist {importlib.metadata.version('lisa_dist')}")
        raise SystemExit(0)
    asks = verb in ("-h", "--help") or argv in (["-h"], ["--help"])
    if verb in WITH_WORDS:
        counts, named = WITH_WORDS[verb]
        if len(argv) in counts and not asks:
            with exit_on_error(f"lisa-dist {verb}"):
                look_for_files(verb, {"words": argv})
            import_verb(verb).main(*argv)
            return
        what = next(line.split(maxsplit=1)[1] for line in USAGE.splitlines() if line.startswith(f"  {verb} "))
        print(f"usage: lisa-dist {verb} {named}".rstrip() + f"\n\n{what}")
    elif verb is None or asks:
        print(USAGE, end="")
    else:
        found = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f"did you mean {found[0]}?" if found else "lisa-dist --help lists them."
        print(f"lisa-dist: {verb}: no such verb; {meant}")
    raise SystemExit(0 if asks else 2)


@contextlib.contextmanager
def _printed() -> Iterator[None]:
    """Texts to read: a reader that goes before their end, as `head` does, ends the process without a traceback."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it exits
        raise SystemExit(1) from None  # not 0, for what was to be read may have been an error


def run_verb(verb: str, argv: Sequence[str]) -> None:
    """Run a verb that has flags; what its flags cannot be is answered before anything is imported for it."""
    asks = bool({"-h", "--help", "--help_all"} & set(argv))
    with _printed(), exit_on_error("lisa-dist" if verb == "train" else f"lisa-dist {verb}"):
        check_trl(verb)
        # A rank's flags were looked at before it was started, and check takes any flag of a run.
        if "RANK" not in os.environ and (asks or verb != "check"):
            _look_at(verb, argv)
    use_expandable_segments()  # what is imported next initializes CUDA
    _ignore_missing_cpu_kernels()
    module = import_verb(verb)
    with _printed() if asks else contextlib.nullcontext():
        module.main(argv)


def _ignore_missing_cpu_kernels() -> None:
    """Silence two warnings of bitsandbytes, which looks on the hub for a CPU kernel when it is imported.

    Without a network it warns in every process, although it has code of its own for the same product.
    """
    for name in ("kernels._internals.hf_hub", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _look_at(verb: str, argv: Sequence[str]) -> None:
    """Exit where help is asked for. Raises UserError for flags that cannot be meant, by themselves or their files."""
    if verb in ("train", "eval"):  # `--gpus N` is the launcher's
        _, argv = take(argv, "--gpus")
    if (first := WITH_FLAGS[verb]) is not None:
        argv = first_argument_as(first, argv)
    try:
        parser = read_parser(verb, task_of(argv) if verb == "train" else SFT)
    except UnreadableError:  # the parser of the imported classes answers
        return
    given = parser.given(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings without an effect: said when the run has begun
        LisaConfig(**{field.name: given[field.name] for field in fields(LisaConfig) if field.name in given})
    look_for_files(verb, given)


if __name__ == "__main__":
    main()
