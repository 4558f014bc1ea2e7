"""The parser of a verb's flags, which are fields of dataclasses: imported, or read from their sources.

Mistyped flags and keys of a recipe are answered, with the nearest known name, before torch is loaded.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from lisa_dist.config_rules import AUTO_LAYERS
from lisa_dist.errors import UserError
from lisa_dist.files import read_yaml
from lisa_dist.presets import ADAPTERS, OPTIMIZERS, PRESETS
from lisa_dist.removed import refuse_removed_flags, without_removed
from lisa_dist.tasks import OF_SFT, SFT, check_task
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
    "learning_rate": ("lr",),
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
# Flags whose value is a number or one of these words; LisaConfig refuses the last.
_NUMBER_OR_WORD = {"lisa_activated_layers": (AUTO_LAYERS, "lora"), "lisa_interval_steps": ("auto",)}
_SCALARS = (str, int, float)  # bool is an int
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


class FlagParser(argparse.ArgumentParser):
    """Flags of dataclasses, by the rules of transformers' HfArgumentParser; its errors are for users.

    `groups` are the headings of the screen of help, each with flags, and a few words on them where their help is
    longer; all others are in `--help_all`.
    """

    def __init__(
        self,
        dataclass_types: Sequence[Any],
        usage: str,
        groups: Mapping[str, Mapping[str, str] | Sequence[str]],
        takes_recipe: bool = False,
    ):
        # An abbreviation that is unique today is another flag tomorrow, and hides a mistyped one.
        super().__init__(usage=usage, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.dataclass_types, self.groups, self.takes_recipe = dataclass_types, groups, takes_recipe
        self.kinds: dict[str, set[Any]] = {}  # by flag, the types that a recipe's value of it may have
        self.env: dict[str, str] = {}  # variables of the recipe
        for one in dataclass_types:
            hints = get_type_hints(one)
            for field in fields(one):
                if field.init:
                    self.kinds[field.name] = _kinds(hints[field.name])
                    self._add_field(field, _kind_of_word(hints[field.name]))
        self.add_argument("--help_all", action=_HelpAll, nargs=0, dest=SUPPRESS, default=SUPPRESS, help="All flags.")

    def _add_field(self, field: Field, kind: Any) -> None:
        words = {name: value for name, value in field.metadata.items() if value is not None}
        aliases = words.pop("aliases", [])
        names = [f"--{field.name}", *([f"--{field.name.replace('_', '-')}"] if "_" in field.name else [])]
        names += [aliases] if isinstance(aliases, str) else aliases
        default = field.default if field.default_factory is MISSING else field.default_factory()
        help_text, is_bool = words.get("help"), kind in (bool, bool | None)
        if get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
            choices = get_args(kind) or [one.value for one in kind]
            by_text = {str(choice): choice for choice in choices}
            words |= {"choices": choices, "type": lambda text: by_text.get(text, text)}
        elif is_bool:
            default = False if default is MISSING else default
            words["type"] = read_bool
            if kind is bool or default is not None:
                words |= {"nargs": "?", "const": True}
        elif get_origin(kind) is list:
            default = None if isinstance(default, str) else default  # a text is no list of what its words are read as
            words |= {"type": _reader(get_args(kind)[0], field.name), "nargs": "+"}
        else:
            words["type"] = _reader(kind, field.name)
        if words.pop("is_positional", False):
            self.add_argument(field.name, **words)
            return
        self.add_argument(*names, **words, **({"required": True} if default is MISSING else {"default": default}))
        if default is True and is_bool:
            off = [f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"]
            self.add_argument(*off, action="store_false", default=False, dest=field.name, help=help_text)

    def print_help(self, file: Any = None) -> None:
        """The flags of the groups, a line each: name, default, what it is."""
        actions = {action.dest: action for action in self._actions}
        by_preset = PRESETS[ADAPTERS] | OPTIMIZERS[ADAPTERS] if "lisa_preset" in actions else {}
        lines = [f"usage: {self.usage}"]
        for heading, flags in self.groups.items():
            lines += ["", heading]
            for name in flags:
                action = actions[name]
                what = flags[name] if isinstance(flags, Mapping) else str(action.help).rstrip(".")
                default = "by --lisa_preset" if name in by_preset else getattr(action.default, "value", action.default)
                default = " ".join(map(str, default)) if isinstance(default, list) else default
                lines.append(f"  --{name:<29}{'' if default is None else str(default):<19}{what}".rstrip())
        print("\n".join([*lines, "", "--help_all lists every flag."]), file=file or sys.stdout)

    def error(self, message: str) -> NoReturn:
        """In place of all flags and an exit."""
        message = re.sub(r"^argument (--\w+)[^:]*", r"\1", message)  # without the other way to write it
        action = self._option_string_actions.get(message.partition(":")[0])
        if action is not None and action.type is read_bool and message.endswith("expected one argument"):
            message += ": true or false"
        raise UserError(f"{in_one_line(message)}.")

    def check(self, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """The words without `--config`, and its recipe, once each word and key is known; its values are defaults then.

        Raises UserError naming the flag or the key. `--help` is answered here.
        """
        words, recipe = [*argv], {}
        if self.takes_recipe:
            (paths,), words = take(argv, "--config")
            others = self.parse_known_args(words)[1]
            if len(paths) > 1 or (paths and any(word.endswith((".yaml", ".yml")) for word in others)):
                raise UserError("--config: two recipes are given, and a run has one; give what differs as flags.")
            if paths == [""]:
                raise UserError("--config is the last word: give a recipe, such as launch/recipes/quickstart.yaml.")
            recipe = self._check_recipe(paths[0]) if paths else {}
        for word in words:
            if word.startswith("--") and word.endswith("=--"):  # of which argparse makes an empty list
                raise UserError(f"{word}: -- is no value.")
        unknown = self.parse_known_args(words)[1]
        refuse_removed_flags(unknown)
        if unknown and not unknown[0].startswith("-"):
            raise UserError(f"{unknown[0]}: belongs to no flag; flags begin with --.")
        if unknown:
            flag = unknown[0].partition("=")[0]
            raise UserError(f"{flag}: no such flag; {nearest(flag, self._option_string_actions)}")
        return words, recipe

    def _check_recipe(self, path: str) -> dict[str, Any]:
        """A recipe's values as flags take them: argparse reads texts as it reads words."""
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
        self.env = {name: str(value) for name, value in variables.items()}
        actions = {action.dest: action for action in reversed(self._actions)}  # not --no_NAME, which comes second
        recipe = without_removed(recipe, f"{flag}: ")
        for key in recipe:
            if key not in self.kinds:
                raise UserError(f"{flag}: {in_one_line(key)}: no such key; {nearest(str(key), self.kinds)}")
        try:
            given = {name: _as_given(actions[name], self.kinds[name], value) for name, value in recipe.items()}
        except UserError as error:
            raise UserError(f"{flag}: {in_one_line(error)}") from error
        for action in self._actions:
            if action.dest in given:
                action.default, action.required = given[action.dest], False
        return given

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """What words and their recipe give, by name and in that order."""
        words, recipe = self.check(argv)
        named = vars(self.parse_args(words, _WithoutDefaults()))
        values = vars(self.parse_args(words))
        return {name: values[name] for name in dict.fromkeys([*named, *recipe]) if name != "local_rank"}

    def parse(self, argv: Sequence[str]) -> list[Any]:
        """The dataclasses that words and a recipe make, whose `env` is set. Raises UserError, by TRL's rules too."""
        words, _ = self.check(argv)
        os.environ.update(self.env)
        values, given = vars(self.parse_args(words)), self.given(argv).keys()
        taken = [
            [name for name in _names(one) if name in given or not getattr(one, "only_given", False)]
            for one in self.dataclass_types
        ]
        try:
            return [
                one(**{name: values[name] for name in names})
                for one, names in zip(self.dataclass_types, taken, strict=True)
            ]
        except (ValueError, ImportError) as error:  # ours too, whose values may have line breaks
            raise UserError(in_one_line(error)) from error


