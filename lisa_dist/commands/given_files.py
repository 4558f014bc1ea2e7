"""What is wrong with the words of a verb by themselves: files that are not there, sizes. Before torch is imported.

What may be a name of the hub is left to what loads it.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lisa_dist.ds_config import find_ds_config
from lisa_dist.errors import UserError
from lisa_dist.files import check_new_file
from lisa_dist.model_names import is_path, nearest_name, shipped_name
from lisa_dist.run_folder import check_overwrites
from lisa_dist.text import parse_bytes


def look_for_files(verb: str, given: Mapping[str, Any]) -> None:
    """Raise UserError for the first that is missing, of the flags of a verb or of its recipe."""
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
        _look_for_folder("", texts.get("model"))
        _look_for_folder("--data_dir ", texts.get("data_dir"), may_be_name=False)
    elif verb == "norms":
        for run in given.get("runs", ()):
            if _is_missing(run) and _is_missing(run.rpartition("=")[2]):  # label=RUN
                raise UserError(f"{run}: no such file or folder.")
    elif verb == "train":
        _look_for_folder("--model_name_or_path ", texts.get("model_name_or_path"))
        wanted = texts.get("resume_from_checkpoint", "")
        if wanted.lower() not in ("", "true", "false", "auto", "none"):
            _look_for_folder("--resume_from_checkpoint ", wanted, may_be_name=False)
        check_overwrites(texts.get("output_dir", ""), wanted, given.get("overwrite_output_dir", False))
        weights = texts.get("lisa_weights_file", "").partition("#")[0]  # a column of it
        if weights and _is_missing(weights):
            raise UserError(f"--lisa_weights_file {weights}: no such file.")


def look_for_words(verb: str, words: Sequence[str]) -> None:
    """The same of a verb that has no flags."""
    if verb == "export":
        _look_for_folder("", words[0], may_be_name=False)
    elif verb == "report":
        for folder in words:
            _look_for_folder("", folder, may_be_name=False)


def _look_for_folder(flag: str, name: str | None, may_be_name: bool = True) -> None:
    if name and (is_path(name) or not may_be_name) and _is_missing(name):
        raise UserError(f"{flag}{name}: no such folder.")


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
