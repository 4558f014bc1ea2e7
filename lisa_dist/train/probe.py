"""The probe of layers (`--lisa_probe_steps`) in a Trainer: its rows, its steps, and the line that a run prints."""

import copy
import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainingArguments

from lisa_dist.config import LisaConfig
from lisa_dist.core.probe import probe_layers, stretches
from lisa_dist.errors import UserError
from lisa_dist.train.random_states import random_states_kept
from lisa_dist.zero.stage3 import forget_module_order

HELD_OUT_ROWS = 64
_METRICS = ("_metrics", "_stored_metrics", "_total_train_tokens")  # what TRL's trainers gather for their next log


def check_probe_of_run(config: LisaConfig, num_layers: int, max_steps: int) -> None:
    """Raise UserError for a probe that is as long as its run."""
    steps = config.lisa_probe_steps
    if not steps:
        return
    count = len(stretches(num_layers, num_active=1))  # whatever gamma is
    if count * steps >= max_steps:
        raise UserError(
            f"--lisa_probe_steps {steps}: {count} sets of layers take {count * steps} steps, and the run has "
            f"{max_steps}; give at most {(max_steps - 1) // count}."
        )


def check_probe_rows(config: LisaConfig, args: TrainingArguments, train: Any, held_out: Any) -> None:
    """Raise UserError where there are too few rows for a probe; a stream is not counted. `held_out` may be None."""
    if not config.lisa_probe_steps or not hasattr(train, "__len__"):
        return
    together = args.train_batch_size * args.world_size
    wanted = config.lisa_probe_steps * args.gradient_accumulation_steps * together
    if held_out is None:
        there = min(len(train), wanted), max(0, len(train) - wanted)
    else:
        there = len(train), len(held_out) if hasattr(held_out, "__len__") else 2 * together
    if there[0] < wanted or there[1] < 2 * together:
        raise UserError(
            f"--lisa_probe_steps {config.lisa_probe_steps}: a probe trains on {wanted} rows and measures on "
            f"{2 * together} or more, and there are {there[0]} and {there[1]}; give fewer steps, or more data."
        )


def probe_in_trainer(trainer: Any) -> str:
    """Probe before the first step, by the trainer's loss, and leave its random states as they were; a line about it.

    Rates rise to the run's own. Held-out rows are those of the evaluation, else rows of the training data that the
    probe does not train on. Raises ValueError where there are too few.
    """
    lisa, args = trainer.lisa, trainer.args
    engine, steps = lisa.engine, lisa.config.lisa_probe_steps
    micro_batches = engine.gradient_accumulation_steps()
    rate = args.learning_rate * lisa.config.rate_factor(len(lisa.blocks.layers))
    train, held_out = _batches(trainer, steps * micro_batches)

    def loss_of(batch: Any) -> torch.Tensor:
        trainer._watchdog.beat()
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(engine, trainer._prepare_inputs(copy.copy(batch)))

    def train_step(step: int) -> None:
        engine.train()  # a model that was just loaded is not
        trainer._memory.restore_checkpointing()
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * (step + 1) / steps
        for batch in train[step * micro_batches : (step + 1) * micro_batches]:
            engine.backward(loss_of(batch))
            engine.step()

    def held_out_losses() -> list[float]:
        engine.eval()
        forget_module_order(engine)
        with torch.no_grad():
            losses = [loss_of(batch).item() for batch in held_out]
        forget_module_order(engine)
        return losses

    metrics = {name: copy.deepcopy(vars(trainer)[name]) for name in _METRICS if name in vars(trainer)}
    with random_states_kept():
        losses = probe_layers(lisa, train_step, held_out_losses)
    engine.train()
    vars(trainer).update(metrics)
    cut = stretches(len(lisa.blocks.layers), lisa.config.lisa_activated_layers)
    told = [
        f"{stretch.layers[0]}-{stretch.layers[-1]} {loss:.4f} {lisa.selection.probed[stretch.layers[0]]:.3g}"
        for stretch, loss in zip(cut, losses, strict=True)
    ]
    return f"layers probed for {steps} steps, held-out loss and weight of each: {', '.join(told)}"


def _batches(trainer: Any, num_micro_batches: int) -> tuple[list, list]:
    """This rank's micro-batches to train on and held out: of several evaluation sets the first."""
    args = trainer.args
    rows, together = args.train_batch_size, args.train_batch_size * args.world_size
    held_out: Any = trainer.eval_dataset
    if isinstance(held_out, dict):
        held_out = next(iter(held_out.values()))
    wanted, measured = num_micro_batches * together, max(2, math.ceil(HELD_OUT_ROWS / together)) * together
    if held_out is None:
        found = _some_rows(trainer.train_dataset, wanted + measured, args.seed)
        train, held_out = found[:wanted], found[wanted:]
    else:
        train = _some_rows(trainer.train_dataset, wanted, args.seed)
        held_out = _some_rows(held_out, measured, args.seed)
    held_out = held_out[: len(held_out) // together * together]
    check_probe_rows(trainer.lisa.config, args, train, held_out)
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="probe")
    mine = args.process_index * rows
    return tuple(  # type: ignore[return-value]  # two lists
        [collate(each[start + mine : start + mine + rows]) for start in range(0, len(each), together)]
        for each in (train, held_out)
    )


def _some_rows(dataset: Any, count: int, seed: int) -> Sequence:
    """The first rows of a stream, else rows from all over the dataset; the same on all ranks."""
    if not hasattr(dataset, "__len__"):
        return list(itertools.islice(dataset, count))
    places = random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))
    return [dataset[place] for place in places]
