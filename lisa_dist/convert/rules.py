"""What each key of another tool is here, by the sources of Axolotl 0.21, LLaMA-Factory 0.9.5, ms-swift 4.6 and LMFlow.

Keys that have no rule and are flags here stay as they are.
"""

import re
from typing import Any

from lisa_dist.convert.reading import AXOLOTL, LLAMA_FACTORY, LMFLOW, SWIFT
from lisa_dist.convert.rule import Flags, Given, NoCounterpart, Rule
from lisa_dist.convert.task_rules import TASK_RULES

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "lisa_adamw")
_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
              "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau")  # fmt: skip
_AT_ONCE = "(chosen by itself: the fastest that runs)"
_CACHED = "(data are cached by themselves)"
_OWN_TEMPLATE = "the tokenizer's own chat template is used; for another give chat_template_path: x.jinja"
_SAME_RUN = "(nothing is written over; --resume_from_checkpoint auto goes on)"


def _is_lisa(given: Given) -> bool:
    keys = ("lisa_n_layers", "lisa_activated_layers", "use_badam", "use_lisa")
    return bool(given.get("use_lisa", any(given.get(key) for key in keys)))


def _optimizer(value: str, given: Given) -> Flags:
    if value == "paged_adamw_32bit":
        return {"optim": "lisa_adamw"} if _is_lisa(given) else {"optim": "adamw_torch_fused"}
    plain = str(value).replace("paged_", "").replace("_32bit", "")
    plain = {"adamw": "adamw_torch_fused", "adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"}.get(
        plain, plain
    )
    if plain not in _OPTIMIZERS:
        raise NoCounterpart("LISA trains by AdamW; the default is adamw_torch_fused, and lisa_adamw takes less memory")
    return {"optim": plain}


def _schedule(value: str, given: Given) -> Flags:
    if value not in _SCHEDULES:
        raise NoCounterpart(f"the nearest is cosine; there are {', '.join(_SCHEDULES)}")
    return {"lr_scheduler_type": value}


def _warmup_ratio(value: float, given: Given) -> Flags:
    return {} if given.get("warmup_steps") else {"warmup_steps": value}


def _deepspeed(value: Any, given: Given) -> Flags:
    if isinstance(value, dict):
        raise NoCounterpart("put it in a file of its own, without its optimizer section, and give its path")
    name = str(value).rpartition("/")[2]
    stage = re.search(r"(?:zero_?|z|stage_?)(\d)", name)
    if stage is None:
        raise NoCounterpart("give zero1, zero2, zero3, zero2_offload, zero3_offload, or a file without an optimizer")
    number = max(1, int(stage[1]))
    offload = "offload" in name and "no_offload" not in name
    return {"deepspeed": f"zero{number}" + "_offload" * (offload and number > 1)}


def _weights_in(bits: int) -> Rule:
    def rule(value: Any, given: Given) -> Flags:
        if not value:
            return {}
        raise NoCounterpart(f"weights in {bits} bits: with --method lisa frozen layers alone, lisa_frozen_bits: {bits}")

    return rule


def _unless(value_there: Any, instead: str) -> Rule:
    """Nothing where it is `value_there`, or nothing; else a remark."""

    def rule(value: Any, given: Given) -> Flags:
        if value in (None, False, value_there):
            return {}
        raise NoCounterpart(instead)

    return rule


def _true(name: str, value: Any = True) -> Rule:
    return lambda given_value, given: {name: value} if given_value else {}


def _boolean(name: str) -> Rule:
    """What may be auto, which is the default here."""
    return lambda value, given: {} if value in (None, "auto", "None") else {name: bool(value)}


def _rows(name: str) -> Rule:
    return lambda value, given: {name: value} if value else {}


def _lora_targets(value: Any, given: Given) -> Flags:
    names = value if isinstance(value, list) else str(value).split(",")
    return {"lora_target_modules": ["all-linear"] if names in (["all"], ["all-linear"]) else names}


