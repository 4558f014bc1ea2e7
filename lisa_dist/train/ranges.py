"""Ranges of numbers, and objects, among the Trainer's and TRL's arguments, which check few of them themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lisa_dist.errors import UserError

_LONG = 10**9  # seconds, processes, ...: more is a slip of the pen, and overflows elsewhere
# A rule, its check, and the arguments that keep to it where they are given.
_RULES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "1 or more",
        lambda value: 1 <= value <= _LONG,
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "global_batch_size",
            "torch_empty_cache_steps",
            "dataloader_prefetch_factor",
            "dataset_num_proc",
            "ddp_timeout",
            "ddp_bucket_cap_mb",
            "max_completion_length",
            "num_iterations",
        ),
    ),
    (
        "0 or more",
        lambda value: 0 <= value <= _LONG,
        (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "neftune_noise_alpha",
            "eval_delay",
            "save_total_limit",
            "dataloader_num_workers",
            "router_aux_loss_coef",
            "beta",
            "desirable_weight",
            "undesirable_weight",
        ),
    ),
    (
        "above 0",
        lambda value: 0 < value <= _LONG,
        ("num_train_epochs", "adam_epsilon", "logging_steps", "eval_steps", "save_steps", "temperature"),
    ),
    (
        "from 0 up to, not including, 1",
        lambda value: 0 <= value < 1,
        ("adam_beta1", "adam_beta2", "label_smoothing_factor"),
    ),
    ("1 or more; -1 lets --num_train_epochs decide", lambda value: value == -1 or 1 <= value <= _LONG, ("max_steps",)),
    ("1 or more; -1 is no limit", lambda value: value == -1 or 1 <= value <= _LONG, ("max_length",)),
    ("from 0 to 4294967295", lambda value: 0 <= value < 2**32, ("seed", "data_seed")),  # as NumPy takes it
)
# Arguments that are objects; where a text does not begin as JSON does, it would be taken as it is.
_OBJECTS = (
    "model_init_kwargs",
    "dataset_kwargs",
    "lr_scheduler_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
    "accelerator_config",
)


def check_objects(arguments: Any) -> None:
    """Raise UserError for a text in the place of an object."""
    for name in _OBJECTS:
        value = getattr(arguments, name, None)
        is_file = name == "accelerator_config" and isinstance(value, str) and Path(value).is_file()
        if isinstance(value, str) and not value.startswith("{") and not is_file:
            raise UserError(f'--{name} {value}: give an object in JSON, such as {{"name": 1}}.')


def check_ranges(arguments: Any) -> None:
    """Raise UserError for a number out of its range."""
    for rule, holds, names in _RULES:
        for name in names:
            value = getattr(arguments, name, None)  # one that a task lacks is not given
            if value is not None and not holds(value):
                too_large = value > _LONG and not holds(_LONG + 1) and holds(_LONG)
                raise UserError(f"--{name} {value}: {'at most 1e9' if too_large else rule}.")
