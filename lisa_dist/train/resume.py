"""What a trainer's run begins from, as `--resume_from_checkpoint` says, and whether it can go on as the same run.

A checkpoint has the identity of its run in a file of its own: examples, seeds, model, schedule and optimizer. A resumed
run that has other examples, seeds or another model would go on as no run does, and is refused; what else differs takes
effect and is listed. Other tasks than supervised fine-tuning need a reference model, or answers that are in use, too.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed as dist
from torch.utils.data import IterableDataset
from transformers import PretrainedConfig, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from lisa_dist.checkpoint.resume import find_checkpoint, has_only_weights, read_state
from lisa_dist.distributed.collectives import gather, raise_shared
from lisa_dist.errors import UserError
from lisa_dist.files import read_json
from lisa_dist.removed import settings_of_checkpoint
from lisa_dist.run_folder import IDENTITY_NAME, TRAINER_STATE_NAME

_TASK_TRAINERS = ("DPOTrainer", "KTOTrainer", "ORPOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer")
# Examples that are looked at, in even steps from the first to the last, which any change of order or number shifts.
_SAMPLE = 4096
_SEEDS = ("seed", "data_seed", "group_by_length", "train_sampling_strategy")
_SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
_END = ("max_steps", "num_train_epochs")
_OPTIMIZER = ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
_LOSS = ("label_smoothing_factor", "neftune_noise_alpha")
# TRL's arguments for other tasks, where a run has them.
_OF_PREFERENCES = ("beta", "desirable_weight", "undesirable_weight")
_OF_ANSWERS = ("num_generations", "num_iterations", "steps_per_generation", "temperature", "max_completion_length")
_OF_TASKS = (*_OF_PREFERENCES, *_OF_ANSWERS, "precompute_ref_log_probs")
# Entries of a model's config that describe how it is stored and run, not what it computes.
_NOT_THE_MODEL = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "name_or_path"}


class Beginning(NamedTuple):
    """A checkpoint and its state, or a folder whose weights a new run begins from, or neither: step 0."""

    checkpoint: Path | None = None
    state: dict[str, Any] | None = None
    weights_from: Path | None = None


def find_beginning(wanted: str | bool | None, output_dir: str, say: Callable[[str], object]) -> Beginning:
    """What `wanted` is: a folder, True for the newest whole checkpoint, or "auto"; all ranks call it.

    Raises ValueError on all ranks where there is none.
    """
    if wanted in (None, False):
        return Beginning()
    if wanted in (True, "auto"):
        found = find_checkpoint(output_dir)
        if found is not None:
            check_saved_by_trainer(*found)
            return Beginning(*found)
        if wanted is True:
            raise UserError(
                f"--resume_from_checkpoint true: there is no whole checkpoint in --output_dir {output_dir}."
            )
        say(f"no checkpoint in {output_dir} yet: the run begins at step 0.")
        return Beginning()
    folder = Path(str(wanted))
    # Rank 0's view counts: a rank that saw no folder and raised alone would leave the others waiting.
    is_folder, only_weights = gather((folder.is_dir(), has_only_weights(folder)))[0]
    if not is_folder:
        raise UserError(f"--resume_from_checkpoint {folder}: no such folder.")
    if only_weights:
        say(f"{folder} is no checkpoint of a LISA run: a new run begins from its weights.")
        return Beginning(weights_from=folder)
    state = read_state(folder)
    check_saved_by_trainer(folder, state)
    return Beginning(folder, state)


def check_saved_by_trainer(folder: Path, state: dict[str, Any]) -> None:
    """Raise UserError for a LISA checkpoint without what a trainer needs to go on, or by settings that are gone."""
    missing = [name for name in (TRAINER_STATE_NAME, SCHEDULER_NAME) if name not in state["files"]]
    if missing:
        raise UserError(
            f"--resume_from_checkpoint {folder}: there is no {missing[0]} in it: it was saved in a loop of one's "
            "own, and goes on there with load_checkpoint()."
        )
    settings_of_checkpoint(state["lisa"]["config"], f"--resume_from_checkpoint {folder}: its run had ")


def check_beginning(trainer: Any, begins: Beginning) -> None:
    """Raise UserError for a run that begins from a folder of weights beside a reference model of others.

    Of a resume whose rows come in another order than they would have it says so.
    """
    if begins.checkpoint is not None:
        why = None
        if getattr(trainer.args, "train_sampling_strategy", None) == "group_by_length":
            why = "--train_sampling_strategy group_by_length groups rows anew"
        elif isinstance(trainer.train_dataset, IterableDataset) and getattr(trainer, "_stream", None) is None:
            why = "of streamed rows the Trainer knows the place in the first pass alone"
        if why is not None:
            trainer.accelerator.print(f"this resume is not bit for bit: {why}.")
    if begins.weights_from is None or task_trainer_of(type(trainer)) is None:
        return
    by_reference = getattr(trainer, "ref_model", None) is not None
    if by_reference or getattr(trainer.args, "precompute_ref_log_probs", False):
        raise UserError(
            f"--resume_from_checkpoint {begins.weights_from}: is a model and no checkpoint, and the reference model "
            "would be another one; give it as --model_name_or_path."
        )


def load_schedule(scheduler: Any, groups: list[dict[str, Any]], state: dict[str, Any], ratio: float) -> None:
    """Go on with a saved schedule, times `ratio`; where there are other groups, each has the schedule's rate."""
    for name in ("base_lrs", "_last_lr"):
        if name in state:
            state[name] = [rate * ratio for rate in state[name]]
    if len(state.get("base_lrs", groups)) != len(groups):
        state |= {name: value for name, value in scheduler.state_dict().items() if isinstance(value, list)}
        state["_last_lr"] = [group["lr"] for group in groups]
    scheduler.load_state_dict(state)


