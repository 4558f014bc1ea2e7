"""What each flag of LMFlow is here, by the sources of 5da1d35."""

from lisa_dist.convert import rule
from lisa_dist.convert.rule import Flags, Given, NoCounterpart, Rule, Tool, boolean, if_set

_FOLDER = (
    """a folder there, of {"type": ..., "instances": [...]}: jq -c '.instances[]' x.json > rows.jsonl, and give that"""
)


def _dataset(value: str, given: Given) -> Flags:
    count = given.get("max_train_samples")
    raise NoCounterpart(_FOLDER, {"dataset_name": [f"{value}#{count}" if count else value]})


def _held_out(value: str, given: Given) -> Flags:
    raise NoCounterpart(_FOLDER, {"eval_dataset_name": [value]})


_RULES: dict[str, Rule] = rule.LORA | {
    "use_lisa": if_set("method", "lisa"),
    "use_lora": lambda value, given: {"method": "lora"} if value and not given.get("use_lisa") else {},
    "max_train_samples": "(of each dataset)", "dataset_path": _dataset, "eval_dataset_path": _held_out,
    "block_size": "max_length", "train_on_prompt": boolean("train_on_inputs"),
    "disable_group_texts": lambda value, given: {"packing": not value},
    "validation_split_percentage": lambda value, given: {"eval_rows": value / 100} if value else {},
    "torch_dtype": "(bf16 says it)", "use_flash_attention": rule.AT_ONCE,
    "trust_remote_code": boolean("trust_remote_code"),
    "lisa_layers_attribute": "(layers are found by themselves)", "conversation_template": rule.OWN_TEMPLATE,
    "gradient_checkpointing": boolean("gradient_checkpointing"),
}  # fmt: skip
LMFLOW_RULES = Tool(
    _RULES,
    defaults={"method": "full", "learning_rate": 5e-5, "gradient_checkpointing": False, "max_length": -1},
    more_defaults={
        "lora": {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
        "lisa": {"lisa_activated_layers": 2, "lisa_interval_steps": 20},
    },
)
