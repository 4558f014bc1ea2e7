"""Which verbs there are, the flags of each, read from its sources, and its module, imported when it is run."""

import contextlib
import gc
import importlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from lisa_dist.definitions import UnreadableError, read
from lisa_dist.errors import UserError
from lisa_dist.flags import FlagParser, run_parser
from lisa_dist.tasks import SFT

# Verbs that parse flags of their own and answer --help; what a first word that is no flag is the value of.
WITH_FLAGS = dict.fromkeys(("train", "init", "plan", "eval", "chat", "check", "norms"))
WITH_FLAGS |= {"train": "--config", "eval": "--model", "chat": "--model"}
# Verbs with words alone: how many, and which.
WITH_WORDS = {
    "export": ((2,), "CHECKPOINT OUT"),
    "report": (range(1, 100), "OUTPUT_DIR [OUTPUT_DIR ...]"),
    "convert": (range(1, 9), "FILE [RECIPE] [--tool axolotl|llamafactory|ms-swift|lmflow]"),
    "recipes": (range(4), "[show NAME | copy NAME [FILE]]"),
    "info": ((0,), ""),
    "completion": ((1,), "bash|zsh"),
}
VERBS = (*WITH_FLAGS, *WITH_WORDS)
# Those that train, or plan, by TRL's trainers. Beside other programs, whose plugins do without them, it may be older.
_BY_TRL, _TRL = ("train", "init", "plan"), "1.16"


def parser_of(verb: str, task: str = SFT) -> FlagParser:
    """The parser of a verb's flags, by the sources of its modules; these are imported where that is not enough."""
    try:
        return read_parser(verb, task)
    except UnreadableError:
        if verb != "train":
            module = import_verb(verb)
            return FlagParser(module.ARGUMENTS, module.USAGE, module.HELP)
        from lisa_dist.run.arguments import run_parser as imported_parser

        return imported_parser(task)


def read_parser(verb: str, task: str = SFT) -> FlagParser:
    """The same, and nothing is imported. Raises UnreadableError where the sources are not enough."""
    if verb != "train":
        types, usage, groups = (read(f"lisa_dist.commands.{verb}", name) for name in ("ARGUMENTS", "USAGE", "HELP"))
        return FlagParser(types, usage, groups)
    module = "lisa_dist.run.arguments"
    types, *screen = (read(module, name) for name in ("ARGUMENTS", "USAGE", "HELP", "HELP_OF_TASK"))
    return run_parser(task, (*types, read("lisa_dist.run.task_configs", "CONFIGS")[task]), *screen)


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


def check_trl(verb: str) -> None:
    """Raise UserError where the trainers that a verb takes are those of another program."""
    if verb in _BY_TRL and Version(there := version("trl")) < Version(_TRL):
        raise UserError(f"trl {there}: needs trl>={_TRL}; install it, or train by a plugin (docs/plugins.md).")


def import_verb(verb: str) -> Any:
    """The module of a verb."""
    with without_collection():
        return importlib.import_module(f"lisa_dist.commands.{verb}")
