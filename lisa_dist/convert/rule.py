"""What a rule of a key is, and rules of keys that several tools have: most are the Hugging Face Trainer's."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Given = Mapping[str, Any]
Flags = dict[str, Any]
# A name of ours, for the same value; a function of the value and of all that was given; a text in parentheses, why the
# key may go; or any other text, what to do about it.
Rule = str | Callable[[Any, Given], Flags]


class NoCounterpart(Exception):  # noqa: N818 - not an error: a remark in the recipe
    """A key, or a value of one, that is nothing here or not all; the text says what to do, `flags` is what there is."""

    def __init__(self, text: str, flags: Flags | None = None):
        super().__init__(text)
        self.flags = flags or {}


@dataclass(frozen=True)
class Tool:
    """What each key of a tool is here; a key that has no rule and is a flag here stays as it is.

    `defaults` are those of the tool that differ from ours; `more_defaults` are those of a method or a task.
    """

    rules: dict[str, Rule]
    defaults: Flags
    more_defaults: dict[str, Flags] = field(default_factory=dict)


_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "lisa_adamw")
_OTHERS = ("adafactor", "sgd", "adagrad", "rmsprop", "lion_8bit", "lion_32bit", "ademamix", "ademamix_8bit")
_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
              "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau")  # fmt: skip
AT_ONCE = "(chosen by itself: the fastest that runs)"
CACHED = "(data are cached by themselves)"
OWN_TEMPLATE = "the tokenizer's own chat template is used; for another give chat_template_path: x.jinja"
REFERENCE = "the reference model is the model as the run begins"
FEWER_BITS = "with method: lisa frozen layers can be quantized, lisa_frozen_bits: 4"
# DeepSpeed's configurations that the tools have, by their names, and the same with the optimizer on the host.
_DS_FOLDERS = (".", "configs", "deepspeed_configs", "examples/deepspeed")
_DS_CONFIGS = (
    (r"(?:default-)?zero([0-3])(?:_torch_compile|_bf16|_no_offload)?", ""),
    (r"ds_z([0-3])_config|ds_config_zero([0-3])_(?:no_offload|nocpu)", ""),
    (r"zero([23])(?:_bf16)?_(?:cpu)?offload(?:_all|_params)?", "_offload"),
    (r"ds_z([23])_offload_config|ds_config_zero([23])", "_offload"),
)


def nothing_but(value_there: Any, instead: str) -> Rule:
    """Nothing where it is `value_there`, or says nothing; else a remark."""

    def rule(value: Any, given: Given) -> Flags:
        if not value or value == value_there:
            return {}
        raise NoCounterpart(instead)

    return rule


def one_of(flags: Mapping[Any, Flags | NoCounterpart], otherwise: str) -> Callable[[Any, Given], Flags]:
    """The flags, or the remark, of each value; a remark, in which {} is the value, for any other one."""

    def rule(value: Any, given: Given) -> Flags:
        found = flags.get(value, NoCounterpart(otherwise.format(value)))
        if isinstance(found, NoCounterpart):
            raise found
        return dict(found)

    return rule


def if_set(name: str, value: Any = None, **more: Any) -> Rule:
    """A flag, of the key's value or of another one, and `more`, where the key is neither false nor nothing."""
    return lambda theirs, given: {name: theirs if value is None else value, **more} if theirs else {}


def boolean(name: str) -> Rule:
    """What may be auto, which is the default here."""
    return lambda value, given: {} if value in (None, "auto", "None") else {name: bool(value)}


