"""The heartbeat: whatever a Trainer does for long, the watchdog hears of it."""

from types import SimpleNamespace

import pytest
from transformers import TrainerCallback, TrainerControl

from lisa_dist.train.callbacks import Heartbeat

# What else a Trainer calls comes right before or after one of the events that beat.
SILENT = {"on_init_end", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_evaluate", "on_predict", "on_log"}
SILENT |= {"on_pre_optimizer_step", "on_optimizer_step", "on_push_begin"}


@pytest.mark.parametrize("event", sorted(name for name in vars(TrainerCallback) if name.startswith("on_")))
def test_long_phases_beat_and_the_end_waits_for_no_step(event):
    calls = []
    watchdog = SimpleNamespace(beat=lambda: calls.append("beat"), end_steps=lambda: calls.append("end"))
    getattr(Heartbeat(watchdog), event)(None, None, TrainerControl(), metrics={})
    assert calls == (["end"] if event == "on_train_end" else [] if event in SILENT else ["beat"])