_ZERO = _unless(None, "ZeRO shards: --deepspeed zero3")
_LORA: dict[str, Rule] = {"lora_rank": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
_COMMON: dict[str, Rule] = {
    "optim": _optimizer, "lr_scheduler_type": _schedule, "warmup_ratio": _warmup_ratio, "deepspeed": _deepspeed,
    "load_in_8bit": _weights_in(8), "load_in_4bit": _weights_in(4),
    "do_train": "(a run trains)", "overwrite_output_dir": _SAME_RUN, "preprocessing_num_workers": _CACHED,
    "overwrite_cache": _CACHED, "ddp_timeout": "(--hang_timeout ends a run that hangs)", "bf16": _boolean("bf16"),
    "tf32": _boolean("tf32"), "max_samples": "(of each dataset)", "fsdp": _ZERO, "fsdp_config": _ZERO,
    "group_by_length": _unless(False, "packing: true wastes no padding either"),
    "early_stopping_patience": _unless(None, "watch the held-out loss; --load_best_model_at_end true keeps the best"),
}  # fmt: skip


# Axolotl

_FORMATS = {"alpaca": {}, "chat_template": {}, "sharegpt": {}, "completion": {"dataset_format": "text"}}
_OF_DATASET = {"path", "data_files", "ds_type", "type", "name", "split", "field_messages", "field"}


def _special_tokens(value: dict[str, str] | None, given: Given) -> Flags:
    """Those that a run may name; of others the model's tokenizer has to know."""
    found = {name: token for name, token in (value or {}).items() if token is not None}
    if set(found) - {"pad_token", "eos_token"}:
        raise NoCounterpart("save them in the model's tokenizer, by save_pretrained")
    return dict(found)


def _axolotl_datasets(value: list[dict], given: Given) -> Flags:
    """Files, or names of the hub; what is said of one must hold for all."""
    names: list[str] = []
    of_each: list[Flags] = []
    for one in value:
        files = one.get("data_files")
        named = [files] if isinstance(files, str) else files or [one["path"]]
        names += named
        kind = str(one.get("type") or "chat_template").split(":")[0].split(".")[0]
        if kind not in _FORMATS or isinstance(one.get("type"), dict):
            raise NoCounterpart("name the columns of rows of another type by dataset_columns, docs/data.md")
        if others := one.keys() - _OF_DATASET:
            raise NoCounterpart(
                f"{', '.join(sorted(others))} of {named[0]} is nothing here; change the rows themselves"
            )
        columns = {"messages": one.get("field_messages"), "text": one.get("field")}
        pairs = [f"{ours}={theirs}" for ours, theirs in columns.items() if theirs and ours != theirs]
        split = one.get("split") if one.get("split") != "train" else None
        found = {"dataset_config": one.get("name"), "dataset_split": split, "dataset_columns": pairs}
        of_each.append({name: value for name, value in found.items() if value} | _FORMATS[kind])
    if any(found != of_each[0] for found in of_each):
        raise NoCounterpart("its datasets differ in format, columns, split or config, and here all have the same")
    return {"dataset_name": names} | of_each[0]


def _held_out_files(value: list[dict], given: Given) -> Flags:
    return {"eval_dataset_name": _axolotl_datasets(value, given)["dataset_name"], "eval_strategy": "epoch"}


def _per_epoch(strategy: str) -> Rule:
    def rule(value: int, given: Given) -> Flags:
        if not value:
            return {}
        share = 1 / (value * float(given.get("num_epochs") or 1))
        if value == 1:
            return {f"{strategy}_strategy": "epoch"}
        return {f"{strategy}_strategy": "steps", f"{strategy}_steps": round(share, 6)}

    return rule


def _steps(strategy: str) -> Rule:
    return lambda value, given: {f"{strategy}_strategy": "steps", f"{strategy}_steps": value} if value else {}


def _axolotl_held_out(value: float, given: Given) -> Flags:
    evaluates = any(given.get(key) for key in ("evals_per_epoch", "eval_steps", "eval_strategy"))
    return ({"eval_rows": value} | ({} if evaluates else {"eval_strategy": "epoch"})) if value else {}


def _adapter(value: str, given: Given) -> Flags:
    if value == "lora":
        return {"method": "lora"}
    raise NoCounterpart(f"{value}: there is LoRA, method: lora; or method: lisa with lisa_frozen_bits: 4")


def _wandb(value: Any, given: Given) -> Flags:
    return {"report_to": "wandb"} if value else {}


def _wandb_project(value: Any, given: Given) -> Flags:
    return {"report_to": "wandb", "env": {"WANDB_PROJECT": value}} if value else {}


def _template(value: str, given: Given) -> Flags:
    if value in ("tokenizer_default", None):
        return {}
    if str(value).endswith(".jinja"):
        return {"chat_template_path": value}
    raise NoCounterpart(_OWN_TEMPLATE)


_AXOLOTL: dict[str, Rule] = {
    "base_model": "model_name_or_path", "datasets": _axolotl_datasets, "test_datasets": _held_out_files,
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs", "optimizer": _optimizer, "lr_scheduler": _schedule, "sample_packing": "packing",
    "eval_sample_packing": "eval_packing", "val_set_size": _axolotl_held_out, "evals_per_epoch": _per_epoch("eval"),
    "saves_per_epoch": _per_epoch("save"), "eval_steps": _steps("eval"), "save_steps": _steps("save"),
    "lisa_n_layers": "lisa_activated_layers", "lisa_step_interval": "lisa_interval_steps",
    "lisa_layers_attribute": "(layers are found by themselves)", "adapter": _adapter,
    "lora_target_linear": _true("lora_target_modules", ["all-linear"]), "lora_target_modules": _lora_targets,
    "chat_template": _template, "chat_template_jinja": _template, "use_wandb": _wandb, "wandb_project": _wandb_project,
    "use_tensorboard": _true("report_to", "tensorboard"),
    "auto_resume_from_checkpoints": _true("resume_from_checkpoint", "auto"),
    "excess_length_strategy": lambda value, given: {"long_examples": "truncate" if value == "truncate" else "drop"},
    "dataset_prepared_path": _CACHED, "dataset_processes": _CACHED, "model_type": "(read from the model)",
    "tokenizer_type": "(read from the model)", "strict": "(every unknown key is refused)",
    "pad_to_sequence_len": "(rows are padded to the longest of a batch)", "flash_attention": _AT_ONCE,
    "xformers_attention": _AT_ONCE, "sdp_attention": _AT_ONCE, "attn_implementation": _AT_ONCE,
    "gradient_checkpointing_kwargs": "(checkpointing is never reentrant)",
    "special_tokens": _special_tokens,
    "plugins": "what Liger's does is use_liger_kernel: true", "debug": "(--logging_steps 1 shows each step)",
    "gradient_checkpointing": lambda value, given: {"gradient_checkpointing": bool(value)},
    **{f"liger_{kernel}": _true("use_liger_kernel") for kernel in
       ("rope", "rms_norm", "glu_activation", "swiglu", "fused_linear_cross_entropy", "layer_norm")},
    **{f"wandb_{key}": _unless(None, f"an environment variable of wandb, WANDB_{key.upper()}; env in a recipe sets it")
       for key in ("entity", "watch", "name", "log_model", "run_id", "mode")},
    "eval_table_size": _unless(None, "sample_prompt: TEXT is answered before and after training"),
}  # fmt: skip


# LLaMA-Factory


def _names(value: Any) -> list[str]:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)


