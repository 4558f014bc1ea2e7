"""What a trainer's run begins from, as `--resume_from_checkpoint` says, and what it needs to go on.

Other tasks than supervised fine-tuning need a reference model and answers that are in use as well.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset
from transformers.trainer import SCHEDULER_NAME

from lisa_dist.checkpoint.resume import find_checkpoint, has_only_weights, read_state
from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import UserError
from lisa_dist.removed import settings_of_checkpoint
from lisa_dist.run_folder import TRAINER_STATE_NAME

_TASK_TRAINERS = ("DPOTrainer", "KTOTrainer", "ORPOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer")


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


def load_schedule(scheduler: Any, groups: list[dict[str, Any]], state: dict[str, Any], ratio: float) -> None:
    """Go on with a saved schedule, times `ratio`; where there are other groups, each has the schedule's rate."""
    for name in ("base_lrs", "_last_lr"):
        if name in state:
            state[name] = [rate * ratio for rate in state[name]]
    if len(state.get("base_lrs", groups)) != len(groups):
        state |= {name: value for name, value in scheduler.state_dict().items() if isinstance(value, list)}
        state["_last_lr"] = [group["lr"] for group in groups]
    scheduler.load_state_dict(state)


def check_saved_by_trainer(folder: Path, state: dict[str, Any]) -> None:
    """Raise UserError for a LISA checkpoint without what a trainer needs to go on, or by settings that are gone."""
    missing = [name for name in (TRAINER_STATE_NAME, SCHEDULER_NAME) if name not in state["files"]]
    if missing:
        raise UserError(
            f"--resume_from_checkpoint {folder}: there is no {missing[0]} in it: it was saved in a loop of one's "
            "own, and goes on there with load_checkpoint()."
        )
    settings_of_checkpoint(state["lisa"]["config"], f"--resume_from_checkpoint {folder}: its run had ")


def task_trainer_of(trainer_class: type) -> str | None:
    """The name of TRL's trainer that a class is made of; None for other trainers."""
    names = [one.__name__ for one in trainer_class.__mro__ if one.__module__.split(".")[0] == "trl"]
    return next((name for name in names if name in _TASK_TRAINERS), None)


def check_beginning(trainer: Any, begins: Beginning) -> None:
    """Raise UserError for a run that begins from a folder of weights beside a reference model of others.

    Of a resume whose rows come in another order than they would have it says so.
    """
    if begins.checkpoint is not None and (why := _why_not_exact(trainer)):
        trainer.accelerator.print(f"this resume is not bit for bit: {why}.")
    if begins.weights_from is None or task_trainer_of(type(trainer)) is None:
        return
    by_reference = getattr(trainer, "ref_model", None) is not None
    if by_reference or getattr(trainer.args, "precompute_ref_log_probs", False):
        raise UserError(
            f"--resume_from_checkpoint {begins.weights_from}: is a model and no checkpoint, and the reference model "
            "would be another one; give it as --model_name_or_path."
        )


def _why_not_exact(trainer: Any) -> str | None:
    if getattr(trainer.args, "train_sampling_strategy", None) == "group_by_length":
        return "--train_sampling_strategy group_by_length groups rows anew"
    if isinstance(trainer.train_dataset, IterableDataset):
        return "of streamed rows the Trainer knows the place in the first pass alone"
    return None


def check_generations(args: Any, folder: Path, state: Mapping[str, Any]) -> None:
    """Raise UserError where a checkpoint of GRPO lies between two rounds of answers, which it does not hold."""
    if not hasattr(args, "num_iterations") or not hasattr(args, "steps_per_generation"):
        return
    steps = args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps
    step = int(state["engine"]["global_steps"])
    if steps > 1 and step % steps:
        raise UserError(
            f"--resume_from_checkpoint {folder}: its answers are used for {steps} steps, and step {step} is amid them; "
            f"resume from a multiple of {steps}, and give a multiple of it as --save_steps."
        )
