"""The header of a run, its record for the report (lisa_run.json), and its outcome."""

import os
import platform
import shlex
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import torch
from transformers import TrainingArguments

from lisa_dist.config import LisaConfig
from lisa_dist.core.activation_checkpointing import AUTO, parse_checkpointed_layers
from lisa_dist.core.blocks import find_blocks, split_into_modules
from lisa_dist.presets import NONE
from lisa_dist.run.arguments import ALL_LINEAR, ModelArguments, RunConfig, model_config_of, run_parser
from lisa_dist.run.settle import Settled, describe_preset, installed_versions
from lisa_dist.run_folder import without_secrets
from lisa_dist.tasks import SFT, TASKS
from lisa_dist.text import format_rate, format_table
from lisa_dist.train.checks import precision_of_arguments
from lisa_dist.zero.parameters import parameter_numel

_OF_LORA = ("lora_", "use_rslora", "use_dora", "bnb_4bit", "use_bnb")  # beginnings of the names of its flags
REFERENCE = "a model of its own: the weights below --lisa_adapters change too"


def describe_run(settled: Settled, template: str, processor: str, given: Collection[str] = ()) -> str:
    """Return a table of how the run is run.

    `processor` is what images would go by, or "". `given` are the names of the flags that the user gave.
    """
    config, args, task = settled.config, settled.config.training, settled.config.run.task
    checkpointed = None if config.run.method == "lisa" else parse_checkpointed_layers(config.run.checkpointed_layers)
    which = {0: "no layer", AUTO: "all layers; auto chooses among them with --method lisa alone", None: ""}
    batch = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    optim, has_preset = getattr(args.optim, "value", args.optim), config.lisa.lisa_preset != NONE
    rows = [
        ("method", config.run.method),
        ("preset", describe_preset(config) if has_preset and config.run.method == "lisa" else ""),
        ("layers", settled.layers_line),
        ("task", f"{task}: {TASKS[task].what}" if task != SFT else ""),
        ("model from", str(config.model.model_name_or_path)),
        ("devices", describe_devices(args)),
        ("attention", settled.attention_line),
        ("loss", settled.loss_line),
        ("compiled", f"each decoder layer, by {args.torch_compile_backend}" if args.torch_compile else ""),
        ("chat template", template),
        ("processor", processor),
        ("adapters", _describe_adapters(config.model) if config.run.method == "lora" else ""),
        ("trained whole", _describe_copies(config) if config.run.method == "lora" else ""),
        ("reference model", REFERENCE if config.lisa.lisa_adapters and task in ("dpo", "kto") else ""),
        ("optimizer", f"{optim}, weight decay {args.weight_decay}"),
        ("learning rate", _describe_rate(config, given)),
        ("global batch size", str(batch)),
        ("versions", ", ".join(f"{name} {version}" for name, version in installed_versions().items())),
        ("checkpointing", which.get(checkpointed, "all layers")),
        *(("without effect", text) for text in _without_effect(config, given)),
    ]
    return "run\n" + format_table([row for row in rows if row[1]])


def _without_effect(config: RunConfig, given: Collection[str]) -> list[str]:
    """List the flags of other methods, also those `given` their default: one recipe may serve to compare methods."""
    defaults, fields = LisaConfig(lisa_preset=config.lisa.lisa_preset).to_dict(), ModelArguments.__dataclass_fields__
    of_lisa = [name for name, value in config.lisa.to_dict().items() if value != defaults[name] or name in given]
    of_lisa += ["gpu_memory"] if config.run.gpu_memory is not None else []
    of_lisa += ["save_async"] if config.run.save_async else []
    of_lora = [name for name in fields if name.startswith(_OF_LORA)]
    of_lora = [name for name in of_lora if getattr(config.model, name) != fields[name].default or name in given]
    return [
        f"{', '.join(f'--{name}' for name in names)}, which are for --method {method}"
        for method, names in (("lisa", of_lisa), ("lora", of_lora))
        if names and config.run.method != method
    ]