def _factory_datasets(value: Any, given: Given) -> Flags:
    """Names of dataset_info.json, each with the number of its rows that are taken."""
    count = given.get("max_samples")
    return {"dataset_name": [name if count is None else f"{name}#{count}" for name in _names(value)]}


def _tuning(value: str, given: Given) -> Flags:
    if value == "lora":
        return {"method": "lora"}
    if value != "full":
        raise NoCounterpart(f"{value}: method is lisa, full or lora")
    return {"method": "full"}


BADAM = {
    "lisa_sampler": "cyclic", "lisa_interval_steps": 50, "lisa_activated_layers": 1, "lisa_always_on": "",
    "lisa_frozen": "embed,head,rest", "weight_decay": 0.01,
}  # fmt: skip
_ORDER = {"ascending": "cyclic", "random": "reshuffle"}


def _badam_order(value: str, given: Given) -> Flags:
    if value == "fixed":
        layer = given.get("badam_start_block") or 0
        raise NoCounterpart(f"lisa_sampler: weighted, lisa_weights_file: a list of 1 for layer {layer}, 0 for others")
    if value not in _ORDER:
        raise NoCounterpart("lisa_sampler: cyclic is ascending, reshuffle is random; weighted takes weights of layers")
    return {"lisa_sampler": _ORDER[value]}


