"""Rules of keys that several tools have: most are the Hugging Face Trainer's."""

import re
from pathlib import Path
from typing import Any

from lisa_dist.convert.rule import Flags, Given, NoCounterpart, Rule, boolean, names_of, nothing_but

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "lisa_adamw")
_OTHERS = ("adafactor", "sgd", "adagrad", "rmsprop", "lion_8bit", "lion_32bit", "ademamix", "ademamix_8bit")
_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
              "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau")  # fmt: skip
AT_ONCE = "(chosen by itself: the fastest that runs)"
CACHED = "(data are cached by themselves)"
OWN_TEMPLATE = "the tokenizer's own chat template is used; for another give chat_template_path: x.jinja"
FEWER_BITS = "with method: lisa frozen layers can be held in fewer bits, lisa_frozen_bits: 4"
# DeepSpeed's configurations that the tools have, by their names, and the same with the optimizer on the host.
_DS_FOLDERS = (".", "configs", "deepspeed_configs", "examples/deepspeed")
_DS_CONFIGS = (
    (r"(?:default-)?zero([0-3])(?:_torch_compile|_bf16|_no_offload)?", ""),
    (r"ds_z([0-3])_config|ds_config_zero([0-3])_(?:no_offload|nocpu)", ""),
    (
        r"zero([23])(?:_bf16)?_(?:cpu)?offload(?:_all|_params)?|ds_z([23])_offload_config|ds_config_zero([23])",
        "_offload",
    ),
)


def _is_lisa(given: Given) -> bool:
    keys = ("lisa_n_layers", "lisa_activated_layers", "use_badam", "use_lisa")
    return bool(given.get("use_lisa", any(given.get(key) for key in keys)))


def optimizer(value: str, given: Given) -> Flags:
    """AdamW as it is called here; with LISA no other."""
    if str(value).startswith("paged_adamw"):
        in_32_bits = "lisa_adamw" if _is_lisa(given) else "adamw_torch_fused"
        ours = "adamw_8bit" if value == "paged_adamw_8bit" else in_32_bits
        raise NoCounterpart(f"{ours}, whose states are not paged; zero2_offload has them on the host", {"optim": ours})
    plain = str(value).replace("_32bit", "")
    plain = {"adamw": "adamw_torch_fused", "adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"}.get(
        plain, plain
    )
    if value in _OTHERS and not _is_lisa(given):
        return {"optim": value}
    if plain not in _OPTIMIZERS:
        raise NoCounterpart("LISA trains by AdamW; the default is adamw_torch_fused, and lisa_adamw takes less memory")
    return {"optim": plain}


def schedule(value: str, given: Given) -> Flags:
    """A schedule of transformers."""
    if value not in _SCHEDULES:
        raise NoCounterpart(f"the nearest is cosine; there are {', '.join(_SCHEDULES)}")
    return {"lr_scheduler_type": value}


def _warmup_ratio(value: float, given: Given) -> Flags:
    return {} if given.get("warmup_steps") else {"warmup_steps": value}


def _warmup_steps(value: float, given: Given) -> Flags:
    return {} if not value and given.get("warmup_ratio") else {"warmup_steps": value}


def _evaluates(value: Any, given: Given) -> Flags:
    said = given.get("eval_strategy") or given.get("evaluation_strategy")
    return {"eval_strategy": "epoch"} if value and not said else {}


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


def _weights_in(bits: int) -> Rule:
    return nothing_but(
        None, f"weights in {bits} bits: with --method lisa frozen layers alone, lisa_frozen_bits: {bits}"
    )


def lora_targets(value: Any, given: Given) -> Flags:
    """Names of modules; all linear ones are `all-linear`."""
    names = names_of(value)
    return {"lora_target_modules": ["all-linear"] if names in (["all"], ["all-linear"]) else names}


_ZERO = nothing_but(None, "ZeRO shards: --deepspeed zero3")
LORA: dict[str, Rule] = {
    "lora_rank": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "additional_target": lambda value, given: {"lora_modules_to_save": names_of(value)},
    "modules_to_save": lambda value, given: {"lora_modules_to_save": names_of(value)},
}  # fmt: skip
COMMON: dict[str, Rule] = {
    "optim": optimizer, "lr_scheduler_type": schedule, "warmup_ratio": _warmup_ratio, "warmup_steps": _warmup_steps,
    "deepspeed": _deepspeed, "evaluation_strategy": "eval_strategy",
    "do_eval": _evaluates, "load_in_8bit": _weights_in(8), "load_in_4bit": _weights_in(4),
    "do_train": "(a run trains)", "preprocessing_num_workers": CACHED,
    "overwrite_cache": CACHED, "ddp_timeout": "(--hang_timeout ends a run that hangs)", "bf16": boolean("bf16"),
    "tf32": boolean("tf32"), "max_samples": "(of each dataset)", "fsdp": _ZERO, "fsdp_config": _ZERO,
    "save_only_model": "(a checkpoint holds what a resume needs, which is little)",
    "save_safetensors": "(weights are saved so)",
    "group_by_length": nothing_but(None, "packing: true wastes no padding either"),
    "early_stopping_patience": nothing_but(None, "--load_best_model_at_end true keeps the best by held-out loss"),
}  # fmt: skip