def names_of(value: Any) -> list[str]:
    """One name, several with commas between them, or a list."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)


def alike(names: list[str], of_each: list[Flags]) -> Flags:
    """The datasets of these names, when what is said of one holds for all."""
    if any(found != of_each[0] for found in of_each):
        raise NoCounterpart("its datasets differ in format, columns, split or config, and here all have the same")
    return {"dataset_name": names} | of_each[0]


def optimizer(value: str, given: Given) -> Flags:
    """AdamW as it is called here; with LISA no other."""
    keys = ("lisa_n_layers", "lisa_activated_layers", "use_badam")
    is_lisa = given.get("use_lisa", any(given.get(key) for key in keys))
    if str(value).startswith("paged_adamw"):
        in_32_bits = "lisa_adamw" if is_lisa else "adamw_torch_fused"
        near = "adamw_8bit" if value == "paged_adamw_8bit" else in_32_bits
        raise NoCounterpart(f"{near}, whose states are not paged; zero2_offload has them on the host", {"optim": near})
    ours = {"adamw": "adamw_torch_fused", "adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"}
    plain = str(value).replace("_32bit", "")
    plain = ours.get(plain, plain)
    if value in _OTHERS and not is_lisa:
        return {"optim": value}
    if plain not in _OPTIMIZERS:
        raise NoCounterpart("LISA trains by AdamW; the default is adamw_torch_fused, and lisa_adamw takes less memory")
    return {"optim": plain}


def schedule(value: str, given: Given) -> Flags:
    """A schedule of transformers."""
    if value not in _SCHEDULES:
        raise NoCounterpart(f"the nearest is cosine; there are {', '.join(_SCHEDULES)}")
    return {"lr_scheduler_type": value}


def _deepspeed(value: Any, given: Given) -> Flags:
    if isinstance(value, dict):
        raise NoCounterpart("put it in a file of its own, without its optimizer section, and give its path")
    path = Path(str(value))
    if path.parent.as_posix() in _DS_FOLDERS:
        for names, offload in _DS_CONFIGS:
            if found := re.fullmatch(names, path.name.removesuffix(".json")):
                stage = max(1, *(int(digit) for digit in found.groups() if digit))
                return {"deepspeed": f"zero{stage}{offload}"}
    raise NoCounterpart(
        "taken as it is; stages 1, 2 and 3 without an optimizer section are read, and zero2, zero3, zero2_offload, "
        "zero3_offload are here",
        {"deepspeed": value},
    )


def lora_targets(value: Any, given: Given) -> Flags:
    """Names of modules; all linear ones are `all-linear`."""
    names = names_of(value)
    return {"lora_target_modules": ["all-linear"] if names in (["all"], ["all-linear"]) else names}


def reward_functions(value: Any, given: Given) -> Flags:
    """Files of reward functions; a name has a remark, as it may be the tool's own or one of TRL's."""
    names = value if isinstance(value, list) else str(value).split()
    if not all(name.partition(":")[0].endswith(".py") for name in names):
        raise NoCounterpart(
            "a file with a function of completions, reward_funcs: rewards.py, or the name of one of trl.rewards"
        )
    return {"reward_funcs": names}


TASKS: dict[str, Flags] = {
    "dpo": {"task": "dpo"}, "ipo": {"task": "dpo", "loss_type": ["ipo"]}, "kto": {"task": "kto"},
    "orpo": {"task": "orpo"}, "rm": {"task": "reward"}, "grpo": {"task": "grpo"},
}  # fmt: skip
task = one_of(TASKS, "there is no such task here: sft, dpo, kto, orpo, reward or grpo")
method = one_of({"lora": {"method": "lora"}, "full": {"method": "full"}}, "{}: method is lisa, full or lora")
_ZERO = nothing_but(None, "ZeRO shards: --deepspeed zero3")
_BITS = "weights in {0} bits: with --method lisa frozen layers alone, lisa_frozen_bits: {0}"
LORA: dict[str, Rule] = {
    "lora_rank": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    **dict.fromkeys(
        ("additional_target", "modules_to_save"), lambda value, given: {"lora_modules_to_save": names_of(value)}
    ),
}  # fmt: skip
COMMON: dict[str, Rule] = {
    "optim": optimizer, "lr_scheduler_type": schedule,
    "warmup_steps": lambda value, given: {} if not value and given.get("warmup_ratio") else {"warmup_steps": value},
    "warmup_ratio": lambda value, given: {} if given.get("warmup_steps") else {"warmup_steps": value},
    "deepspeed": _deepspeed, "evaluation_strategy": "eval_strategy",
    "do_eval": lambda value, given: (
        {"eval_strategy": "epoch"}
        if value and not (given.get("eval_strategy") or given.get("evaluation_strategy")) else {}
    ),
    "load_in_8bit": nothing_but(None, _BITS.format(8)), "load_in_4bit": nothing_but(None, _BITS.format(4)),
    "do_train": "(a run trains)", "preprocessing_num_workers": CACHED,
    "overwrite_cache": CACHED, "ddp_timeout": "(--hang_timeout ends a run that hangs)", "bf16": boolean("bf16"),
    "tf32": boolean("tf32"), "max_samples": "(of each dataset)", "fsdp": _ZERO, "fsdp_config": _ZERO,
    "save_only_model": "(a checkpoint holds what a resume needs, which is little)",
    "save_safetensors": "(weights are saved so)",
    "group_by_length": nothing_but(None, "packing: true wastes no padding either"),
    "early_stopping_patience": nothing_but(None, "--load_best_model_at_end true keeps the best by held-out loss"),
}  # fmt: skip
