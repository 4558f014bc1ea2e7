"""The heartbeat: whatever a Trainer does for long, the watchdog hears of it."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from models import tiny_llama, token_batches
from ranks import run_ranks
from trainers import lisa_trainer, rows_of
from transformers import TrainerCallback, TrainerControl

from lisa_dist.distributed.watchdog import Watchdog
from lisa_dist.memory.run_memory import RunMemory
from lisa_dist.train import trainer as trainer_module
from lisa_dist.train.callbacks import LisaSteps

# What else a Trainer calls comes right before or after one of the events that beat.
SILENT = {"on_init_end", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_evaluate", "on_predict", "on_log"}
SILENT |= {"on_pre_optimizer_step", "on_optimizer_step", "on_push_begin"}
BEATS = {"on_step_end": 3}  # before and after a plan, and before the ranks agree on a signal


@pytest.mark.parametrize("event", sorted(name for name in vars(TrainerCallback) if name.startswith("on_")))
def test_long_phases_beat_and_the_end_waits_for_no_step(event):
    calls = []
    watchdog = SimpleNamespace(beat=lambda: calls.append("beat"), end_steps=lambda: calls.append("end"))
    steps = LisaSteps(MagicMock(), MagicMock(), watchdog)
    getattr(steps, event)(
        MagicMock(), MagicMock(global_step=1, is_world_process_zero=False), TrainerControl(), metrics={}
    )
    assert calls == (["end"] if event == "on_train_end" else [] if event in SILENT else ["beat"] * BEATS.get(event, 1))


class Steps(TrainerCallback):
    def __init__(self, calls: list[str]):
        self._calls = calls

    def on_train_begin(self, *args, **kwargs):
        self._calls.append("train begins")

    def on_step_begin(self, *args, **kwargs):
        self._calls.append("step begins")


def phases(folder: str) -> list[str]:
    """What one rank does in a run of one step that begins from the weights in `folder`/model, and its heartbeats."""
    calls: list[str] = []

    def record(owner: Any, function: str, name: str) -> None:
        original = getattr(owner, function)
        setattr(owner, function, lambda *args, **kwargs: (calls.append(name), original(*args, **kwargs))[1])

    record(Watchdog, "beat", "beat")
    record(trainer_module, "start_from_weights", "load")
    record(trainer_module, "describe_ranks", "ranks")
    record(RunMemory, "set_checkpointing", "plan")
    record(RunMemory, "end_step", "end_step")
    record(trainer_module, "save_checkpoint", "save")
    tiny_llama().save_pretrained(f"{folder}/model")
    changes = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "steps"}
    rows = rows_of(token_batches(1, rows=2)[0])
    trainer = lisa_trainer(f"{folder}/out", rows, changes, callbacks=[Steps(calls)])
    trainer.train(resume_from_checkpoint=f"{folder}/model")
    return calls


@pytest.mark.usefixtures("cpu_ops")
def test_no_two_long_phases_are_without_a_beat_between_them(tmp_path):
    (calls,) = run_ranks(phases, 1, str(tmp_path))
    set_up = ["beat", "load", "beat", "plan", "beat", "ranks", "beat"]
    step = ["step begins", "beat", "beat", "end_step", "beat", "beat", "save", "beat"]
    assert calls == [*set_up, "train begins", "beat", *step]
