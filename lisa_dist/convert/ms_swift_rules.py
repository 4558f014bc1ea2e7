"""What each flag of ms-swift is here, by the sources of 4.6."""

import re
from typing import Any

from lisa_dist.convert import rule
from lisa_dist.convert.rule import Flags, Given, Rule, Tool, if_set, nothing_but, one_of

OTHER_HUB = "names are ModelScope's there, and Hugging Face's here; see that model and datasets are the same"


def _swift_datasets(value: Any, given: Given) -> Flags:
    names, subset = [], None
    for one in value if isinstance(value, list) else [value]:
        plain, _, count = re.sub(r"^(hf|ms)::", "", str(one), flags=re.I).partition("#")
        plain, _, of_hub = plain.partition(":")
        subset = of_hub or subset
        names.append(f"{plain}#{count}" if count else plain)
    return {"dataset_name": names} | ({"dataset_config": subset} if subset else {})


_LONG = {"delete": "drop", "split": "auto"}
_OF_ROWS = "change the rows themselves"
_RULES: dict[str, Rule] = rule.LORA | {
    "pt": lambda value, given: {"dataset_format": "text"},
    "model": "model_name_or_path", "tuner_type": rule.method, "train_type": rule.method, "dataset": _swift_datasets,
    "lisa_step_interval": "lisa_interval_steps", "target_modules": rule.lora_targets,
    "lisa_activated_layers": if_set("lisa_activated_layers"), "packing": "packing",
    "truncation_strategy": lambda value, given: {"long_examples": _LONG.get(value, "truncate")},
    "attn_impl": rule.AT_ONCE, "split_dataset_ratio": if_set("eval_rows"),
    "loss_scale": one_of(
        {"default": {}, "all": {"train_on_inputs": True}},
        "answers count (the default), or all tokens, train_on_inputs: true",
    ),
    "val_dataset": lambda value, given: {"eval_dataset_name": value if isinstance(value, list) else [value]},
    "torch_dtype": lambda value, given: {"fp16": True} if value == "float16" else {"bf16": value == "bfloat16"},
    "columns": "the other way round: dataset_columns: [question=text1, answer=text2]",
    "interleave_prob": "dataset_weights says how often the rows of each come in an epoch",
    "strict": "(--skip_bad_rows true skips invalid rows)", "use_hf": one_of({True: {}}, OTHER_HUB),
    "NPROC_PER_NODE": "the number of GPUs: lisa-dist train recipe.yaml --gpus N", "USE_HF": lambda value, given: {},
    "quant_bits": nothing_but(None, rule.FEWER_BITS), "dataset_num_proc": rule.CACHED, "template": rule.OWN_TEMPLATE,
    "system": "a system text comes with the rows, as their first turn", "model_author": _OF_ROWS,
    "model_name": _OF_ROWS, "add_version": "(a run has no folder of its own below output_dir)",
    "resume_only_model": "the weights alone are model_name_or_path: CHECKPOINT; a resume goes on with all there is",
    "use_liger_kernel": if_set("use_liger_kernel", True),
    "rlhf_type": rule.task, "reward_funcs": rule.reward_functions, "ref_model": rule.REFERENCE,
}  # fmt: skip
SWIFT_RULES = Tool(
    _RULES,
    defaults={
        "method": "lora", "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95, "warmup_steps": 0.05,
        "per_device_train_batch_size": 1, "learning_rate": 1e-5, "max_length": -1, "long_examples": "drop",
    },
    more_defaults={
        "lora": {"learning_rate": 1e-4, "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.05},
        "grpo": {"beta": 0.04, "temperature": 0.9, "max_completion_length": 512},
    },
)  # fmt: skip
