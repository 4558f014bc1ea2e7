"""The parser of a verb's flags, which are fields of dataclasses: imported, or read from their sources."""

import argparse
import os
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lisa_dist.errors import UserError
from lisa_dist.flag_words import NUMBER_OR_WORD, WordParser, finite, read_bool
from lisa_dist.presets import LORA, PRESETS
from lisa_dist.tasks import OF_SFT, SFT
from lisa_dist.text import in_one_line


class FlagParser(WordParser):
    """Flags of dataclasses, by the rules of transformers' HfArgumentParser; its errors are for users."""

    def __init__(
        self,
        dataclass_types: Sequence[Any],
        usage: str,
        groups: Mapping[str, Mapping[str, str] | Sequence[str]],
        takes_recipe: bool = False,
    ):
        # An abbreviation that is unique today is another flag tomorrow, and hides a mistyped one.
        super().__init__(usage=usage, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.dataclass_types, self.groups, self.takes_recipe, self.kinds = dataclass_types, groups, takes_recipe, {}
        for one in dataclass_types:
            hints = get_type_hints(one)
            for field in fields(one):
                if field.init:
                    self.kinds[field.name] = _kinds(hints[field.name])
                    self._add_field(field, _kind_of_word(hints[field.name]))
        for action in self._actions if "lisa_preset" in self.kinds else ():
            if action.dest in PRESETS[LORA]:
                action.shown = "by --lisa_preset"  # type: ignore[attr-defined]  # `print_help` reads it
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

    def check(self, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """The words without `--config`, and its recipe, whose values are defaults then.

        Raises UserError naming the flag or the key that is unknown. `--help` is answered here.
        """
        if self.takes_recipe:
            return self.check_with_recipe(argv)
        self.check_words(argv)
        return [*argv], {}

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """What words and their recipe give, by name and in that order."""
        words, recipe = self.check(argv)
        named = vars(self.parse_args(words, _WithoutDefaults()))
        values = vars(self.parse_args(words))
        return {name: values[name] for name in dict.fromkeys([*named, *recipe]) if name != "local_rank"}

    def parse(self, argv: Sequence[str]) -> list[Any]:
        """The dataclasses that words and their recipe make; the recipe's `env` is set.

        Raises UserError for what cannot be, also where transformers and TRL say so of their arguments.
        """
        words, _ = self.check(argv)
        os.environ.update(self.env)
        values = vars(self.parse_args(words))
        try:
            return [one(**{name: values[name] for name in _names(one)}) for one in self.dataclass_types]
        except (ValueError, ImportError) as error:  # ours too, whose values may have line breaks
            raise UserError(in_one_line(error)) from error


class _WithoutDefaults(argparse.Namespace):
    """It seems to have every name already, so that argparse adds what words give alone."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):  # argparse's own
            raise AttributeError(name)


class _HelpAll(argparse.Action):
    """All that argparse has to say."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        print(parser.format_help())
        parser.exit()


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
        shared = {
            heading: {name: what for name, what in flags.items() if name in known} for heading, flags in groups.items()
        }
        groups = {f"Of {task}": groups_of_task[task]} | shared
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
        return finite(kind, NUMBER_OR_WORD.get(name, ()))
    return kind if isinstance(kind, type) and kind is not Any else str


def _kinds(hint: Any) -> set[Any]:
    """The types in a hint: of `dict[str, int] | str | None` dict, str and NoneType."""
    origin = get_origin(hint)
    return (
        {hint if origin is None else origin}
        if origin in (None, list, dict)
        else {kind for part in get_args(hint) for kind in _kinds(part)}
    )
