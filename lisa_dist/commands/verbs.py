"""Which verbs there are, and the module and the flags of each, imported when they are asked for."""

import contextlib
import gc
import importlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from lisa_dist import flag_tables
from lisa_dist.errors import UserError
from lisa_dist.flag_words import first_word_as
from lisa_dist.tasks import SFT, TASKS, task_of

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
# Tables of flags: one for each verb, and one for each task of train.
TABLES = (*WITH_FLAGS, *(f"train {task}" for task in TASKS if task != SFT))


def table_of_verb(verb: str) -> list:
    """The screen of help and the flags of a verb, or of `train TASK`; of one without flags nothing."""
    if verb.partition(" ")[0] not in WITH_FLAGS:
        return []
    table = flag_tables.load(verb)
    if table is None:
        flag_tables.store(verb, parser := parser_of(verb))
        table = flag_tables.table_of(parser)
    return table


def name_of_table(verb: str, words: Sequence[str]) -> str:
    """The table of flags that words of a verb go by. Raises UserError for a task that there is not."""
    if verb != "train" or (task := task_of(first_word_as("--config", words))) == SFT:
        return verb
    return f"train {task}"


def parser_of(table: str) -> Any:
    """The parser that a table is made of."""
    verb, _, task = table.partition(" ")
    return import_verb(verb).parser(*[task] if task else [])


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


def import_verb(verb: str) -> Any:
    """The module of a verb. Raises UserError where the trainers that it takes are those of another program."""
    if verb in _BY_TRL and Version(there := version("trl")) < Version(_TRL):
        raise UserError(f"trl {there}: needs trl>={_TRL}; install it, or train by a plugin (docs/plugins.md).")
    with without_collection():
        return importlib.import_module(f"lisa_dist.commands.{verb}")
