"""What each key of LLaMA-Factory is here, by the sources of 0.9.5."""

import json
from pathlib import Path
from typing import Any

from lisa_dist.convert import rule
from lisa_dist.convert.rule import Flags, Given, NoCounterpart, Rule, Tool, alike, if_set, names_of, nothing_but, one_of

_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}  # as rows of alpaca have them here


def _looked_up(name: str, info: Given, folder: Path, count: Any) -> tuple[str, Flags]:
    """The file or the hub's name behind one of dataset_info.json, with the number of rows, and what is said of it."""
    source = info.get("hf_hub_url") or (folder / info["file_name"]).as_posix() if info else name
    here = {} if info.get("formatting") == "sharegpt" else _COLUMNS
    columns = {here.get(theirs, theirs): column for theirs, column in info.get("columns", {}).items()}
    pairs = [f"{ours}={column}" for ours, column in columns.items() if ours != column]
    said = {"dataset_config": info.get("subset"), "dataset_split": info.get("split"), "dataset_columns": pairs}
    return source if count is None else f"{source}#{count}", {key: value for key, value in said.items() if value}


def _datasets_as(flag: str) -> Rule:
    def rule(value: Any, given: Given) -> Flags:
        names, folder, count = names_of(value), Path(str(given.get("dataset_dir") or "data")), given.get("max_samples")
        path = folder / "dataset_info.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        sources, of_each = zip(*(_looked_up(name, known.get(name, {}), folder, count) for name in names), strict=True)
        flags = alike(list(sources), list(of_each))
        flags = flags if flag == "dataset_name" else {flag: flags["dataset_name"]}
        if unknown := [name for name in names if name not in known]:
            raise NoCounterpart(
                f"{', '.join(unknown)}: in no dataset_info.json at hand; give files, or the hub's names", flags
            )
        return flags

    return rule


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


def task_of(given: Given) -> str:
    """The task of `stage`, of which orpo is a loss there; of one that is nothing here sft."""
    task = rule.TASKS.get(str(given.get("stage")), {"task": "sft"})["task"]
    return "orpo" if task == "dpo" and given.get("pref_loss") == "orpo" else task


def _stage(value: str, given: Given) -> Flags:
    if value == "pt":
        return {"dataset_format": "text", "packing": given.get("packing") is not False}
    return {} if value == "sft" else rule.task(value, given) | {"task": task_of(given)}


_RULES: dict[str, Rule] = rule.LORA | {
    "use_badam": "(method: lisa, one layer at a time; reshuffle in place of ascending)",
    "finetuning_type": rule.method, "weight_decay": _decay_of_factory, "dataset": _datasets_as("dataset_name"),
    "cutoff_len": "max_length", "badam_switch_mode": _badam_order,
    "badam_switch_interval": "lisa_interval_steps", "badam_mode": nothing_but("layer", "layers alone are sampled so"),
    "badam_verbose": "(each switch is printed)", "badam_start_block": _first_block,
    "lora_target": rule.lora_targets, "eval_dataset": _datasets_as("eval_dataset_name"),
    "val_size": if_set("eval_rows"), "train_on_prompt": "train_on_inputs", "neat_packing": if_set("packing", True),
    "flash_attn": rule.AT_ONCE, "enable_liger_kernel": if_set("use_liger_kernel", True),
    "disable_gradient_checkpointing": if_set("gradient_checkpointing", False),
    "plot_loss": "(report.html has it)", "template": rule.OWN_TEMPLATE,
    "dataset_dir": "(dataset_name has the files themselves)",
    "quantization_bit": nothing_but(None, rule.FEWER_BITS), "pure_bf16": if_set("bf16", True),
    "interleave_probs": "dataset_weights says how often the rows of each come in an epoch",
    "mix_strategy": "(dataset_weights mixes)", "compute_accuracy": "(logged: mean_token_accuracy)",
    "stage": _stage, "pref_beta": "beta", "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight", "ref_model": rule.REFERENCE,
    "pref_loss": one_of(
        {"sigmoid": {}, "orpo": {}, "hinge": {"loss_type": ["hinge"]}, "ipo": {"loss_type": ["ipo"]}},
        "loss_type: sigmoid, hinge or ipo; orpo is task: orpo",
    ),
    "pref_ftx": nothing_but(
        None, "loss_type: [sigmoid, sft] with loss_weights: [1.0, ...] adds the loss of the answer"
    ),
}  # fmt: skip
FACTORY_RULES = Tool(
    _RULES,
    defaults={"method": "lora", "learning_rate": 5e-5, "max_length": 2048},
    more_defaults={"lora": {"lora_r": 8, "lora_dropout": 0.0}},  # alpha is twice the rank
)
