"""`lisa-dist convert`: a configuration of Axolotl, LLaMA-Factory, ms-swift or LMFlow as a recipe."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lisa_dist.commands import exit_on_error, writing
from lisa_dist.commands.verbs import parser_of
from lisa_dist.convert.reading import TOOLS
from lisa_dist.convert.recipe import convert, format_recipe
from lisa_dist.errors import UserError
from lisa_dist.tasks import SFT


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")


def main(*argv: str) -> None:
    """Print the recipe, or write it to a second name; keys that are nothing here are on the screen too."""
    with exit_on_error("lisa-dist convert"):
        parser = _Parser("lisa-dist convert", description=__doc__, allow_abbrev=False)
        parser.add_argument("file", metavar="FILE", help=".yaml, .json, or the shell script that starts a run")
        parser.add_argument("recipe", nargs="?", help="the file to write; left out, the recipe is printed")
        parser.add_argument("--tool", choices=TOOLS, help="whose it is; by default its keys tell")
        arguments = parser.parse_args(argv)
        found = convert(arguments.file, arguments.tool, known_flags)
        text = format_recipe(found, arguments.file)
        if arguments.recipe is None:
            print(text, end="")
            return
        if Path(arguments.recipe).exists():
            raise UserError(f"{arguments.recipe}: is there already; name another file.")
        with writing(arguments.recipe):
            Path(arguments.recipe).write_text(text, encoding="utf-8")
        for key, remark in found.remarks.items():
            print(f"{key}: {remark}", file=sys.stderr)
        unresolved = {"dataset", "datasets"} & found.remarks.keys() or "dataset_name" not in found.flags
        gpus = re.match(r"\d+", found.remarks.get("NPROC_PER_NODE", ""))
        start = f"start it: lisa-dist train {arguments.recipe}" + (f" --gpus {gpus[0]}" if gpus else "")
        print(f"wrote {arguments.recipe}; {'its data are yet to be given' if unresolved else start}")


def known_flags(task: str = SFT) -> Sequence[str]:
    """The flags of a run of a task."""
    return [*parser_of("train", task).kinds]
