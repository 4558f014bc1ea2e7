"""The last batch of an epoch, and of an evaluation, on several ranks is that of one rank."""

import contextlib
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from cases import full
from datasets import Dataset
from models import VOCABULARY, tiny_llama, tiny_tokenizer
from ranks import run_ranks
from torch import distributed as dist
from trainers import cpu_arguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lisa_dist import LisaConfig
from lisa_dist.run.task_configs import LisaSFTConfig
from lisa_dist.train import sft_trainer
from lisa_dist.train.sft_trainer import LisaTrainer

STEP, TOKENS = 8, 24  # rows of a step, and tokens of a row

pytestmark = pytest.mark.usefixtures("cpu_ops")


def rows_of(count: int) -> Dataset:
    """Rows of several lengths, with prompts."""
    generator, rows = torch.Generator().manual_seed(1), []
    for number in range(count):
        ids = torch.randint(4, VOCABULARY, (9 + 3 * (number % 5),), generator=generator).tolist()
        prompt = 2 + number % 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def train(folder: str, stage: str, rows: int, micro: int, settings: dict, as_before: bool = False) -> dict:
    """Two epochs with an evaluation after each; `as_before`: repeated rows keep their labels."""
    unset_hf_deepspeed_config()
    settings = dict(settings)
    loss = settings.pop("loss", "chunked")
    args = cpu_arguments(
        folder,
        LisaSFTConfig,
        deepspeed=str(Path(__file__).parents[3] / "ds_configs" / f"{stage}.json"),
        bf16=False,
        num_train_epochs=2,
        global_batch_size=STEP,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=2,
        learning_rate=2e-3,
        adam_epsilon=1e-5,  # or elements whose gradient is rounding alone would move by the whole rate
        eval_strategy="epoch",
        **{"max_length": TOKENS} | settings,
    )
    keep_labels = patch.object(sft_trainer, "leave_out_labels", lambda loader: loader)
    with keep_labels if as_before else contextlib.nullcontext():
        trainer = LisaTrainer(
            model=tiny_llama(),
            args=args,
            train_dataset=rows_of(rows),
            eval_dataset=rows_of(rows % 16 or 5),
            processing_class=tiny_tokenizer(),
            loss=loss,
            lisa_config=LisaConfig(lisa_activated_layers=2, lisa_interval_steps=2),
        )
        trainer.train()
    logs, names = trainer.state.log_history, ("loss", "grad_norm", "eval_loss")
    found = {name: [log[name] for log in logs if name in log] for name in names}
    assert len(found["loss"]) == trainer.state.max_steps
    dist.barrier()
    return found


@pytest.mark.parametrize(
    ("stage", "world_size", "rows", "micro", "settings"),
    [
        ("zero2", 2, 21, 2, {}),  # at the end 2 rows and 2, then 1 and a repeated one: accumulation
        ("zero2", 2, 17, 4, {"loss": "logits"}),  # rank 1 has no row of its own at the end
        full("zero3", 2, 17, 4, {"padding_free": True, "max_length": None}),
        full("zero3", 2, 17, 4, {"loss": "logits"}),
        full("zero1", 4, 19, 2, {}),
        full("zero2", 4, 9, 2, {}),
        full("zero2", 2, 5, 2, {}),  # fewer than a step has
        full("zero2", 2, 37, 2, {"packing": True}),
    ],
)
def test_the_end_of_an_epoch_is_that_of_one_rank(tmp_path, stage, world_size, rows, micro, settings):
    run = (stage, rows, micro, settings)
    [alone] = run_ranks(train, 1, str(tmp_path / "alone"), *run)
    for found in run_ranks(train, world_size, str(tmp_path / "several"), *run):
        for name, values in alone.items():
            assert found[name] == pytest.approx(values, rel=2e-5, abs=1e-6), name


def test_rows_that_divide_evenly_train_to_the_same_bits(tmp_path):
    run = ("zero2", 16, 2, {})
    now, before = (run_ranks(train, 2, str(tmp_path / str(old)), *run, old) for old in (False, True))
    assert now[0]["loss"] == before[0]["loss"]
    assert now[0]["grad_norm"] == before[0]["grad_norm"]
