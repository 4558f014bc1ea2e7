"""What training by preferences and by rewards is here, by the keys of Axolotl, LLaMA-Factory and ms-swift."""

from typing import Any

from lisa_dist.convert.reading import AXOLOTL, LLAMA_FACTORY, SWIFT
from lisa_dist.convert.rule import Flags, Given, NoCounterpart, Rule

_NONE_LIKE_IT = "there is no such task here: sft, dpo, kto, orpo, reward or grpo"
_REWARDS = "a file with a function of completions, reward_funcs: rewards.py, or the name of one of trl.rewards"
_REFERENCE = "the reference model is the model as the run begins"
_TASK_KEYS = {AXOLOTL: "rl", LLAMA_FACTORY: "stage", SWIFT: "rlhf_type"}
_TASKS = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "rm": "reward", "grpo": "grpo"}
_LOSSES = {"hinge", "ipo"}  # of DPO, besides its own


def task_given(tool: str, given: Given) -> str:
    """The task of a configuration; sft where it says none, or one that is nothing here."""
    if given.get("reward_model") is True and tool == AXOLOTL:
        return "reward"
    task = _TASKS.get(str(given.get(_TASK_KEYS.get(tool, ""), "sft")), "sft")
    return "orpo" if task == "dpo" and given.get("pref_loss") == "orpo" else task


def _task(value: str, given: Given) -> Flags:
    if value not in _TASKS:
        raise NoCounterpart(_NONE_LIKE_IT)
    return {"task": _TASKS[value]} | ({"loss_type": ["ipo"]} if value == "ipo" else {})


def _stage(value: str, given: Given) -> Flags:
    if value == "pt":
        return {"dataset_format": "text", "packing": given.get("packing") is not False}
    return {} if value == "sft" else {"task": task_given(LLAMA_FACTORY, given)} if value in _TASKS else _task(value, {})


def _preference_loss(value: str, given: Given) -> Flags:
    """Of LLaMA-Factory; `orpo` is a task of its own here."""
    if value in _LOSSES:
        return {"loss_type": [value]}
    if value not in ("sigmoid", "orpo"):
        raise NoCounterpart("loss_type: sigmoid, hinge or ipo; orpo is task: orpo")
    return {}


def _reward_functions(value: Any, given: Given) -> Flags:
    names = value if isinstance(value, list) else str(value).split()
    if not all(name.partition(":")[0].endswith(".py") for name in names):
        raise NoCounterpart(_REWARDS)
    return {"reward_funcs": names}


def _not_zero(instead: str) -> Rule:
    def rule(value: Any, given: Given) -> Flags:
        if value:
            raise NoCounterpart(instead)
        return {}

    return rule


TASK_RULES: dict[str, dict[str, Rule]] = {
    AXOLOTL: {
        "rl": _task, "rl_beta": "beta", "orpo_alpha": "beta", "dpo_label_smoothing": "label_smoothing",
        "kto_desirable_weight": "desirable_weight", "kto_undesirable_weight": "undesirable_weight",
        "reward_model": lambda value, given: {"task": "reward"} if value else {}, "reward_funcs": _reward_functions,
    },
    LLAMA_FACTORY: {
        "stage": _stage, "pref_beta": "beta", "pref_loss": _preference_loss, "kto_chosen_weight": "desirable_weight",
        "kto_rejected_weight": "undesirable_weight", "ref_model": _REFERENCE,
        "pref_ftx": _not_zero("loss_type: [sigmoid, sft] with loss_weights: [1.0, ...] adds the loss of the answer"),
    },
    SWIFT: {"rlhf_type": _task, "reward_funcs": _reward_functions, "ref_model": _REFERENCE},
}  # fmt: skip


def flattened(tool: str, given: Given) -> Given:
    """The keys of a configuration, those of Axolotl's `trl` beside the others."""
    inner = given.get("trl")
    if tool != AXOLOTL or not isinstance(inner, dict):
        return given
    return {key: value for key, value in given.items() if key != "trl"} | inner