class _WithoutDefaults(argparse.Namespace):
    """It seems to have every name already, so that argparse adds what words give alone."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):  # argparse's own
            raise AttributeError(name)


class _HelpAll(argparse.Action):
    """All that argparse has to say."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(parser.format_help())
        parser.exit()


def task_of(words: Sequence[str]) -> str:
    """The task that words of a command line, or else their recipe, ask for. Raises UserError for an unknown one."""
    (tasks, recipes), _ = take(words, "--task", "--config")
    task = tasks[-1] if tasks else ""
    if not task and recipes and recipes[-1]:
        recipe = read_yaml("--config", recipes[-1])
        task = str(recipe.get("task", "")) if isinstance(recipe, dict) else ""
    return check_task(task or SFT)


def run_parser(
    task: str,
    dataclass_types: Sequence[Any],
    usage: str,
    groups: Mapping[str, Mapping[str, str]],
    groups_of_task: Mapping[str, Mapping[str, str]],
) -> FlagParser:
    """The parser of a run of a task: what its help shows has the task's own flags before those that it shares."""
    if task != SFT:
        known = {name for one in dataclass_types for name in _names(one)} - OF_SFT.keys()
        shown = {f"Of {task}": groups_of_task[task]}
        for heading, flags in groups.items():
            shown[heading] = {name: what for name, what in flags.items() if name in known}
        groups = shown
        usage = usage.replace("recipe.yaml", f"recipe.yaml --task {task}")
    return FlagParser(dataclass_types, usage, groups, takes_recipe=True)