def _decay_of_factory(value: float, given: Given) -> Flags:
    if given.get("use_badam") and value != BADAM["weight_decay"]:
        raise NoCounterpart(f"BAdam's decay there is {BADAM['weight_decay']}, whatever is given")
    return {"weight_decay": value}


def _first_block(value: int, given: Given) -> Flags:
    if value and given.get("badam_switch_mode") != "fixed":
        raise NoCounterpart(
            "lisa_sampler: cyclic begins with the lowest layer; reshuffle with another for each lisa_seed"
        )
    return {}


_FACTORY: dict[str, Rule] = _LORA | {
    "use_badam": "(method: lisa, one layer at a time)",
    "weight_decay": _decay_of_factory, "finetuning_type": _tuning, "dataset": _factory_datasets,
    "cutoff_len": "max_length", "badam_switch_mode": _badam_order,
    "badam_switch_interval": "lisa_interval_steps", "badam_mode": _unless("layer", "layers alone are sampled so"),
    "badam_verbose": "(each switch is printed)", "badam_start_block": _first_block,
    "lora_target": _lora_targets, "eval_dataset": lambda value, given: {"eval_dataset_name": _names(value)},
    "val_size": _rows("eval_rows"), "train_on_prompt": "train_on_inputs", "neat_packing": _true("packing"),
    "flash_attn": _AT_ONCE, "enable_liger_kernel": _true("use_liger_kernel"),
    "disable_gradient_checkpointing": _true("gradient_checkpointing", False),
    "plot_loss": "(report.html has it)", "template": _OWN_TEMPLATE,
    "dataset_dir": "give the files of dataset_info.json as dataset_name",
    "quantization_bit": _unless(None, "with method: lisa frozen layers can be held in fewer bits, lisa_frozen_bits: 4"),
    "pure_bf16": _true("bf16"), "save_only_model": "(a checkpoint holds what a resume needs, which is little)",
    "interleave_probs": "dataset_weights says how often the rows of each come in an epoch",
    "mix_strategy": "(dataset_weights mixes)", "compute_accuracy": "(logged: mean_token_accuracy)",
}  # fmt: skip


# ms-swift


def _swift_method(value: str, given: Given) -> Flags:
    if value == "full":
        return {"method": "lisa" if given.get("lisa_activated_layers") else "full"}
    if value == "lora":
        return {"method": "lora"}
    raise NoCounterpart(f"{value}: method is lisa, full or lora")


def _swift_datasets(value: Any, given: Given) -> Flags:
    names, subset = [], None
    for one in value if isinstance(value, list) else [value]:
        plain, _, count = re.sub(r"^(hf|ms)::", "", str(one), flags=re.I).partition("#")
        plain, _, of_hub = plain.partition(":")
        subset = of_hub or subset
        names.append(f"{plain}#{count}" if count else plain)
    return {"dataset_name": names} | ({"dataset_config": subset} if subset else {})


def _swift_loss_scale(value: str, given: Given) -> Flags:
    if value in ("default", "all"):
        return {"train_on_inputs": True} if value == "all" else {}
    raise NoCounterpart("answers count (the default), or all tokens, train_on_inputs: true")


