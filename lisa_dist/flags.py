"""Flags and recipes of dataclasses: read, and refused with the nearest known name before anything is started."""

import argparse
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from trl import TrlParser

from lisa_dist.errors import UserError
from lisa_dist.files import read_yaml
from lisa_dist.flag_words import NUMBER_OR_WORD, WordParser, finite, read_bool, split_config
from lisa_dist.presets import LORA, PRESETS
from lisa_dist.text import in_one_line


class FlagParser(WordParser, HfArgumentParser):
    """Flags of dataclasses; its errors are for users, and its help fits a screen."""

    def __init__(self, dataclass_types: Sequence[Any], usage: str, groups: Mapping[str, Mapping[str, str]]):
        # An abbreviation that is unique today is another flag tomorrow, and hides a mistyped one.
        super().__init__(dataclass_types, usage=usage, allow_abbrev=False)
        self.groups = groups
        self.kinds = {name: _kinds(hint) for one in dataclass_types for name, hint in get_type_hints(one).items()}
        for action in self._actions:
            if action.type is int or action.type is float:
                action.type = finite(action.type, NUMBER_OR_WORD.get(action.dest, ()))
            elif action.type is string_to_bool:
                action.type = read_bool
        for action in self._actions if "lisa_preset" in self.kinds else ():
            if action.dest in PRESETS[LORA]:
                action.shown = "by --lisa_preset"  # type: ignore[attr-defined]  # `print_help` reads it
        self.add_argument("--help_all", action=_HelpAll, nargs=0, dest=SUPPRESS, default=SUPPRESS, help="All flags.")

    def given(self, words: Sequence[str]) -> list[str]:
        """The names that checked words and their recipe give, in that order, each once."""
        words = split_config(words)
        names = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
        if "--config" in words:
            names += [name for name in read_yaml("--config", words[words.index("--config") + 1]) if name != "env"]
        return [name for name in dict.fromkeys(names) if name not in ("config", "local_rank")]

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> Any:
        """The base's. What the arguments of transformers and TRL refuse is the user's to mend, as what ours refuse."""
        try:
            return super().parse_args_into_dataclasses(*args, **kwargs)
        except (ValueError, ImportError) as error:  # ours too, whose values may have line breaks
            raise UserError(in_one_line(error)) from error


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


class RunParser(FlagParser, TrlParser):
    """The same with a recipe in YAML, as TRL reads one."""

    def check(self, argv: Sequence[str] | None = None) -> list[str]:
        """The words for `parse_args_and_config`, once each is known and the recipe of `--config` is one."""
        return self.check_with_recipe(sys.argv[1:] if argv is None else argv)

    def set_defaults_with_config(self, **recipe: Any) -> list[str]:
        """TRL's, once each value is one that its flag takes."""
        return TrlParser.set_defaults_with_config(self, **self.as_given(recipe))


def _kinds(hint: Any) -> set[Any]:
    """The types in a hint: of `dict[str, int] | str | None` dict, str and NoneType."""
    origin = get_origin(hint)
    return (
        {hint if origin is None else origin}
        if origin in (None, list, dict)
        else {kind for part in get_args(hint) for kind in _kinds(part)}
    )
