"""What makes a run this run and no other, for a resume: its examples, seeds, model, schedule and optimizer.

A checkpoint has it in a file of its own. A resumed run that has other examples, seeds or another model would go on as
no run does, and is refused; what else differs takes effect and is listed.
"""

import hashlib
import json
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, TrainingArguments

from lisa_dist.distributed.collectives import gather, raise_shared
from lisa_dist.errors import UserError
from lisa_dist.files import read_json, write_json
from lisa_dist.run_folder import IDENTITY_NAME

# Examples that are looked at, in even steps from the first to the last, which any change of order or number shifts.
_SAMPLE = 4096
_SEEDS = ("seed", "data_seed", "group_by_length", "train_sampling_strategy")
_TAKE_EFFECT = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
)
# Of TRL's arguments for other tasks, where a run has them.
_OF_TASKS = (
    "beta",
    "desirable_weight",
    "undesirable_weight",
    "num_generations",
    "num_iterations",
    "steps_per_generation",
    "temperature",
    "max_completion_length",
    "precompute_ref_log_probs",
)
# Entries of a model's config that describe how it is stored and run, not what it computes.
_NOT_THE_MODEL = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "name_or_path"}


def describe_identity(
    args: TrainingArguments, config: PretrainedConfig | None, examples: Any, trainer: str | None = None
) -> dict[str, Any]:
    """A run's identity, of values that JSON has. `examples` are those that the trainer samples from.

    `trainer`: of TRL's the name, where it is one for another task than supervised fine-tuning.
    """
    model = {} if config is None else config.to_dict()
    names = [*_TAKE_EFFECT, *(name for name in _OF_TASKS if hasattr(args, name))]
    return {
        "examples": len(examples) if isinstance(examples, Sized) else None,
        "data": fingerprint(examples),
        **({} if trainer is None else {"trainer": trainer}),
        "seeds": {name: _plain(getattr(args, name)) for name in _SEEDS if hasattr(args, name)},
        "hyperparameters": {name: _plain(getattr(args, name, None)) for name in names},
        "model": {
            name: _plain(value) for name, value in model.items() if name not in _NOT_THE_MODEL and name[0] != "_"
        },
    }


def fingerprint(examples: Any) -> str | None:
    """SHA-256 of the examples in their order, of up to 4,096 of them; None where they are not the same twice.

    So it is for streams, and where examples are changed at random as they are taken. torch's random state is kept.
    """
    if not isinstance(examples, Sized) or not hasattr(examples, "__getitem__"):
        return None
    count = len(examples)
    numbers = sorted({round(part * (count - 1) / (_SAMPLE - 1)) for part in range(_SAMPLE)}) if count else []
    total = hashlib.sha256(str(count).encode())
    with torch.random.fork_rng(devices=[]):
        for number in numbers:
            taken = _bytes_of(examples[number])
            if number == 0 and taken != _bytes_of(examples[number]):
                return None
            total.update(taken)
    return total.hexdigest()


def write_identity(identity: Mapping[str, Any], folder: Path) -> None:
    """Write it into a checkpoint's folder."""
    write_json(folder / IDENTITY_NAME, dict(identity))


def compare_identity(folder: Path, now: Mapping[str, Any], begins_data_anew: bool) -> tuple[list[str], float]:
    """What differs from the run of a checkpoint and takes effect, a phrase each, and the factor of its learning rates.

    Raises UserError for other data, seeds or another model. `begins_data_anew`: data and seeds may differ. Checkpoints
    of older releases have nothing to compare.
    """
    path = folder / IDENTITY_NAME
    if not path.exists():
        return [], 1.0
    then = read_json(path)
    if then.get("trainer") != now.get("trainer") and None not in (then.get("trainer"), now.get("trainer")):
        raise UserError(
            f"--resume_from_checkpoint {folder}: its run was of another task, by {then['trainer']}, and this one is by "
            f"{now['trainer']}; begin a new run, from its weights by lisa-dist export."
        )
    _check_model(folder, then["model"], now["model"])
    differing = [
        f"--{name} {now['seeds'][name]} (it had {value})"
        for name, value in then["seeds"].items()
        if name in now["seeds"] and now["seeds"][name] != value
    ]
    if then["examples"] != now["examples"]:
        differing.append(f"{now['examples']} examples (it had {then['examples']})")
    elif None not in (then["data"], now["data"]) and then["data"] != now["data"]:
        differing.append("other examples, or another order, length or labels of them")
    if differing and not begins_data_anew:
        raise UserError(
            f"--resume_from_checkpoint {folder}: its run had other data: {', '.join(differing)}. Give what it had, or "
            "--ignore_data_skip true to begin the data anew."
        )
    saved, current = then["hyperparameters"], now["hyperparameters"]
    changed = [
        f"--{name} {current[name]} (it had {value})"
        for name, value in saved.items()
        if name in current and current[name] != value
    ]
    factor = current["learning_rate"] / saved["learning_rate"] if saved["learning_rate"] else 1.0
    return differing + changed, factor


def check_global_batch_size(folder: Path, state: Mapping[str, Any], now: int, begins_data_anew: bool) -> None:
    """Raise UserError for another global batch size: another schedule, another place in the data, another end."""
    then = state.get("rows_per_step", now)  # which checkpoints of older releases do not tell
    if then != now and not begins_data_anew:
        raise UserError(
            f"--resume_from_checkpoint {folder}: its run had a global batch size of {then}, and here it is {now}, "
            f"so it would not go on as it was: give --global_batch_size {then}, or --ignore_data_skip true to "
            "begin the data anew."
        )


def compare_on_rank_0(folder: Path, mine: Mapping[str, Any] | None, begins_data_anew: bool) -> tuple[list[str], float]:
    """`compare_identity` on the rank that has an identity, for all ranks, which raise together what it raises."""
    found, problem = None, None
    if mine is not None:
        try:
            found = compare_identity(folder, mine, begins_data_anew)
        except UserError as error:
            problem = str(error)
    raise_shared(problem)
    return next(filter(None, gather(found)))


def _check_model(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name in then if name in now and then[name] != now[name]]  # releases add settings
    if differing:
        listed = ", ".join(f"{name} {now[name]} (it had {then[name]})" for name in differing)
        raise UserError(
            f"--resume_from_checkpoint {folder}: its run had another model: {listed}. Give the config that it had."
        )


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", str(other)), sort_keys=True))


def _bytes_of(example: Any) -> bytes:
    return json.dumps(example, sort_keys=True, default=_values).encode()


def _values(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__  # images: that they are there