_LONG = {"delete": "drop", "split": "auto"}
_SWIFT: dict[str, Rule] = _LORA | {
    "pt": lambda value, given: {"dataset_format": "text"},
    "model": "model_name_or_path", "tuner_type": _swift_method, "train_type": _swift_method, "dataset": _swift_datasets,
    "lisa_step_interval": "lisa_interval_steps", "target_modules": _lora_targets,
    "lisa_activated_layers": lambda value, given: {"lisa_activated_layers": value} if value else {},
    "truncation_strategy": lambda value, given: {"long_examples": _LONG.get(value, "truncate")},
    "attn_impl": _AT_ONCE, "split_dataset_ratio": _rows("eval_rows"), "loss_scale": _swift_loss_scale,
    "val_dataset": lambda value, given: {"eval_dataset_name": value if isinstance(value, list) else [value]},
    "torch_dtype": lambda value, given: {"fp16": True} if value == "float16" else {"bf16": value == "bfloat16"},
    "columns": "the other way round: dataset_columns: [question=text1, answer=text2]",
    "interleave_prob": "dataset_weights says how often the rows of each come in an epoch",
    "strict": "(--skip_bad_rows true skips invalid rows)",
    "use_hf": _unless(True, "models and datasets are Hugging Face's"), "dataset_num_proc": _CACHED,
    "template": _OWN_TEMPLATE,
    "system": "a system text comes with the rows, as their first turn", "model_author": "change the rows themselves",
    "model_name": "change the rows themselves", "add_version": "(a run has no folder of its own below output_dir)",
    "resume_only_model": "the weights alone are model_name_or_path: CHECKPOINT; a resume goes on with all there is",
    "use_liger_kernel": _true("use_liger_kernel"), "packing": "packing",
}  # fmt: skip


# LMFlow


def _lmflow_dataset(value: str, given: Given) -> Flags:
    count = given.get("max_train_samples")
    return {"dataset_name": [f"{value}#{count}" if count else value]}


_LMFLOW: dict[str, Rule] = _LORA | {
    "use_lisa": lambda value, given: {"method": "lisa"} if value else {},
    "use_lora": lambda value, given: {"method": "lora"} if value and not given.get("use_lisa") else {},
    "max_train_samples": "(of each dataset)",
    "dataset_path": _lmflow_dataset, "block_size": "max_length",
    "eval_dataset_path": lambda value, given: {"eval_dataset_name": [value]},
    "train_on_prompt": _boolean("train_on_inputs"),
    "disable_group_texts": lambda value, given: {"packing": not value},
    "validation_split_percentage": lambda value, given: {"eval_rows": value / 100} if value else {},
    "torch_dtype": "(bf16 says it)", "use_flash_attention": _AT_ONCE,
    "trust_remote_code": _boolean("trust_remote_code"),
    "lisa_layers_attribute": "(layers are found by themselves)",
    "conversation_template": _OWN_TEMPLATE,
    "gradient_checkpointing": _boolean("gradient_checkpointing"),
}  # fmt: skip

RULES: dict[str, dict[str, Rule]] = {
    tool: _COMMON | rules | TASK_RULES.get(tool, {})
    for tool, rules in ((AXOLOTL, _AXOLOTL), (LLAMA_FACTORY, _FACTORY), (SWIFT, _SWIFT), (LMFLOW, _LMFLOW))
}
# What a recipe of theirs means where it says nothing, and ours does not.
DEFAULTS: dict[str, Flags] = {
    AXOLOTL: {
        "method": "full", "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "per_device_train_batch_size": 1,
        "num_train_epochs": 1, "max_length": 512, "gradient_checkpointing": False, "long_examples": "drop",
        "save_total_limit": 4,
    },
    LLAMA_FACTORY: {"method": "lora", "learning_rate": 5e-5, "max_length": 2048},
    SWIFT: {
        "method": "lora", "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95, "warmup_steps": 0.05,
        "per_device_train_batch_size": 1, "learning_rate": 1e-5, "max_length": -1, "long_examples": "drop",
    },
    LMFLOW: {"method": "full", "learning_rate": 5e-5, "gradient_checkpointing": False, "max_length": -1},
}  # fmt: skip
# The same for adapters.
OF_LORA: dict[str, Flags] = {
    AXOLOTL: {},
    LLAMA_FACTORY: {"lora_r": 8, "lora_dropout": 0.0},  # alpha is twice the rank
    SWIFT: {"learning_rate": 1e-4, "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.05},
    LMFLOW: {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
}