def _names(dataclass_type: Any) -> list[str]:
    return [field.name for field in fields(dataclass_type) if field.init]


def _kind_of_word(hint: Any) -> Any:
    """The one kind of several in a hint by which a word is read, as HfArgumentParser chooses it."""
    kinds = get_args(hint)
    if get_origin(hint) not in (Union, UnionType) or (bool in kinds and type(None) in kinds):
        return hint
    return kinds[0] if kinds[1] is (type(None) if type(None) in kinds else str) else kinds[1]


def _reader(kind: Any, name: str) -> Any:
    """What argparse reads a word by."""
    kind = get_origin(kind) or kind
    if kind in (int, float):
        return _finite(kind, _NUMBER_OR_WORD.get(name, ()))
    return kind if isinstance(kind, type) and kind is not Any else str


def _kinds(hint: Any) -> set[Any]:
    """The types in a hint: of `dict[str, int] | str | None` dict, str and NoneType."""
    origin = get_origin(hint)
    if origin in (None, list, dict):
        return {origin or hint}
    return {kind for part in get_args(hint) for kind in _kinds(part)}


def first_argument_as(flag: str, words: Sequence[str]) -> list[str]:
    """The words; a first one that is no flag is the value of `flag`."""
    return [flag, *words] if words and not words[0].startswith("-") else [*words]


def take(words: Sequence[str], *flags: str) -> tuple[list[list[str]], list[str]]:
    """The values of some flags, "" for one that has none, and the words without them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag, dest=flag, action="append", nargs="?", const="", default=[])
    found, others = parser.parse_known_args([*words])
    return [getattr(found, flag) for flag in flags], others


def read_bool(text: str) -> bool:
    """What argparse reads for a flag that is true or false."""
    if text.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() in _TRUE


def _finite(kind: Callable[[str], Any], words: Sequence[str] = ()) -> Callable[[str], Any]:
    """A reader of a finite number in ASCII, an integer of 64 bits, or one of `words`: not nan, nor another script."""

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
