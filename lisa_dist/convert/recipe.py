"""The recipe that a configuration of another tool becomes, and what became of each of its keys."""

import math
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import yaml

from lisa_dist.convert.axolotl_rules import AXOLOTL_RULES
from lisa_dist.convert.llama_factory_rules import BADAM, FACTORY_RULES, task_of
from lisa_dist.convert.lmflow_rules import LMFLOW_RULES
from lisa_dist.convert.ms_swift_rules import OTHER_HUB, SWIFT_RULES
from lisa_dist.convert.reading import AXOLOTL, LLAMA_FACTORY, LMFLOW, SWIFT, TOOLS, read, tool_of
from lisa_dist.convert.rule import COMMON, TASKS, Flags, Given, NoCounterpart
from lisa_dist.errors import UserError
from lisa_dist.tasks import OF_SFT, REWARD, SFT
from lisa_dist.text import in_one_line

RULES = {AXOLOTL: AXOLOTL_RULES, LLAMA_FACTORY: FACTORY_RULES, SWIFT: SWIFT_RULES, LMFLOW: LMFLOW_RULES}

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
    found, task = Converted(tool), _task_of(tool, configured)
    known = known_flags(task)
    given, inner = configured, configured.get("trl")
    if tool == AXOLOTL and isinstance(inner, dict):  # whose keys are flags beside the others here
        given = {key: value for key, value in configured.items() if key != "trl"} | inner
    for key, value in given.items():
        try:
            _take(found, key, value, given, known)
        except NoCounterpart as none:
            found.flags |= none.flags
            found.remarks[key] = f"{in_one_line(value)}: {none}"
    _add_defaults(found, given, task)
    for name in found.flags | found.defaults if task != SFT else ():
        if name == "env" or (name in known and name not in OF_SFT):
            continue
        found.defaults.pop(name, None)
        if name in found.flags:
            found.gone[name] = f"for --task {SFT}, it was {in_one_line(found.flags.pop(name))}; this is {task}"
    return found


def _task_of(tool: str, given: Given) -> str:
    """The task of a configuration; sft where it says none, or one that is nothing here."""
    if tool == LLAMA_FACTORY:
        return task_of(given)
    if tool == AXOLOTL and given.get("reward_model") is True:
        return REWARD
    word = given.get({AXOLOTL: "rl", SWIFT: "rlhf_type"}.get(tool, ""))
    return TASKS.get(str(word), {"task": SFT})["task"]


def _take(found: Converted, key: str, value: Any, given: Given, known: Container[str]) -> None:
    rule = (COMMON | RULES[found.tool].rules).get(key)
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
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # of another kind
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
    defaults, more = dict(RULES[found.tool].defaults), RULES[found.tool].more_defaults
    if found.tool == LLAMA_FACTORY and given.get("use_badam"):
        found.flags["method"] = "lisa"
        defaults |= BADAM
        if given.get("badam_switch_mode") == "fixed":  # no sampler is near to it
            del defaults["lisa_sampler"]
    elif found.flags.get("lisa_activated_layers") and given.get("use_lisa", True):
        defaults["method"] = "lisa"
        if found.tool == SWIFT and found.flags.get("method") == "full":
            found.flags["method"] = "lisa"
    if found.tool == SWIFT:
        if "gradient_accumulation_steps" not in given:
            rows = found.flags.get("per_device_train_batch_size", 1)
            if _BATCH_OF_SWIFT % rows:  # as nearly as micro-batches make them
                defaults["gradient_accumulation_steps"] = math.ceil(_BATCH_OF_SWIFT / rows)
            else:
                defaults["global_batch_size"] = _BATCH_OF_SWIFT
        if {"eval_rows", "eval_dataset_name"} & found.flags.keys():
            defaults["eval_strategy"] = "steps"  # as checkpoints are saved there
        if "use_hf" not in given and not given.get("USE_HF"):
            found.remarks["use_hf"] = OTHER_HUB
    method = found.flags.get("method", defaults["method"])
    defaults |= more.get(task, {}) | more.get(method, {})
    if found.tool == LLAMA_FACTORY and method == "lora":
        defaults["lora_alpha"] = 2 * found.flags.get("lora_r", defaults["lora_r"])
    found.defaults = {name: value for name, value in defaults.items() if name not in found.flags}
    if method != "lisa":
        for name in [name for name in found.flags if name.startswith("lisa_")]:
            found.gone[name] = f"for --method lisa, it was {found.flags.pop(name)}"


def format_recipe(found: Converted, path: str) -> str:
    """The recipe as YAML; what is nothing here is in its comments."""
    lines = [f"# {in_one_line(path)} of {found.tool}, as a recipe of lisa-dist train.", *_as_yaml(found.flags)]
    if found.defaults:
        lines += ["", f"# What {found.tool} does where nothing is said of it.", *_as_yaml(found.defaults)]
    about = {"Nothing here is quite like these; what to do": found.remarks, "These may go": found.gone}
    for title, texts in about.items():
        if texts:
            lines += ["", f"# {title}:", *(f"#   {key}: {text}" for key, text in texts.items())]
    return "\n".join([*lines, ""])


def _as_yaml(flags: Flags) -> list[str]:
    lines = []
    for name, value in flags.items():
        inner = yaml.safe_dump([value], allow_unicode=True, default_flow_style=True, width=math.inf).strip()[1:-1]
        lines.append(f"{name}: {inner}")
    return lines
