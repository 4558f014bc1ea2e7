"""What each flag of ms-swift is here, by the sources of 4.6."""

import re
from typing import Any

from lisa_dist.convert.common_rules import AT_ONCE, CACHED, FEWER_BITS, LORA, OWN_TEMPLATE, lora_targets
from lisa_dist.convert.rule import Flags, Given, NoCounterpart, Rule, nothing_but, true_is, unless_zero

OTHER_HUB = "names are ModelScope's there, and Hugging Face's here; see that model and datasets are the same"


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


def _hub(value: bool, given: Given) -> Flags:
    if not value:
        raise NoCounterpart(OTHER_HUB)
    return {}


_LONG = {"delete": "drop", "split": "auto"}
SWIFT_RULES: dict[str, Rule] = LORA | {
    "pt": lambda value, given: {"dataset_format": "text"},
    "model": "model_name_or_path", "tuner_type": _swift_method, "train_type": _swift_method, "dataset": _swift_datasets,
    "lisa_step_interval": "lisa_interval_steps", "target_modules": lora_targets,
    "lisa_activated_layers": lambda value, given: {"lisa_activated_layers": value} if value else {},
    "truncation_strategy": lambda value, given: {"long_examples": _LONG.get(value, "truncate")},
    "attn_impl": AT_ONCE, "split_dataset_ratio": unless_zero("eval_rows"), "loss_scale": _swift_loss_scale,
    "val_dataset": lambda value, given: {"eval_dataset_name": value if isinstance(value, list) else [value]},
    "torch_dtype": lambda value, given: {"fp16": True} if value == "float16" else {"bf16": value == "bfloat16"},
    "columns": "the other way round: dataset_columns: [question=text1, answer=text2]",
    "interleave_prob": "dataset_weights says how often the rows of each come in an epoch",
    "strict": "(--skip_bad_rows true skips invalid rows)",
    "use_hf": _hub, "NPROC_PER_NODE": "the number of GPUs: lisa-dist train recipe.yaml --gpus N",
    "USE_HF": lambda value, given: {},
    "quant_bits": nothing_but(None, FEWER_BITS),
    "dataset_num_proc": CACHED,
    "template": OWN_TEMPLATE,
    "system": "a system text comes with the rows, as their first turn", "model_author": "change the rows themselves",
    "model_name": "change the rows themselves", "add_version": "(a run has no folder of its own below output_dir)",
    "resume_only_model": "the weights alone are model_name_or_path: CHECKPOINT; a resume goes on with all there is",
    "use_liger_kernel": true_is("use_liger_kernel"), "packing": "packing",
}  # fmt: skip
SWIFT_DEFAULTS: Flags = {
    "method": "lora", "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95, "warmup_steps": 0.05,
    "per_device_train_batch_size": 1, "learning_rate": 1e-5, "max_length": -1, "long_examples": "drop",
}  # fmt: skip
SWIFT_LORA: Flags = {"learning_rate": 1e-4, "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.05}
SWIFT_GRPO: Flags = {"beta": 0.04, "temperature": 0.9, "max_completion_length": 512}
