"""What words of a command line and keys of a recipe are: known or not, with the nearest known name.

All of it is argparse's, which is imported at once: mistyped flags are answered before torch is loaded.
"""

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, NoReturn

from lisa_dist.config_rules import PLANNED_LAYERS
from lisa_dist.errors import UserError
from lisa_dist.files import read_yaml
from lisa_dist.removed import refuse_removed_words, without_removed
from lisa_dist.text import in_one_line

# Names here, and in LMFlow, Axolotl, ms-swift and LLaMA-Factory.
_NAMES_ELSEWHERE = {
    "model_name_or_path": ("base_model", "model"),
    "dataset_name": ("datasets", "dataset", "dataset_path"),
    "eval_dataset_name": ("test_datasets", "val_dataset"),
    "eval_rows": ("val_set_size", "val_size", "split_dataset_ratio"),
    "max_length": ("sequence_len", "cutoff_len", "block_size"),
    "packing": ("sample_packing", "neat_packing"),
    "chat_template_path": ("template", "chat_template"),
    "train_on_inputs": ("train_on_prompt",),
    "per_device_train_batch_size": ("micro_batch_size",),
    "num_train_epochs": ("num_epochs",),
    "optim": ("optimizer",),
    "lr_scheduler_type": ("lr_scheduler",),
    "warmup_steps": ("warmup_ratio",),
    "attn_implementation": ("flash_attn", "attn_impl"),
    "gpus": ("num_gpus", "gpu", "nproc_per_node"),
    "method": ("finetuning_type", "adapter", "tuner_type", "train_type", "use_lisa", "use_badam"),
    "lora_r": ("lora_rank",),
    "lora_target_modules": ("lora_target", "lora_target_linear"),
    "lisa_activated_layers": ("lisa_n_layers",),
    "lisa_interval_steps": ("lisa_step_interval", "badam_switch_interval"),
    "lisa_sampler": ("badam_switch_mode",),
}
_ELSEWHERE = {theirs: ours for ours, names in _NAMES_ELSEWHERE.items() for theirs in names}


