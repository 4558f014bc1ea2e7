"""What each key of LLaMA-Factory is here, by the sources of 0.9.5."""

import json
from pathlib import Path
from typing import Any

from lisa_dist.convert.common_rules import AT_ONCE, FEWER_BITS, LORA, OWN_TEMPLATE, lora_targets
from lisa_dist.convert.rule import (
    Flags,
    Given,
    NoCounterpart,
    Rule,
    alike,
    names_of,
    nothing_but,
    true_is,
    unless_zero,
)

_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}  # as rows of alpaca have them here


def _known_datasets(given: Given) -> dict[str, dict]:
    """What dataset_info.json says of each name; nothing where it is not at hand."""
    path = Path(str(given.get("dataset_dir") or "data"), "dataset_info.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _looked_up(name: str, known: Given, given: Given) -> tuple[str, Flags]:
    """The file or the hub's name behind one of dataset_info.json, with the number of rows, and what is said of it."""
    info, count = known.get(name, {}), given.get("max_samples")
    folder = Path(str(given.get("dataset_dir") or "data"))
    source = info.get("hf_hub_url") or (folder / info["file_name"]).as_posix() if info else name
    here = {} if info.get("formatting") == "sharegpt" else _COLUMNS
    columns = {here.get(theirs, theirs): column for theirs, column in info.get("columns", {}).items()}
    pairs = [f"{ours}={column}" for ours, column in columns.items() if ours != column]
    said = {"dataset_config": info.get("subset"), "dataset_split": info.get("split"), "dataset_columns": pairs}
    return source if count is None else f"{source}#{count}", {key: value for key, value in said.items() if value}


def _datasets_as(flag: str) -> Rule:
    def rule(value: Any, given: Given) -> Flags:
        names, known = names_of(value), _known_datasets(given)
        sources, of_each = zip(*(_looked_up(name, known, given) for name in names), strict=True)
        flags = alike(list(sources), list(of_each))
        flags = flags if flag == "dataset_name" else {flag: flags["dataset_name"]}
        if unknown := [name for name in names if name not in known]:
            raise NoCounterpart(
                f"{', '.join(unknown)}: in no dataset_info.json at hand; give files, or the hub's names", flags
            )
        return flags

    return rule


def _tuning(value: str, given: Given) -> Flags:
    if value == "lora":
        return {"method": "lora"}
    if value != "full":
        raise NoCounterpart(f"{value}: method is lisa, full or lora")
    return {"method": "full"}


BADAM = {
    "lisa_sampler": "reshuffle", "lisa_interval_steps": 50, "lisa_activated_layers": 1, "lisa_always_on": "",
    "lisa_frozen": "embed,head,rest", "weight_decay": 0.01,
}  # fmt: skip


def _badam_order(value: str, given: Given) -> Flags:
    if value == "fixed":
        layer = given.get("badam_start_block") or 0
        raise NoCounterpart(f"lisa_sampler: weighted, lisa_weights_file: a list of 1 for layer {layer}, 0 for others")
    if value != "random":
        raise NoCounterpart("lisa_sampler: reshuffle trains each layer once before any repeats, in random order")
    return {"lisa_sampler": "reshuffle"}


def _decay_of_factory(value: float, given: Given) -> Flags:
    if given.get("use_badam") and value != BADAM["weight_decay"]:
        raise NoCounterpart(f"BAdam's decay there is {BADAM['weight_decay']}, whatever is given")
    return {"weight_decay": value}


def _first_block(value: int, given: Given) -> Flags:
    if value and given.get("badam_switch_mode") != "fixed":
        raise NoCounterpart("lisa_sampler: reshuffle begins with another layer for each lisa_seed")
    return {}


FACTORY_RULES: dict[str, Rule] = LORA | {
    "use_badam": "(method: lisa, one layer at a time; reshuffle in place of ascending)",
    "weight_decay": _decay_of_factory, "finetuning_type": _tuning, "dataset": _datasets_as("dataset_name"),
    "cutoff_len": "max_length", "badam_switch_mode": _badam_order,
    "badam_switch_interval": "lisa_interval_steps", "badam_mode": nothing_but("layer", "layers alone are sampled so"),
    "badam_verbose": "(each switch is printed)", "badam_start_block": _first_block,
    "lora_target": lora_targets, "eval_dataset": _datasets_as("eval_dataset_name"),
    "val_size": unless_zero("eval_rows"), "train_on_prompt": "train_on_inputs", "neat_packing": true_is("packing"),
    "flash_attn": AT_ONCE, "enable_liger_kernel": true_is("use_liger_kernel"),
    "disable_gradient_checkpointing": true_is("gradient_checkpointing", False),
    "plot_loss": "(report.html has it)", "template": OWN_TEMPLATE,
    "dataset_dir": "(dataset_name has the files themselves)",
    "quantization_bit": nothing_but(None, FEWER_BITS),
    "pure_bf16": true_is("bf16"),
    "interleave_probs": "dataset_weights says how often the rows of each come in an epoch",
    "mix_strategy": "(dataset_weights mixes)", "compute_accuracy": "(logged: mean_token_accuracy)",
}  # fmt: skip
FACTORY_DEFAULTS: Flags = {"method": "lora", "learning_rate": 5e-5, "max_length": 2048}
FACTORY_LORA: Flags = {"lora_r": 8, "lora_dropout": 0.0}  # alpha is twice the rank
