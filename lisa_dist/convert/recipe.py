"""The recipe that a configuration of another tool becomes, and what became of each of its keys."""

import math
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import yaml

from lisa_dist.convert.llama_factory_rules import BADAM
from lisa_dist.convert.ms_swift_rules import OTHER_HUB
from lisa_dist.convert.reading import LLAMA_FACTORY, SWIFT, TOOLS, read, tool_of
from lisa_dist.convert.rule import Flags, Given, NoCounterpart
from lisa_dist.convert.rules import DEFAULTS, OF_GRPO, OF_LISA, OF_LORA, RULES
from lisa_dist.convert.task_rules import flattened, task_given
from lisa_dist.errors import UserError
from lisa_dist.tasks import GRPO, OF_SFT, SFT
from lisa_dist.text import in_one_line

_SHELL = re.compile(r"\$[({]|\$\w|`")
_BATCH_OF_SWIFT = 16  # examples of a step, where nothing is said of accumulation


@dataclass
class Converted:
    """A recipe: flags, remarks on keys that are nothing here, and those that may go, with the reason."""

    tool: str
    flags: Flags = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    defaults: Flags = field(default_factory=dict)  # of the other tool, which its configuration relied on


def convert(path: str, tool: str | None, known_flags: Callable[[str], Container[str]]) -> Converted:
    """The recipe of a configuration, by the flags of a run of each task.

    Raises UserError for a file of no known tool.
    """
    configured = read(path)
    tool = tool or tool_of(configured)
    if tool is None:
        raise UserError(f"{path}: it cannot be told whose keys these are; give --tool, one of {', '.join(TOOLS)}.")
    if tool not in TOOLS:
        raise UserError(f"--tool {tool}: unknown; choose one of {', '.join(TOOLS)}.")
    found, task = Converted(tool), task_given(tool, configured)
    known = known_flags(task)
    given = flattened(tool, configured)
    for key, value in given.items():
        try:
            _take(found, key, value, given, known)
        except NoCounterpart as none:
            found.flags |= none.flags
            found.remarks[key] = f"{in_one_line(value)}: {none}"
    _add_defaults(found, given, task)
    if task != SFT:
        _leave_out_what_is_of_sft(found, task, known)
    return found


def _leave_out_what_is_of_sft(found: Converted, task: str, known: Container[str]) -> None:
    """Flags that the task has not."""
    for flags in (found.flags, found.defaults):
        for name in [name for name in flags if name != "env" and (name not in known or name in OF_SFT)]:
            value = flags.pop(name)
            if flags is found.flags:
                found.gone[name] = f"for --task {SFT}, it was {in_one_line(value)}; this is {task}"


def _take(found: Converted, key: str, value: Any, given: Given, known: Container[str]) -> None:
    rule = RULES[found.tool].get(key)
    if value is None and key != "pt":  # YAML's way to say nothing, or a word of the command
        return
    if any(isinstance(one, str) and _SHELL.search(one) for one in (value if isinstance(value, list) else [value])):
        raise NoCounterpart("the shell would have made a value of it; give one")
    if rule is None:
        if key not in known:
            raise NoCounterpart("nothing here is like it; lisa-dist train --help_all lists all there is")
        found.flags[key] = value
    elif callable(rule):
        try:
            flags = rule(value, given)
        except (
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
        ) as error:  # a value of a kind that the tool takes not
            raise NoCounterpart(f"no value that {found.tool} takes") from error
        env = found.flags.get("env", {}) | flags.pop("env", {})
        found.flags |= flags | ({"env": env} if env else {})
    elif rule.startswith("("):
        found.gone[key] = rule.strip("()")
    elif rule.isidentifier():
        found.flags[rule] = value
    else:
        raise NoCounterpart(rule)


def _add_defaults(found: Converted, given: Given, task: str) -> None:
    """What the configuration relied on, and nothing of LISA for another method."""
    defaults = dict(DEFAULTS[found.tool])
    if found.tool == LLAMA_FACTORY and given.get("use_badam"):
        found.flags["method"] = "lisa"
        defaults |= BADAM
        if given.get("badam_switch_mode") == "fixed":  # no sampler is near to it
            del defaults["lisa_sampler"]
    elif found.flags.get("lisa_activated_layers") and given.get("use_lisa", True):
        defaults["method"] = "lisa"
    if found.tool == SWIFT:
        defaults |= _defaults_of_swift(found, given)
    if found.tool == SWIFT and "use_hf" not in given and not given.get("USE_HF"):
        found.remarks["use_hf"] = OTHER_HUB
    defaults |= OF_GRPO.get(found.tool, {}) if task == GRPO else {}
    method = found.flags.get("method", defaults["method"])
    if method == "lisa":
        defaults |= OF_LISA.get(found.tool, {})
    if method == "lora":
        defaults |= OF_LORA.get(found.tool, {})
        if found.tool == LLAMA_FACTORY:
            defaults["lora_alpha"] = 2 * found.flags.get("lora_r", defaults["lora_r"])
    found.defaults = {name: value for name, value in defaults.items() if name not in found.flags}
    if (found.flags | found.defaults)["method"] != "lisa":
        for name in [name for name in found.flags if name.startswith("lisa_")]:
            found.gone[name] = f"for --method lisa, it was {found.flags.pop(name)}"


def _defaults_of_swift(found: Converted, given: Given) -> Flags:
    """Sixteen examples a step, as nearly as micro-batches make them; evaluation with checkpoints."""
    defaults: Flags = {}
    if "gradient_accumulation_steps" not in given:
        rows = found.flags.get("per_device_train_batch_size", 1)
        if _BATCH_OF_SWIFT % rows:
            defaults["gradient_accumulation_steps"] = math.ceil(_BATCH_OF_SWIFT / rows)
        else:
            defaults["global_batch_size"] = _BATCH_OF_SWIFT
    if {"eval_rows", "eval_dataset_name"} & found.flags.keys():
        defaults["eval_strategy"] = "steps"  # as checkpoints are saved there
    return defaults


def format_recipe(found: Converted, path: str) -> str:
    """The recipe as YAML; what is nothing here is in its comments."""
    lines = [f"# {in_one_line(path)} of {found.tool}, as a recipe of lisa-dist train."]
    lines += _as_yaml(found.flags)
    if found.defaults:
        lines += ["", f"# What {found.tool} does where nothing is said of it."]
        lines += _as_yaml(found.defaults)
    if found.remarks:
        lines += ["", "# Nothing here is quite like these; what to do:"]
        lines += [f"#   {key}: {remark}" for key, remark in found.remarks.items()]
    if found.gone:
        lines += ["", "# These may go:"]
        lines += [f"#   {key}: {reason}" for key, reason in found.gone.items()]
    return "\n".join([*lines, ""])


def _as_yaml(flags: Flags) -> list[str]:
    lines = []
    for name, value in flags.items():
        inner = yaml.safe_dump([value], allow_unicode=True, default_flow_style=True, width=math.inf).strip()[1:-1]
        lines.append(f"{name}: {inner}")
    return lines
