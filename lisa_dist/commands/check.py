"""`lisa-dist check`: what would end a run on several hosts after minutes or days, found in seconds and named by host.

One process on each host, as `srun --ntasks-per-node=1 lisa-dist check ...` starts them, with the flags of the run.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lisa_dist.checkpoint.size import checkpoint_bytes
from lisa_dist.core.layer_weights import split_columns
from lisa_dist.distributed.health import host_name
from lisa_dist.distributed.preflight import HostCheck
from lisa_dist.distributed.ranks import set_rank
from lisa_dist.errors import UserError, naming_flags
from lisa_dist.files import read_yaml
from lisa_dist.flags import FlagParser

USAGE = "lisa-dist check --config recipe.yaml --output_dir DIR [--any_flag_of_the_run value ...], on every host"
HELP = {
    "The run": {
        "config": "its recipe; other flags are taken for the run's",
        "output_dir": "its folder, which every host must see",
    },
    "What must hold": {
        "gpus_per_node": "GPUs that each host must have",
        "save_within": "seconds from the stop signal to the end of the job; 0: not checked",
        "meet_within": "seconds to wait for the other hosts",
    },
}
# Files of a run that all hosts must have alike.
_COMPARED = (".py", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz")


@dataclass
class CheckArguments:
    """Flags of `lisa-dist check`; all others are taken for the run's."""

    config: str | None = field(default=None, metadata={"help": "Recipe of the run, as for train."})
    output_dir: str | None = field(default=None, metadata={"help": "Of the run; every host must see it."})
    gpus_per_node: int = field(
        default=0, metadata={"aliases": ["--gpus_per_host"], "help": "GPUs that each host must have."}
    )
    save_within: float = field(
        default=0.0, metadata={"help": "Seconds between the signal that stops the job and its end; 0: not checked."}
    )
    meet_within: float = field(default=60.0, metadata={"help": "Seconds to wait for the other hosts."})


def parser() -> FlagParser:
    """Of the check's own flags."""
    return FlagParser([CheckArguments], USAGE, HELP)


def main(words: Sequence[str]) -> None:
    """Check this host and compare it with the others; exit status 2 on every host when anything is wrong."""
    host = host_name()
    with naming_flags():
        problems = _problems(host, words)
        for problem in problems:
            print(f"lisa-dist check: {problem}", file=sys.stderr, flush=True)
    raise SystemExit(2 if problems else 0)


def _problems(host: str, words: Sequence[str]) -> list[str]:
    try:
        arguments, rest = parser().parse_args_into_dataclasses(words, return_remaining_strings=True)
        set_rank()
        flags = flags_of_run(arguments, rest)
        return HostCheck(
            host,
            Path(flags["output_dir"]),
            gpus=arguments.gpus_per_node,
            files=compared_files(arguments.config, flags),
            meet_within=arguments.meet_within,
            save_within=arguments.save_within,
            checkpoint_bytes=partial(checkpoint_bytes, flags),
        ).problems()
    except UserError as error:
        return [f"host {host}: {error}"]


def flags_of_run(arguments: CheckArguments, rest: Sequence[str]) -> dict[str, Any]:
    """The run's flags, from its recipe and the command line."""
    flags = {}
    if arguments.config is not None:
        flags = read_yaml("--config", arguments.config)
        if not isinstance(flags, dict):
            raise UserError(f"--config {arguments.config}: holds no flags, such as learning_rate: 1.0e-5.")
    name, values = None, []
    words = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for word in [*words, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name is not None:
            flags[name] = " ".join(values) or "true"
        name, values = word.removeprefix("--").replace("-", "_"), []  # the run's parser takes both
    if arguments.output_dir is not None:
        flags["output_dir"] = arguments.output_dir
    if "output_dir" not in flags:
        raise UserError("--output_dir is missing: give the run's, or a --config that has it.")
    return flags


def compared_files(recipe: str | None, flags: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The files of a run that every host must have with the same bytes: flag and path."""
    files = [("--config", recipe)] if recipe is not None else []
    model = flags.get("model_name_or_path")
    files += [("--model_name_or_path", f"{model}/config.json")] if isinstance(model, str) else []
    for flag in ("dataset_name", "eval_dataset_name", "lisa_weights_file", "deepspeed"):
        given = flags.get(flag)
        names = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
        for name in filter(lambda name: isinstance(name, str), names):  # what else there is the run's parser refuses
            path = split_columns(name)[0] if flag == "lisa_weights_file" else re.sub(r"#\d+$", "", name)
            files.append((f"--{flag}", path))
    return [(flag, path) for flag, path in files if flag == "--config" or Path(path).suffix in _COMPARED]
