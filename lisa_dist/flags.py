"""Flags and recipes: read, and refused with the nearest known name before anything is started."""

import argparse
import difflib
import re
import sys
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from trl import TrlParser

from lisa_dist.errors import UserError

# Names in LMFlow, Axolotl, ms-swift and LLaMA-Factory, and here.
_ELSEWHERE = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "datasets": "dataset_name",
    "dataset": "dataset_name",
    "dataset_path": "dataset_name",
    "test_datasets": "eval_dataset_name",
    "val_dataset": "eval_dataset_name",
    "val_set_size": "eval_rows",
    "val_size": "eval_rows",
    "split_dataset_ratio": "eval_rows",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "block_size": "max_length",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "template": "chat_template_path",
    "chat_template": "chat_template_path",
    "train_on_prompt": "train_on_inputs",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "flash_attn": "attn_implementation",
    "attn_impl": "attn_implementation",
    "num_gpus": "gpus",
    "finetuning_type": "method",
    "adapter": "method",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "lora_target_linear": "lora_target_modules",
    "tuner_type": "method",
    "train_type": "method",
    "use_lisa": "method",
    "use_badam": "method",
    "lisa_n_layers": "lisa_activated_layers",
    "lisa_step_interval": "lisa_interval_steps",
    "badam_switch_interval": "lisa_interval_steps",
    "badam_switch_mode": "lisa_sampler",
}


class FlagParser(HfArgumentParser):
    """Flags of dataclasses; its errors are for users, and its help fits a screen.

    `groups` are the headings of that screen, each with flags and a few words on them; all others are in `--help_all`.
    """

    def __init__(self, dataclass_types: Sequence[Any], usage: str, groups: Mapping[str, Mapping[str, str]]):
        # An abbreviation that is unique today is another flag tomorrow, and hides a slip of the pen.
        super().__init__(dataclass_types, usage=usage, allow_abbrev=False)
        self._groups = groups
        self.add_argument("--help_all", action=_HelpAll, nargs=0, dest=SUPPRESS, default=SUPPRESS, help="All flags.")

    def print_help(self, file: Any = None) -> None:
        """The flags of the groups, a line each: name, default, what it is."""
        actions = {action.dest: action for action in self._actions}
        lines = [f"usage: {self.usage}"]
        for heading, flags in self._groups.items():
            lines += ["", heading, *(_line_of(actions[name], what) for name, what in flags.items())]
        print("\n".join([*lines, "", "--help_all lists every flag."]), file=file or sys.stdout)

    def error(self, message: str) -> NoReturn:
        """In place of all flags and an exit."""
        message = re.sub(r"^argument (--\w+)[^:]*", r"\1", message)  # without the other way to write it
        raise UserError(f"{message}.")

    def check_words(self, words: Sequence[str]) -> None:
        """Raise UserError for a word that is no flag and belongs to none."""
        for word in self.parse_known_args(list(words))[1]:
            if not word.startswith("-"):
                raise UserError(f"{word}: belongs to no flag; flags begin with --.")
            flag = word.partition("=")[0]
            raise UserError(f"{flag}: no such flag; {_nearest(flag, self._option_string_actions)}")


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
        """The words for `parse_args_and_config`, once each is known and the recipe of `--config` is one.

        Raises UserError naming the flag or the key. `--help` is answered here.
        """
        words = []
        for word in sys.argv[1:] if argv is None else argv:
            words += word.split("=", 1) if word.startswith("--config=") else [word]
        if "--config" in words:
            at = words.index("--config")
            if at + 1 == len(words):
                raise UserError("--config is the last word: give a recipe, such as launch/recipes/quickstart.yaml.")
            self._check_recipe(words[at + 1])
        else:
            at = len(words)
        self.check_words(words[:at] + words[at + 2 :])
        return words

    def given(self, words: Sequence[str]) -> list[str]:
        """The names that `check`ed words and their recipe give, in that order, each once."""
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        if "--config" in words:
            recipe = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text(encoding="utf-8"))
            names += [name for name in recipe if name != "env"]
        return [name for name in dict.fromkeys(names) if name not in ("config", "local_rank")]

    def _check_recipe(self, path: str) -> None:
        flag = f"--config {path}"
        try:
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{flag}: no such file.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{flag}: cannot be read ({error}).") from error
        except yaml.YAMLError as error:
            raise UserError(f"{flag}: is not YAML ({error}).") from error
        if not isinstance(recipe, dict):
            raise UserError(f"{flag}: must hold keys and values, such as learning_rate: 1.0e-5.")
        if not isinstance(recipe.get("env", {}), dict):
            raise UserError(f"{flag}: env must hold variables and their values.")
        known = {action.dest for action in self._actions}
        for key in recipe:
            if key not in known and key != "env":
                raise UserError(f"{flag}: {key}: no such key; {_nearest(str(key), known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    """What it is called here, if it is another tool's; else the known name that is most like it, or where all are."""
    ours = _ELSEWHERE.get(name.lstrip("-"))
    if ours is not None:
        return f"here it is {'--' if name.startswith('--') else ''}{ours}: docs/coming_from.md."
    found = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), [*known], n=1)
    return f"did you mean {found[0]}?" if found else "--help_all lists them."


def _line_of(action: argparse.Action, what: str) -> str:
    default = "" if action.default is None else getattr(action.default, "value", action.default)
    default = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return f"  --{action.dest:<29}{default:<19}{what}".rstrip()
