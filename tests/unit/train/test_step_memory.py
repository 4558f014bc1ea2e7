"""A trainer's micro-batch for the memory plan: which losses are known, and from which model it is read."""

from functools import partial

import pytest
import torch
from models import tiny_llama
from transformers import Trainer, TrainingArguments

from lisa_dist import LisaMixin
from lisa_dist.train.sft_trainer import LisaTrainer
from lisa_dist.train.step_memory import StepWorkload


class OfTransformers(LisaMixin, Trainer):
    pass


class OwnLoss(LisaTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class BoundLoss(LisaTrainer):
    compute_loss = partial(LisaTrainer.compute_loss)  # has no name to go by


@pytest.mark.parametrize(
    ("trainer", "smoothing", "loss", "planned"),
    [
        (LisaTrainer, 0, "chunked", "chunked"),
        (LisaTrainer, 0, "liger", "liger"),
        (LisaTrainer, 0, "logits", "logits"),
        (OfTransformers, 0, "chunked", "own"),
        (OwnLoss, 0, "chunked", None),
        (BoundLoss, 0, "chunked", None),
        (LisaTrainer, 0.1, "chunked", None),
    ],
)
def test_losses_whose_memory_can_be_planned(tmp_path, trainer, smoothing, loss, planned):
    args = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=smoothing, use_cpu=True)
    workload = StepWorkload(args, trainer.compute_loss, loss).of(tiny_llama(), rows=2, tokens=16, padded=False)
    assert (workload and workload.loss) == planned


def test_dtype_is_that_of_the_model_that_trains(tmp_path):
    workload = StepWorkload(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), LisaTrainer.compute_loss)
    for dtype in (torch.float32, torch.bfloat16):
        assert workload.of(tiny_llama().to(dtype), rows=2, tokens=16, padded=False).dtype is dtype