def task_trainer_of(trainer_class: type) -> str | None:
    """The name of TRL's trainer that a class is made of; None for other trainers."""
    names = [one.__name__ for one in trainer_class.__mro__ if one.__module__.split(".")[0] == "trl"]
    return next((name for name in names if name in _TASK_TRAINERS), None)


def describe_identity(
    args: TrainingArguments, config: PretrainedConfig | None, examples: Any, trainer: str | None = None
) -> dict[str, Any]:
    """A run's identity, of values that JSON has. `examples` are those that the trainer samples from.

    `trainer`: of TRL's the name, where it is one for another task than supervised fine-tuning.
    """
    model = {} if config is None else config.to_dict()
    names = [*_SCHEDULE, *_END, *_OPTIMIZER, *_LOSS, *(name for name in _OF_TASKS if hasattr(args, name))]
    identity = {
        "examples": len(examples) if isinstance(examples, Sized) else None,
        "data": fingerprint(examples),
        **({} if trainer is None else {"trainer": trainer}),
        "seeds": {name: getattr(args, name) for name in _SEEDS if hasattr(args, name)},
        "hyperparameters": {name: getattr(args, name, None) for name in names},
        "model": {name: value for name, value in model.items() if name not in _NOT_THE_MODEL and name[0] != "_"},
    }
    # As JSON gives it back.
    return json.loads(json.dumps(identity, default=lambda other: getattr(other, "value", str(other))))


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


def _bytes_of(example: Any) -> bytes:
    def values(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else type(value).__name__  # images: that they are there

    return json.dumps(example, sort_keys=True, default=values).encode()


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
    if other := _differing(then["model"], now["model"]):
        raise UserError(
            f"--resume_from_checkpoint {folder}: its run had another model: {', '.join(other)}. Give the config that "
            "it had."
        )
    differing = [f"--{each}" for each in _differing(then["seeds"], now["seeds"])]
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
    changed = [f"--{each}" for each in _differing(saved, current)]
    factor = current["learning_rate"] / saved["learning_rate"] if saved["learning_rate"] else 1.0
    return differing + changed, factor


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What both have and is not the same; releases add settings."""
    names = [name for name in then if name in now and now[name] != then[name]]
    return [f"{name} {now[name]} (it had {then[name]})" for name in names]


def compare_on_rank_0(
    folder: Path, identity: Callable[[], Mapping[str, Any]], begins_data_anew: bool
) -> tuple[list[str], float]:
    """`compare_identity` on rank 0 for all ranks, which raise together what it raises."""
    problem: str | None = None
    found: tuple[list[str], float] = [], 1.0
    if dist.get_rank() == 0:
        try:
            found = compare_identity(folder, identity(), begins_data_anew)
        except UserError as error:
            problem = str(error)
    raise_shared(problem)
    return gather(found)[0]


def check_goes_on(args: Any, folder: Path, state: Mapping[str, Any], rows_per_step: int) -> None:
    """Raise UserError where a run would not go on as it was.

    With another global batch size it has another schedule, another place in the data and another end; and a checkpoint
    of GRPO does not hold the answers between two rounds of them.
    """
    then = state.get("rows_per_step", rows_per_step)  # checkpoints of older releases have none
    if then != rows_per_step and not args.ignore_data_skip:
        raise UserError(
            f"--resume_from_checkpoint {folder}: its run had a global batch size of {then}, and here it is "
            f"{rows_per_step}, so it would not go on as it was: give --global_batch_size {then}, or --ignore_data_skip "
            "true to begin the data anew."
        )
    if hasattr(args, "num_iterations") and hasattr(args, "steps_per_generation"):
        steps = args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps
        step = int(state["engine"]["global_steps"])
        if steps > 1 and step % steps:
            raise UserError(
                f"--resume_from_checkpoint {folder}: its answers are used for {steps} steps, and step {step} is amid "
                f"them; resume from a multiple of {steps}, and give a multiple of it as --save_steps."
            )
