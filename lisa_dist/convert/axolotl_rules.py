"""What each key of Axolotl is here, by the sources of 0.21."""

from typing import Any

from lisa_dist.convert.common_rules import AT_ONCE, CACHED, OWN_TEMPLATE, lora_targets, optimizer, schedule
from lisa_dist.convert.rule import Flags, Given, NoCounterpart, Rule, alike, nothing_but, true_is

_FORMATS = {"alpaca": {}, "chat_template": {}, "sharegpt": {}, "completion": {"dataset_format": "text"}}
_OF_DATASET = {"path", "data_files", "ds_type", "type", "name", "split", "field_messages", "field"}
# What says of a dataset that it is as it is read here.
_ROLES = {"user": {"user", "human"}, "assistant": {"assistant", "gpt"}, "system": {"system"}, "tool": {"tool"}}
_AS_HERE = {
    "message_property_mappings": {"role": "role", "content": "content"},
    "message_field_role": "role", "message_field_content": "content", "roles_to_train": ["assistant"],
    "train_on_eos": "turn", "trust_remote_code": False, "chat_template": "tokenizer_default",
}  # fmt: skip


def _schedule(value: str, given: Given) -> Flags:
    return {} if value == "cosine" and given.get("cosine_min_lr_ratio") else schedule(value, given)


def _least_rate(value: float, given: Given) -> Flags:
    if not value:
        return {}
    if given.get("lr_scheduler", "cosine") != "cosine":
        raise NoCounterpart("it is of the schedule cosine alone: lr_scheduler_type: cosine_with_min_lr")
    return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": float(value)}}


def _special_tokens(value: dict[str, str] | None, given: Given) -> Flags:
    """Those that a run may name; of others the model's tokenizer has to know."""
    found = {name: token for name, token in (value or {}).items() if token is not None}
    if set(found) - {"pad_token", "eos_token"}:
        raise NoCounterpart("save them in the model's tokenizer, by save_pretrained")
    return dict(found)


def _is_as_here(name: str, value: Any) -> bool:
    if name == "roles":
        return all(set(names) <= _ROLES.get(role, set()) for role, names in value.items())
    return value is None or value == _AS_HERE.get(name)


def _datasets(value: list[dict], given: Given) -> Flags:
    """Files, or names of the hub; what is said of one must hold for all."""
    names: list[str] = []
    of_each: list[Flags] = []
    others: list[str] = []
    for one in value:
        files = one.get("data_files")
        named = [files] if isinstance(files, str) else files or [one["path"]]
        names += named
        kind = str(one.get("type") or "chat_template").split(":")[0].split(".")[0]
        if kind not in _FORMATS or isinstance(one.get("type"), dict):
            raise NoCounterpart("name the columns of rows of another type by dataset_columns, docs/data.md")
        others += [
            f"{name} of {named[0]}" for name in sorted(one.keys() - _OF_DATASET) if not _is_as_here(name, one[name])
        ]
        columns = {"messages": one.get("field_messages"), "text": one.get("field")}
        pairs = [f"{ours}={theirs}" for ours, theirs in columns.items() if theirs and ours != theirs]
        split = one.get("split") if one.get("split") != "train" else None
        found = {"dataset_config": one.get("name"), "dataset_split": split, "dataset_columns": pairs}
        of_each.append({name: value for name, value in found.items() if value} | _FORMATS[kind])
    flags = alike(names, of_each)
    if others:
        raise NoCounterpart(f"nothing here is like {', '.join(others)}; change the rows themselves", flags)
    return flags


def _evaluates(given: Given) -> bool:
    return any(given.get(key) for key in ("evals_per_epoch", "eval_steps", "eval_strategy"))


def _holds_out(given: Given) -> bool:
    return bool(given.get("val_set_size") or given.get("test_datasets"))


def _held_out_files(value: list[dict], given: Given) -> Flags:
    names = {"eval_dataset_name": _datasets(value, given)["dataset_name"]}
    return names | ({} if _evaluates(given) else {"eval_strategy": "epoch"})


def _held_out_part(value: float, given: Given) -> Flags:
    return ({"eval_rows": value} | ({} if _evaluates(given) else {"eval_strategy": "epoch"})) if value else {}


def _per_epoch(strategy: str) -> Rule:
    def rule(value: int, given: Given) -> Flags:
        if not value or (strategy == "eval" and not _holds_out(given)):
            return {}
        share = 1 / (value * float(given.get("num_epochs") or 1))
        if value == 1:
            return {f"{strategy}_strategy": "epoch"}
        return {f"{strategy}_strategy": "steps", f"{strategy}_steps": round(share, 6)}

    return rule


