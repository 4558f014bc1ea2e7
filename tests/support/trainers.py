"""Trainers by LISA of tiny models on CPU ranks."""

from collections.abc import Callable

import torch
from models import tiny_llama
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lisa_dist import LisaConfig, LisaMixin
from lisa_dist.ds_config import find_ds_config


class Shuffled(LisaMixin, Trainer):
    """Any Trainer subclass will do; this one shuffles as the Trainer does."""


class InOrder(Shuffled):
    """Takes the rows in order, for a reference to take them so too."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class BeforeStep(TrainerCallback):
    """Calls a function before a step."""

    def __init__(self, step: int, act: Callable[[], object]):
        self._step, self._act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self._step:
            self._act()


def rows_of(batches) -> list[dict]:
    """The rows of batches of token ids, every token with a label."""
    return [{"input_ids": row, "labels": row} for batch in batches for row in batch]


def cpu_arguments(output_dir: str, kind: type[TrainingArguments] = TrainingArguments, **changes) -> TrainingArguments:
    """Arguments of a run that logs every step, saves nothing and reports to nobody."""
    default = {
        "use_cpu": True,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return kind(output_dir=output_dir, **default | changes)


def lisa_trainer(
    output_dir: str, rows: list[dict], changes: dict, kind: type = InOrder, build: Callable = tiny_llama, **own
) -> LisaMixin:
    """A trainer with `changes` of its arguments, those of LISA's config among them, and `own` settings."""
    unset_hf_deepspeed_config()  # of an earlier trainer in this process: the model would be built under its zero.Init
    changes = {"deepspeed": find_ds_config("zero2")} | changes
    of_lisa = {name: changes.pop(name) for name in list(changes) if name.startswith("lisa_")}
    model = build().to(torch.bfloat16 if changes.get("bf16") else torch.float32)
    args = cpu_arguments(output_dir, **changes)
    return kind(model=model, args=args, train_dataset=rows, lisa_config=LisaConfig.plain(**of_lisa), **own)
