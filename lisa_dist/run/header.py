"""The header of a run, its record for the report (lisa_run.json), and its outcome."""

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import torch
from transformers import TrainingArguments

from lisa_dist.config import LisaConfig
from lisa_dist.core.blocks import find_blocks, split_into_modules
from lisa_dist.core.checkpointing import AUTO, parse_checkpointed_layers
from lisa_dist.presets import NONE
from lisa_dist.run.arguments import ALL_LINEAR, ModelArguments, RunConfig, run_parser
from lisa_dist.run.settle import Settled, describe_preset, installed_versions
from lisa_dist.run_folder import without_secrets
from lisa_dist.tasks import SFT, TASKS
from lisa_dist.text import format_table
from lisa_dist.train.checks import precision_of_arguments
from lisa_dist.zero.parameters import parameter_numel


def describe_run(settled: Settled, template: str, processor: str) -> str:
    """A table of how the run is run, with the flags that have no effect under its method.

    `processor` is what images would go by; where it is empty nothing is said.
    """
    config, layers = settled.config, settled.layers_line
    args, checkpointed = config.training, parse_checkpointed_layers(config.run.checkpointed_layers)
    batch = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    optim = getattr(args.optim, "value", args.optim)
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    rows = [
        ("method", config.run.method),
        *([("preset", describe_preset(config))] if config.run.lisa_preset not in (None, NONE) else []),
        *([("layers", layers)] if layers else []),
        *([("task", f"{task}: {TASKS[task].what}")] if (task := config.run.task) != SFT else []),
        ("model from", str(config.model.model_name_or_path)),
        ("devices", describe_devices(args)),
        ("attention", settled.attention_line),
        ("loss", settled.loss_line),
        *([("compiled", f"each decoder layer, by {args.torch_compile_backend}")] if args.torch_compile else []),
        ("chat template", template),
        *([("processor", processor)] if processor else []),
        *([("adapters", _describe_adapters(config.model))] if config.run.method == "lora" else []),
        ("optimizer", f"{optim}, learning rate {args.learning_rate}, weight decay {args.weight_decay}"),
        ("global batch size", str(batch)),
        ("versions", versions),
    ]
    if config.run.method != "lisa" and checkpointed is not None:
        which = {0: "no layer", AUTO: "all layers; auto chooses among them with --method lisa alone"}
        rows.append(("checkpointing", which.get(checkpointed, "all layers")))
    rows += [("without effect", text) for text in _without_effect(config)]
    return "run\n" + format_table(rows)


def _without_effect(config: RunConfig) -> list[str]:
    """Flags of other methods: the same recipe may serve to compare methods."""
    texts, method = [], config.run.method
    defaults = LisaConfig().to_dict()
    given = [name for name, value in config.lisa.to_dict().items() if value != defaults[name]]
    given += ["gpu_memory"] if config.run.gpu_memory is not None else []
    given += ["save_async"] if config.run.save_async else []
    if method != "lisa" and given:
        texts.append(f"{', '.join(f'--{name}' for name in given)}, which are for --method lisa")
    fields = ModelArguments.__dataclass_fields__
    of_lora = [name for name in fields if name.startswith("lora_")]
    given = [name for name in of_lora if getattr(config.model, name) != fields[name].default]
    if method != "lora" and given:
        texts.append(f"{', '.join(f'--{name}' for name in given)}, which are for --method lora")
    return texts


def _describe_adapters(model_args: ModelArguments) -> str:
    named = model_args.lora_target_modules  # one name or several
    where = ", ".join([named] if isinstance(named, str) else named or [])
    where = "all linear layers but the head" if where == ALL_LINEAR else where
    return f"rank {model_args.lora_r}, alpha {model_args.lora_alpha}, dropout {model_args.lora_dropout}, on {where}"


def describe_devices(args: TrainingArguments) -> str:
    """Number of ranks, the device and the precision."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{args.world_size} x {device}, {precision_of_arguments(args)}"


def record_of_run(settled: Settled, words: Sequence[str], model: Any, data: Sequence[str]) -> dict[str, Any]:
    """The content of lisa_run.json; `words` are those of the command line, `data` describes the examples in lines."""
    config = settled.config
    words = without_secrets(
        word for word in words if not word.startswith(("--local_rank", "--resume_from_checkpoint="))
    )
    if "--resume_from_checkpoint" in words:  # to repeat the run is not to resume it
        del words[(at := words.index("--resume_from_checkpoint")) : at + 2]
    ranks, here = config.training.world_size, int(os.environ["LOCAL_SIZE"])  # which `set_rank` has made sure of
    start = ["lisa-dist", "train", *(["--gpus", str(here)] if ranks > 1 else [])]
    hosts, flags = ranks // here, config.flags()
    return {
        "model": str(config.model.model_name_or_path),
        "method": config.run.method,
        "task": config.run.task,
        "devices": describe_devices(config.training),
        "loss": settled.loss_line,
        "began": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "command": shlex.join([*start, *words]) + (f"  # by a launcher on {hosts} hosts" if hosts > 1 else ""),
        "given": [f"--{name}" for name in run_parser(config.run.task).given(words)],
        "flags": {name: _plain(value) for name, value in flags.items()},
        "versions": installed_versions() | {"Python": platform.python_version()},
        "parameters": sum(parameter_numel(parameter) for parameter in model.parameters()),
        "num_layers": getattr(model.config.get_text_config(), "num_hidden_layers", None),
        "rows": list(data),
        **_modules_of(config, model),
    }


def _modules_of(config: RunConfig, model: Any) -> dict[str, list[str]]:
    """With --lisa_unit module the names of the modules, which the log has by number."""
    if config.run.method != "lisa" or not config.lisa.by_module:
        return {}
    blocks = split_into_modules(model, find_blocks(model, config.lisa.lisa_layers_attribute))
    return {"modules": [block.name for block in blocks.layers]}


def _plain(value: object) -> object:
    """A flag's value as JSON has it."""
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)


def describe_outcome(log_history: Sequence[dict[str, Any]]) -> str:
    """Seconds of training; the held-out loss before and after it, and the reward of answers, where there are any."""
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    lines = [f"trained in {log_history[-1]['train_runtime']:.0f} s"]
    if len(held_out) > 1:
        (first, before), (last, after) = held_out[0], held_out[-1]
        when = "before" if first == 0 else f"at step {first}"
        lines.append(f"held-out loss {before:.4f} {when}, {after:.4f} {'after' if first == 0 else f'at step {last}'}")
    rewards = [(entry["step"], entry["reward"]) for entry in log_history if entry.get("reward") is not None]
    if len(rewards) > 1:
        (first, before), (last, after) = rewards[0], rewards[-1]
        lines.append(f"reward {before:.4f} at step {first}, {after:.4f} at step {last}")
    return "; ".join(lines)
