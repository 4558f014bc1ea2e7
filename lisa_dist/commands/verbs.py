"""Which verbs there are, the flags of each, files that its words lack, and its module, imported when it is run."""

import contextlib
import errno
import gc
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from lisa_dist.definitions import UnreadableError, read
from lisa_dist.ds_config import find_ds_config
from lisa_dist.errors import UserError
from lisa_dist.files import check_new_file
from lisa_dist.flags import FlagParser, run_parser
from lisa_dist.model_names import is_path, nearest_name, shipped_name
from lisa_dist.run_folder import check_overwrites
from lisa_dist.tasks import SFT, check_rewards_given, refuse_flags_of_sft
from lisa_dist.text import in_one_line, parse_bytes

# Verbs that parse flags of their own and answer --help; what a first word that is no flag is the value of.
WITH_FLAGS = dict.fromkeys(("train", "init", "plan", "eval", "chat", "check", "norms"))
WITH_FLAGS |= {"train": "--config", "eval": "--model", "chat": "--model"}
# Verbs with words alone: how many, and which.
WITH_WORDS = {
    "export": (range(2, 6), "CHECKPOINT OUT [--keep_adapter] [--push_to_hub NAME]"),
    "report": (range(1, 100), "OUTPUT_DIR [OUTPUT_DIR ...] [--serve [PORT]]"),
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
        return _parser(verb, task, lambda module, name: getattr(importlib.import_module(module), name))


def read_parser(verb: str, task: str = SFT) -> FlagParser:
    """The same, and nothing is imported. Raises UnreadableError where the sources are not enough."""
    return _parser(verb, task, read)


def _parser(verb: str, task: str, find: Callable[[str, str], Any]) -> FlagParser:
    module = "lisa_dist.run.arguments" if verb == "train" else f"lisa_dist.commands.{verb}"
    types, usage, groups = (find(module, name) for name in ("ARGUMENTS", "USAGE", "HELP"))
    if verb != "train":
        return FlagParser(types, usage, groups)
    of_task = find("lisa_dist.run.task_configs", "CONFIGS")[task]
    return run_parser(task, (*types, of_task), usage, groups, find(module, "HELP_OF_TASK"))


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Imports in the body take a sixth less: what they make stays, and the collector would walk it again and again."""
    gc.disable()
    try:
        yield
    finally:
        # To the oldest generation unseen; else the first collection of the youngest would walk it all.
        gc.freeze()
        gc.unfreeze()
        gc.enable()


def check_trl(verb: str) -> None:
    """Raise UserError where the trainers that a verb takes are those of another program."""
    if verb in _BY_TRL and Version(there := version("trl")) < Version(_TRL):
        raise UserError(f"trl {there}: needs trl>={_TRL}; install it, or train by a plugin (docs/plugins.md).")


def import_verb(verb: str) -> Any:
    """The module of a verb."""
    with without_collection():
        return importlib.import_module(f"lisa_dist.commands.{verb}")


def folders_of_report(words: Sequence[str]) -> Sequence[str]:
    """The words before --serve. Raises UserError where there are none, and for more than a port behind it."""
    folders = words[: words.index("--serve")] if "--serve" in words else words
    if not folders or (folders != words and len(words) > len(folders) + 2):
        raise UserError(f"{' '.join(words)}: give OUTPUT_DIR [OUTPUT_DIR ...] [--serve [PORT]].")
    return folders


def look_for_files(verb: str, given: Mapping[str, Any]) -> None:
    """Raise UserError for the first missing file of a verb's flags or words; what may be on the hub is left alone."""
    texts = {flag: value for flag, value in given.items() if isinstance(value, str)}
    for flag in ("gpu_memory", "host_memory", "reserve"):
        if flag in texts:
            parse_bytes(f"--{flag}", texts[flag])
    if verb == "init" and "recipe" in texts:
        check_new_file("--recipe", texts["recipe"])
    if "deepspeed" in texts and not texts["deepspeed"].lstrip().startswith("{"):
        find_ds_config(texts["deepspeed"])
    if verb in ("plan", "init"):
        _look_for_model(texts.get("model"))
    elif verb in ("chat", "eval"):
        _look_for("", "folder", texts.get("model"), may_be_of_hub=True)
        _look_for("--data_dir ", "folder", texts.get("data_dir"))
    elif verb in ("export", "report"):
        for folder in given["words"][:1] if verb == "export" else folders_of_report(given["words"]):
            _look_for("", "folder", folder)
    elif verb == "norms":
        for run in given["runs"]:
            _look_for("", "file or folder", run, run.rpartition("=")[2])  # label=RUN
    elif verb == "train":
        _look_for_run(given, texts)


def _look_for_run(given: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    if (task := given.get("task", SFT)) != SFT:
        refuse_flags_of_sft(task, given)
    check_rewards_given(task, _listed(given.get("reward_funcs")))
    for flag in ("dataset_name", "eval_dataset_name"):
        for name in _listed(given.get(flag)):
            bare = re.sub(r"#\d+$", "", name)  # name#1000
            if bare.removesuffix(".gz").endswith(read("lisa_dist.data.readers", "SUFFIXES")):
                _look_for(f"--{flag} ", "file", name, bare)
    _look_for("--model_name_or_path ", "folder", texts.get("model_name_or_path"), may_be_of_hub=True)
    wanted = texts.get("resume_from_checkpoint", "")
    if wanted.lower() not in ("true", "false", "auto", "none"):
        _look_for("--resume_from_checkpoint ", "folder", wanted)
    check_overwrites(texts.get("output_dir", ""), wanted, given.get("overwrite_output_dir", False))
    weights_file = texts.get("lisa_weights_file", "").partition("#")[0]  # not a column of it
    _look_for("--lisa_weights_file ", "file", weights_file)


def _listed(value: Any) -> list[str]:
    """What several words give, or a recipe's text."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _look_for(flag: str, what: str, *names: str | None, may_be_of_hub: bool = False) -> None:
    """Raise UserError, with the first of the names, where there is none of them."""
    name = names[0]
    if name and (is_path(name) or not may_be_of_hub) and all(_is_missing(str(one)) for one in names):
        raise UserError(f"{flag}{in_one_line(name)}: no such {what}.")


def _look_for_model(name: str | None) -> None:
    if name is None or shipped_name(name) or not _is_missing(name):
        return
    if is_path(name):
        raise UserError(f"--model {name}: no such file or folder.")
    nearest = nearest_name(name)
    if nearest is not None and "/" not in name:
        raise UserError(f"--model {name}: no such folder, and no shipped name; did you mean {nearest}?")


def _is_missing(name: str) -> bool:
    """Whether there is nothing of this name; of one that cannot be looked at, what opens it says why."""
    try:
        os.stat(name)
    except OSError as error:  # of other numbers, it is not allowed, or is broken
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    except ValueError:  # a null byte
        return False
    return False