def _steps(strategy: str) -> Rule:
    def rule(value: int, given: Given) -> Flags:
        if not value or (strategy == "eval" and not _holds_out(given)):
            return {}
        return {f"{strategy}_strategy": "steps", f"{strategy}_steps": value}

    return rule


def _adapter(value: str, given: Given) -> Flags:
    if value == "lora":
        return {"method": "lora"}
    if value == "qlora":
        raise NoCounterpart(
            "LoRA of weights in 16 bits, which take more memory; method: lisa has lisa_frozen_bits: 4 for frozen ones",
            {"method": "lora"},
        )
    raise NoCounterpart(f"{value}: there is LoRA, method: lora")


def _wandb_project(value: Any, given: Given) -> Flags:
    return {"report_to": "wandb", "env": {"WANDB_PROJECT": value}} if value else {}


def _template(value: str, given: Given) -> Flags:
    if value in ("tokenizer_default", None):
        return {}
    if str(value).endswith(".jinja"):
        return {"chat_template_path": value}
    raise NoCounterpart(OWN_TEMPLATE)


def _plugins(value: list[str], given: Given) -> Flags:
    """Ours may go; Liger's is a flag, with what it is told by keys of its own."""
    others = [name for name in value if "lisa_dist" not in name and "liger" not in name.lower()]
    flags = {"use_liger_kernel": True} if any("liger" in name.lower() for name in value) else {}
    if others:
        raise NoCounterpart("there are none here; the loss is computed in chunks by itself", flags)
    return flags


def _hub_model(value: str | None, given: Given) -> Flags:
    return {"hub_model_id": value, "push_to_hub": True, "hub_private_repo": True} if value else {}


AXOLOTL_RULES: dict[str, Rule] = {
    "base_model": "model_name_or_path", "datasets": _datasets, "test_datasets": _held_out_files,
    "sequence_len": "max_length", "hub_model_id": _hub_model,
    "micro_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs", "optimizer": optimizer, "lr_scheduler": _schedule, "sample_packing": "packing",
    "eval_sample_packing": "eval_packing", "val_set_size": _held_out_part, "evals_per_epoch": _per_epoch("eval"),
    "saves_per_epoch": _per_epoch("save"), "eval_steps": _steps("eval"), "save_steps": _steps("save"),
    "lisa_n_layers": "lisa_activated_layers", "lisa_step_interval": "lisa_interval_steps",
    "lisa_layers_attribute": "(layers are found by themselves)", "adapter": _adapter,
    "lora_target_linear": true_is("lora_target_modules", ["all-linear"]), "lora_target_modules": lora_targets,
    "chat_template": _template, "chat_template_jinja": _template, "use_wandb": true_is("report_to", "wandb"),
    "wandb_project": _wandb_project, "use_tensorboard": true_is("report_to", "tensorboard"),
    "auto_resume_from_checkpoints": true_is("resume_from_checkpoint", "auto"),
    "excess_length_strategy": lambda value, given: {"long_examples": "truncate" if value == "truncate" else "drop"},
    "dataset_prepared_path": CACHED, "dataset_processes": CACHED, "model_type": "(read from the model)",
    "tokenizer_type": "(read from the model)", "strict": "(every unknown key is refused)",
    "pad_to_sequence_len": "(rows are padded to the longest of a batch)", "flash_attention": AT_ONCE,
    "xformers_attention": AT_ONCE, "sdp_attention": AT_ONCE, "attn_implementation": AT_ONCE,
    "gradient_checkpointing_kwargs": "(checkpointing is never reentrant)", "special_tokens": _special_tokens,
    "cosine_min_lr_ratio": _least_rate, "plugins": _plugins, "debug": "(--logging_steps 1 shows each step)",
    "gradient_checkpointing": lambda value, given: {"gradient_checkpointing": bool(value)},
    "torch_compile": lambda value, given: {"torch_compile": True} if value is True else {},
    **{f"liger_{kernel}": true_is("use_liger_kernel") for kernel in
       ("rope", "rms_norm", "glu_activation", "swiglu", "fused_linear_cross_entropy", "layer_norm")},
    **{f"wandb_{key}": nothing_but(None, f"a variable of wandb, WANDB_{key.upper()}; env in a recipe sets it")
       for key in ("entity", "watch", "name", "log_model", "run_id", "mode")},
    "eval_table_size": nothing_but(None, "sample_prompt: TEXT is answered before and after training"),
}  # fmt: skip
AXOLOTL_DEFAULTS: Flags = {
    "method": "full", "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "per_device_train_batch_size": 1,
    "num_train_epochs": 1, "max_length": 512, "gradient_checkpointing": False, "long_examples": "drop",
    "save_strategy": "epoch", "save_total_limit": 4,
}  # fmt: skip
