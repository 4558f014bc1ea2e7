"""`lisa-dist check`, on each host, with the flags of the run: what would end it after minutes or days."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lisa_dist.checkpoint.size import checkpoint_bytes
from lisa_dist.commands.verbs import parser_of
from lisa_dist.core.layer_weights import split_columns
from lisa_dist.definitions import setting
from lisa_dist.distributed.health import host_name
from lisa_dist.distributed.preflight import HostCheck
from lisa_dist.distributed.ranks import set_rank
from lisa_dist.errors import UserError, naming_flags
from lisa_dist.flags import FlagParser, task_of

USAGE = "lisa-dist check --config recipe.yaml --output_dir DIR [--any_flag_of_the_run value ...], on every host"
HELP = {
    "The run": ("config", "output_dir"),
    "What must hold": ("gpus_per_node", "save_within", "meet_within"),
}
# Files of a run that all hosts must have alike.
_COMPARED = (".py", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz")


@dataclass
class CheckArguments:
    """Flags of `lisa-dist check`; all others are taken for the run's."""

    config: str | None = setting(None, "Recipe of the run; other flags are taken for the run's too.")
    output_dir: str | None = setting(None, "Of the run; every host must see it.")
    gpus_per_node: int = setting(0, "GPUs that each host must have.", aliases=["--gpus_per_host"])
    save_within: float = setting(0.0, "Seconds from the stop signal to the end of the job; 0: not checked.")
    meet_within: float = setting(60.0, "Seconds to wait for the other hosts.")


ARGUMENTS = (CheckArguments,)


def main(argv: Sequence[str]) -> None:
    """Check this host and compare it with the others; exit status 2 on every host when anything is wrong."""
    host = host_name()
    with naming_flags():
        try:
            known, rest = FlagParser(ARGUMENTS, USAGE, HELP).parse_known_args(argv)
            arguments = CheckArguments(**vars(known))
            set_rank()
            flags = flags_of_run(arguments, rest)
            problems = HostCheck(
                host,
                Path(flags["output_dir"]),
                gpus=arguments.gpus_per_node,
                files=compared_files(arguments.config, flags),
                meet_within=arguments.meet_within,
                save_within=arguments.save_within,
                checkpoint_bytes=partial(checkpoint_bytes, flags),
            ).problems()
        except UserError as error:
            problems = [f"host {host}: {error}"]
        for problem in problems:
            print(f"lisa-dist check: {problem}", file=sys.stderr, flush=True)
    raise SystemExit(2 if problems else 0)


def flags_of_run(arguments: CheckArguments, rest: Sequence[str]) -> dict[str, Any]:
    """The run's flags, from its recipe and the command line."""
    argv = [*(["--config", arguments.config] if arguments.config is not None else []), *rest]
    flags = parser_of("train", task_of(argv)).given(argv)
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
        names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
        for name in filter(lambda name: isinstance(name, str), names):  # what else there is the run's parser refuses
            path = split_columns(name)[0] if flag == "lisa_weights_file" else re.sub(r"#\d+$", "", name)
            files.append((f"--{flag}", path))
    return [(flag, path) for flag, path in files if flag == "--config" or Path(path).suffix in _COMPARED]