class WordParser(argparse.ArgumentParser):
    """A parser whose errors are for users, and whose help fits a screen.

    `groups` are the headings of that screen, each with flags, and a few words on them where their help is longer; all
    others are in `--help_all`. `kinds` are the types that a recipe's value of each flag may have.
    """

    groups: Mapping[str, Mapping[str, str] | Sequence[str]]
    kinds: Mapping[str, set[Any]]
    env: Mapping[str, str] = {}  # variables of the recipe

    def print_help(self, file: Any = None) -> None:
        """The flags of the groups, a line each: name, default, what it is."""
        actions = {action.dest: action for action in self._actions}
        lines = [f"usage: {self.usage}"]
        for heading, flags in self.groups.items():
            words = (
                flags if isinstance(flags, Mapping) else {name: str(actions[name].help).rstrip(".") for name in flags}
            )
            lines += ["", heading, *(_line_of(actions[name], what) for name, what in words.items())]
        print("\n".join([*lines, "", "--help_all lists every flag."]), file=file or sys.stdout)

    def error(self, message: str) -> NoReturn:
        """In place of all flags and an exit."""
        message = re.sub(r"^argument (--\w+)[^:]*", r"\1", message)  # without the other way to write it
        raise UserError(f"{in_one_line(message)}.")

    def check_words(self, words: Sequence[str]) -> None:
        """Raise UserError for a word that is no flag and belongs to none."""
        for word in words:
            if word.startswith("--") and word.endswith("=--"):  # of which argparse makes an empty list
                raise UserError(f"{word}: -- is no value.")
        unknown = self.parse_known_args(list(words))[1]
        refuse_removed_words(unknown)
        for word in unknown:
            if not word.startswith("-"):
                raise UserError(f"{word}: belongs to no flag; flags begin with --.")
            flag = word.partition("=")[0]
            raise UserError(f"{flag}: no such flag; {nearest(flag, self._option_string_actions)}")

    def check_with_recipe(self, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """The words without `--config`, and its recipe, once each word and key is known; its values are defaults then.

        Raises UserError naming the flag or the key. `--help` is answered here.
        """
        (paths,), words = take(argv, "--config")
        others = self.parse_known_args(words)[1]
        if len(paths) > 1 or (paths and any(word.endswith((".yaml", ".yml")) for word in others)):
            raise UserError("--config: two recipes are given, and a run has one; give what differs as flags.")
        if paths == [""]:
            raise UserError("--config is the last word: give a recipe, such as launch/recipes/quickstart.yaml.")
        recipe = self._check_recipe(paths[0]) if paths else {}
        self.check_words(words)
        return words, recipe

    def as_given(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's values as flags take them: argparse reads texts as it reads words."""
        actions = {action.dest: action for action in reversed(self._actions)}  # not --no_NAME, which comes second
        recipe = without_removed(recipe)
        return {name: _as_given(actions[name], self.kinds[name], value) for name, value in recipe.items()}

    def _check_recipe(self, path: str) -> dict[str, Any]:
        flag = f"--config {path}"
        recipe = read_yaml("--config", path)
        if not isinstance(recipe, dict):
            raise UserError(f"{flag}: must hold keys and values, such as learning_rate: 1.0e-5.")
        variables = recipe.pop("env", {})
        if not isinstance(variables, dict):
            raise UserError(f"{flag}: env must hold variables and their values.")
        for name, value in variables.items():
            if not isinstance(name, str) or not re.fullmatch(r"[^=\0]+", name) or not isinstance(value, _SCALARS):
                raise UserError(f"{flag}: env: {name}: {value}: a variable has a name, and a text or a number.")
        known = {action.dest for action in self._actions if action.dest != "help"}
        for key in without_removed(recipe, f"{flag}: "):
            if key not in known:
                raise UserError(f"{flag}: {in_one_line(key)}: no such key; {nearest(str(key), known)}")
        try:
            given = self.as_given(recipe)  # whose texts `check_words` reads
        except UserError as error:
            raise UserError(f"{flag}: {in_one_line(error)}") from error
        for action in self._actions:
            if action.dest in given:
                action.default, action.required = given[action.dest], False
        self.env = {name: str(value) for name, value in variables.items()}
        return given


# Flags whose value is a number or one of these words; LisaConfig refuses the last.
NUMBER_OR_WORD = {"lisa_activated_layers": PLANNED_LAYERS, "lisa_interval_steps": ("auto",)}
_SCALARS = (str, int, float)  # bool is an int
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def first_word_as(flag: str, words: Sequence[str]) -> list[str]:
    """The words; a first one that is no flag is the value of `flag`."""
    return [flag, *words] if words and not words[0].startswith("-") else [*words]


def take(words: Sequence[str], *flags: str) -> tuple[list[list[str]], list[str]]:
    """The values of some flags, "" for one that has none, and the words without them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag, dest=flag, action="append", nargs="?", const="", default=[])
    found, others = parser.parse_known_args([*words])
    return [getattr(found, flag) for flag in flags], others


def read_bool(text: str | bool) -> bool:
    """What argparse reads for a flag that is true or false."""
    if isinstance(text, bool):
        return text
    for value, named in ((True, _TRUE), (False, _FALSE)):
        if text.lower() in named:
            return value
    raise argparse.ArgumentTypeError(f"{text} is neither true nor false")


def finite(kind: Callable[[str], Any], words: Sequence[str] = ()) -> Callable[[str], Any]:
    """Reads a finite number in ASCII, an integer of 64 bits: Python's own take nan, and digits of any script.

    Or one of `words`, in the place of a number.
    """

    def read(text: str) -> Any:
        if text in words:
            return text
        value = kind(text)
        if not text.isascii() or not math.isfinite(value) or (kind is int and abs(value) >= 2**63):
            raise ValueError
        return value

    read.__name__ = kind.__name__  # for argparse's message
    return read


def _as_given(action: argparse.Action, kinds: set[Any], value: Any) -> Any:
    """A recipe's value as its flag takes it. Raises UserError, with the key, for null, a date, ... where it is none."""
    if (value is None and NoneType in kinds) or (isinstance(value, bool) and bool in kinds):
        return value
    if isinstance(value, bool):
        if not value and "no" in (action.choices or ()):
            return "no"  # as it was written, if it was not quoted
        if action.dest == "resume_from_checkpoint":
            return str(value).lower()
    elif isinstance(value, dict) and dict in kinds and _is_json(value):
        return value
    elif isinstance(value, list) and list in kinds and value and all(type(one) in _SCALARS for one in value):
        return [_read(action, one) for one in value]
    elif isinstance(value, _SCALARS):
        if list in kinds and str not in kinds and not isinstance(value, str):
            return [_read(action, value)]
        if action.choices and value not in action.choices:
            raise UserError(f"{action.dest}: {value}: choose one of {', '.join(map(str, action.choices))}.")
        return str(value)
    named = {NoneType: "null", list: "a list", dict: "an object", bool: "true or false"}
    kind = named.get(type(value), f"a {type(value).__name__}")
    raise UserError(
        f"{action.dest}: {in_one_line(value)}: {kind} is no value of this key; put a text in quotes, and leave the key "
        "out for its default."
    )


def _read(action: argparse.Action, value: object) -> Any:
    """One value of several, as argparse reads a word."""
    read: Any = action.type or str
    try:
        return read(str(value))
    except ValueError as error:
        raise UserError(f"{action.dest}: {value}: is no {getattr(read, '__name__', 'value')}.") from error


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # a date, or an object in itself
        return False
    return True


def nearest(name: str, known: Iterable[str]) -> str:
    """What it is called here, if it is another tool's; else the known name that is most like it, or where all are."""
    ours = _ELSEWHERE.get(name.lstrip("-"))
    if ours is not None:
        return f"here it is {'--' if name.startswith('--') else ''}{ours}: docs/coming_from.md."
    found = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), [*known], n=1)
    return f"did you mean {found[0]}?" if found else "--help_all lists them."


def _line_of(action: argparse.Action, what: str) -> str:
    default = getattr(action, "shown", action.default)
    default = "" if default is None else getattr(default, "value", default)
    default = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return f"  --{action.dest:<29}{default:<19}{what}".rstrip()