def _describe_rate(config: RunConfig, given: Collection[str]) -> str:
    """Say the learning rate, by block where some multiply it, and whether it is the method's default."""
    rate = config.training.learning_rate
    scales = config.lisa.lr_scales if config.run.method == "lisa" else {}
    by_block = ", ".join(f"{block} {format_rate(rate * scale, digits=2)}" for block, scale in scales.items())
    default = f" (default of --method {config.run.method})" if given and "learning_rate" not in given else ""
    return format_rate(rate) + default + (f"; {by_block}" if by_block else "")


def _describe_adapters(model_args: ModelArguments) -> str:
    named = model_args.lora_target_modules  # one name or several
    where = ", ".join([named] if isinstance(named, str) else named or [])
    where = "all linear layers but the head" if where == ALL_LINEAR else where
    if model_args.load_in_4bit:
        nested = ", double quantization" if model_args.use_bnb_nested_quant else ""
        where += f", whose weights have 4 bits ({model_args.bnb_4bit_quant_type}{nested})"
    return f"rank {model_args.lora_r}, alpha {model_args.lora_alpha}, dropout {model_args.lora_dropout}, on {where}"


def _describe_copies(config: RunConfig) -> str:
    names = config.model.lora_modules_to_save
    if not names:
        return ""
    tied = getattr(model_config_of(config).get_text_config(), "tie_word_embeddings", False)
    untied = "; embedding and head, tied in this model, are separate from now on" if tied else ""
    return f"copies of {', '.join(names)}, saved with the adapters{untied}"


def describe_devices(args: TrainingArguments) -> str:
    """Number of ranks, the device and the precision."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{args.world_size} x {device}, {precision_of_arguments(args)}"


def record_of_run(settled: Settled, argv: Sequence[str], model: Any, data: Sequence[str]) -> dict[str, Any]:
    """The content of lisa_run.json; `argv` is the command line's, `data` describes the examples in lines."""
    config = settled.config
    argv = without_secrets(word for word in argv if not word.startswith(("--local_rank", "--resume_from_checkpoint=")))
    if "--resume_from_checkpoint" in argv:  # to repeat the run is not to resume it
        del argv[(at := argv.index("--resume_from_checkpoint")) : at + 2]
    ranks, here = config.training.world_size, int(os.environ["LOCAL_SIZE"])  # which `set_rank` has made sure of
    start = ["lisa-dist", "train", *(["--gpus", str(here)] if ranks > 1 else [])]
    hosts, flags = ranks // here, config.flags()
    in_json = bool | int | float | str | list | dict | None
    record = {
        "model": str(config.model.model_name_or_path),
        "method": config.run.method,
        "task": config.run.task,
        "devices": describe_devices(config.training),
        "loss": settled.loss_line,
        "began": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "command": shlex.join([*start, *argv]) + (f"  # by a launcher on {hosts} hosts" if hosts > 1 else ""),
        "given": [f"--{name}" for name in run_parser(config.run.task).given(argv)],
        "flags": {name: value if isinstance(value, in_json) else str(value) for name, value in flags.items()},
        "versions": installed_versions() | {"Python": platform.python_version()},
        "parameters": sum(parameter_numel(parameter) for parameter in model.parameters()),
        "num_layers": getattr(model.config.get_text_config(), "num_hidden_layers", None),
        "rows": list(data),
    }
    if config.run.method == "lisa" and config.lisa.by_module:  # the log has them by number
        blocks = split_into_modules(model, find_blocks(model, config.lisa.lisa_layers_attribute))
        record["modules"] = [block.name for block in blocks.layers]
    return record


def describe_outcome(log_history: Sequence[dict[str, Any]]) -> str:
    """Seconds of training; the held-out loss before and after it, and the reward of answers, where there are any."""
    parts = [f"trained in {log_history[-1]['train_runtime']:.0f} s"]
    for name, title in (("eval_loss", "held-out loss"), ("reward", "reward")):
        found = [(entry["step"], entry[name]) for entry in log_history if entry.get(name) is not None]
        if len(found) > 1:
            (first, before), (last, after) = found[0], found[-1]
            when = ("before", "after") if first == 0 else (f"at step {first}", f"at step {last}")
            parts.append(f"{title} {before:.4f} {when[0]}, {after:.4f} {when[1]}")
    return "; ".join(parts)
