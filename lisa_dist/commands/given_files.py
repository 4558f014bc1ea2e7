"""What is wrong with the words of a verb by themselves: files that are not there, sizes. Before torch is imported.

What may be a name of the hub is left to what loads it.
"""

import errno
import os
import re
from collections.abc import Mapping
from typing import Any

from lisa_dist.definitions import read
from lisa_dist.ds_config import find_ds_config
from lisa_dist.errors import UserError
from lisa_dist.files import check_new_file
from lisa_dist.model_names import is_path, nearest_name, shipped_name
from lisa_dist.run_folder import check_overwrites
from lisa_dist.tasks import SFT, check_rewards_given, refuse_flags_of_sft
from lisa_dist.text import in_one_line, parse_bytes


def look_for_files(verb: str, given: Mapping[str, Any]) -> None:
    """Raise UserError for the first that is missing, of the flags, or the words, of a verb or of its recipe."""
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
        for folder in given["words"][: 1 if verb == "export" else None]:
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
    _look_for(
        "--lisa_weights_file ", "file", texts.get("lisa_weights_file", "").partition("#")[0]
    )  # not a column of it


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
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG  # else it is not allowed, or is broken
    except ValueError:  # a null byte
        return False
    return False
