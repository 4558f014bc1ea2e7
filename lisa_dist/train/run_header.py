"""The header of a run: how it is run, by which flags; and its outcome."""

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from transformers import TrainingArguments

from lisa_dist.config import LisaConfig
from lisa_dist.core.checkpointing import AUTO, parse_checkpointed_layers
from lisa_dist.presets import NONE
from lisa_dist.tasks import SFT, TASKS
from lisa_dist.text import format_table
from lisa_dist.train.apply_preset import describe_preset
from lisa_dist.train.arguments import ALL_LINEAR, ModelArguments, RunConfig
from lisa_dist.train.checks import precision_of_arguments


def describe_run(config: RunConfig, attention: str, template: str, loss: str, layers: str, processor: str) -> str:
    """A table of how the run is run, with the flags that have no effect under its method.

    `layers` is why so many train, `processor` what images would go by; where they are empty nothing is said.
    """
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
        ("attention", attention),
        ("loss", loss),
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


def installed_versions() -> dict[str, str]:
    """Versions of what decides on the numbers of a run."""
    return {name: metadata.version(name) for name in ("lisa_dist", "torch", "deepspeed", "transformers", "trl")}


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
