"""What a resume of another task than supervised fine-tuning needs besides: the reference model, answers in use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from lisa_dist.errors import UserError
from lisa_dist.train.resume_from import Beginning

_TASK_TRAINERS = ("DPOTrainer", "KTOTrainer", "ORPOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer")


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
