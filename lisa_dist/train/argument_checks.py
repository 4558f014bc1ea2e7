"""What transformers, TRL and DeepSpeed would refuse of their own arguments with a model loaded, refused before."""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import get_scheduler, integrations

from lisa_dist.errors import UserError
from lisa_dist.text import in_one_line

# Trackers whose check in transformers has another name.
_CHECKED_AS = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
# Keys of a DeepSpeed config that say what an argument says, and the argument.
_SAID_TWICE = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
}


def check_trackers(names: list[str]) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in names:
        is_there = getattr(integrations, f"is_{_CHECKED_AS.get(name, name)}_available", None)
        if is_there is not None and not is_there():
            raise UserError(f"--report_to {name}: its package is not installed; install it, or give another, or none.")


def check_schedule(training: Any) -> None:
    """Raise UserError for a schedule of the learning rate that cannot be built by its arguments."""
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate or 1.0)
    given = training.lr_scheduler_kwargs or {}
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=dict(given))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {given}: {in_one_line(error).rstrip('.')}."
        ) from error


def check_loss_type(training: Any) -> None:
    """Raise UserError for a loss that TRL's own help of `loss_type` does not name, where it names some."""
    given = getattr(training, "loss_type", None) or []
    about = type(training).__dataclass_fields__["loss_type"].metadata if given else {}
    known = list(dict.fromkeys(re.findall(r"(?<!=)['\"](\w+)['\"]", about.get("help", ""))))
    for name in [given] if isinstance(given, str) else given:
        if known and name not in known:
            raise UserError(f"--loss_type {name}: unknown; choose one of {', '.join(known)}.")


def check_evaluation(training: Any, has_held_out: bool) -> None:
    """Raise UserError for evaluations of nothing."""
    strategy = getattr(training.eval_strategy, "value", training.eval_strategy)
    if strategy != "no" and not has_held_out:
        raise UserError(
            f"--eval_strategy {strategy}: there are no rows to evaluate; give --eval_rows 100, or --eval_dataset_name."
        )


def check_ds_arguments(training: Any, ds_config: Mapping[str, Any]) -> None:
    """Raise UserError where a DeepSpeed config says another number than the argument that it shares."""
    for dotted, flag in _SAID_TWICE.items():
        section, _, key = dotted.rpartition(".")
        holder = (ds_config.get(section) or {}) if section else ds_config
        said, given = holder.get(key), getattr(training, flag)
        if key == "enabled":
            given = bool(given or getattr(training, f"{flag}_full_eval"))
        if said not in (None, "auto") and said != given:
            raise UserError(
                f'the DeepSpeed config has {dotted} = {said}, but --{flag} is {given}; make them equal, or give "auto".'
            )
    whole = training.per_device_train_batch_size * training.gradient_accumulation_steps
    whole *= int(os.environ.get("WORLD_SIZE", 1))
    if (said := ds_config.get("train_batch_size")) not in (None, "auto", whole):
        raise UserError(
            f"the DeepSpeed config has train_batch_size = {said}, but --per_device_train_batch_size, "
            f'--gradient_accumulation_steps and the ranks make {whole}: make them equal, or write "auto".'
        )
