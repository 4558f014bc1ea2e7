"""What each key of Axolotl is here, by the sources of 0.21."""

from typing import Any

from lisa_dist.convert import rule
from lisa_dist.convert.rule import AT_ONCE, CACHED, Flags, Given, NoCounterpart, Rule, Tool, if_set, nothing_but

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
    return {} if value == "cosine" and given.get("cosine_min_lr_ratio") else rule.schedule(value, given)


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
    flags = rule.alike(names, of_each)
    if others:
        raise NoCounterpart(f"nothing here is like {', '.join(others)}; change the rows themselves", flags)
    return flags


def _evaluated(flags: Flags, given: Given) -> Flags:
    """What is held out, evaluated once an epoch where no key schedules evaluations."""
    has_schedule = any(given.get(key) for key in ("evals_per_epoch", "eval_steps", "eval_strategy"))
    return flags if has_schedule else flags | {"eval_strategy": "epoch"}


def _every(action: str, is_per_epoch: bool) -> Rule:
    """How often to save, or to evaluate where examples are held out: so many times an epoch, or after so many steps."""

    def rule(value: int, given: Given) -> Flags:
        has_none = action == "eval" and not (given.get("val_set_size") or given.get("test_datasets"))
        if not value or has_none:
            return {}
        if is_per_epoch and value == 1:
            return {f"{action}_strategy": "epoch"}
        steps = round(1 / (value * float(given.get("num_epochs") or 1)), 6) if is_per_epoch else value
        return {f"{action}_strategy": "steps", f"{action}_steps": steps}

    return rule


def _template(value: str, given: Given) -> Flags:
    if value in ("tokenizer_default", None):
        return {}
    if str(value).endswith(".jinja"):
        return {"chat_template_path": value}
    raise NoCounterpart(rule.OWN_TEMPLATE)


def _plugins(value: list[str], given: Given) -> Flags:
    """Ours may go; Liger's is a flag, with what it is told by keys of its own."""
    others = [name for name in value if "lisa_dist" not in name and "liger" not in name.lower()]
    flags = {"use_liger_kernel": True} if any("liger" in name.lower() for name in value) else {}
    if others:
        raise NoCounterpart("there are none here; the loss is computed in chunks by itself", flags)
    return flags


_QLORA = NoCounterpart(
    "LoRA of weights in 16 bits, which take more memory; method: lisa has lisa_frozen_bits: 4 for frozen ones",
    {"method": "lora"},
)
_RULES: dict[str, Rule] = {
    "base_model": "model_name_or_path", "datasets": _datasets,
    "test_datasets": lambda value, given: _evaluated(
        {"eval_dataset_name": _datasets(value, given)["dataset_name"]}, given
    ),
    "sequence_len": "max_length",
    "hub_model_id": if_set("hub_model_id", push_to_hub=True, hub_private_repo=True),
    "micro_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs", "optimizer": rule.optimizer, "lr_scheduler": _schedule,
    "sample_packing": "packing", "eval_sample_packing": "eval_packing",
    "val_set_size": lambda value, given: _evaluated({"eval_rows": value}, given) if value else {},
    "evals_per_epoch": _every("eval", True), "saves_per_epoch": _every("save", True),
    "eval_steps": _every("eval", False), "save_steps": _every("save", False),
    "lisa_n_layers": "lisa_activated_layers", "lisa_step_interval": "lisa_interval_steps",
    "lisa_layers_attribute": "(layers are found by themselves)",
    "adapter": rule.one_of({"lora": {"method": "lora"}, "qlora": _QLORA}, "{}: there is LoRA, method: lora"),
    "lora_target_linear": if_set("lora_target_modules", ["all-linear"]), "lora_target_modules": rule.lora_targets,
    "chat_template": _template, "chat_template_jinja": _template, "use_wandb": if_set("report_to", "wandb"),
    "wandb_project": lambda value, given: {"report_to": "wandb", "env": {"WANDB_PROJECT": value}} if value else {},
    "use_tensorboard": if_set("report_to", "tensorboard"),
    "auto_resume_from_checkpoints": if_set("resume_from_checkpoint", "auto"),
    "excess_length_strategy": lambda value, given: {"long_examples": "truncate" if value == "truncate" else "drop"},
    "dataset_prepared_path": CACHED, "dataset_processes": CACHED, "model_type": "(read from the model)",
    "tokenizer_type": "(read from the model)", "strict": "(every unknown key is refused)",
    "pad_to_sequence_len": "(rows are padded to the longest of a batch)", "flash_attention": AT_ONCE,
    "xformers_attention": AT_ONCE, "sdp_attention": AT_ONCE, "attn_implementation": AT_ONCE,
    "gradient_checkpointing_kwargs": "(checkpointing is never reentrant)", "special_tokens": _special_tokens,
    "cosine_min_lr_ratio": _least_rate, "plugins": _plugins, "debug": "(--logging_steps 1 shows each step)",
    "gradient_checkpointing": lambda value, given: {"gradient_checkpointing": bool(value)},
    "torch_compile": lambda value, given: {"torch_compile": True} if value is True else {},
    **{f"liger_{kernel}": if_set("use_liger_kernel", True) for kernel in
       ("rope", "rms_norm", "glu_activation", "swiglu", "fused_linear_cross_entropy", "layer_norm")},
    **{f"wandb_{key}": nothing_but(None, f"a variable of wandb, WANDB_{key.upper()}; env in a recipe sets it")
       for key in ("entity", "watch", "name", "log_model", "run_id", "mode")},
    "eval_table_size": nothing_but(None, "sample_prompt: TEXT is answered before and after training"),
    "rl": rule.task, "rl_beta": "beta", "orpo_alpha": "beta", "dpo_label_smoothing": "label_smoothing",
    "kto_desirable_weight": "desirable_weight", "kto_undesirable_weight": "undesirable_weight",
    "reward_model": if_set("task", "reward"), "reward_funcs": rule.reward_functions,
}  # fmt: skip
AXOLOTL_RULES = Tool(
    _RULES,
    defaults={
        "method": "full", "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "per_device_train_batch_size": 1,
        "num_train_epochs": 1, "max_length": 512, "gradient_checkpointing": False, "long_examples": "drop",
        "save_strategy": "epoch", "save_total_limit": 4,
    },
)  # fmt: skip
