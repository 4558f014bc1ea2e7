"""The line of a run's progress and its figures; and training arguments that keep their secrets, and write none."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import TrainingArguments

from lisa_dist.train import monitoring
from lisa_dist.train.monitoring import Progress, SpeedMeter, describe_batch, hide_secrets_of

LOG = {"loss": 2.91034, "learning_rate": 6.2e-6, "grad_norm": 1.431, "tokens_per_second": 3124.6,
       "memory_bytes": 1.2 * 2**30, "lisa/period": 3, "rewards/margins": 0.25}  # fmt: skip


def follow(progress: Progress, main: bool = True) -> None:
    """The events of 20 of 36 steps, with a log and an evaluation."""
    state = SimpleNamespace(global_step=0, max_steps=36, is_world_process_zero=main)
    progress.on_train_begin(None, state, None)
    state.global_step = 20
    progress.on_log(None, state, None, logs=LOG)
    progress.on_prediction_step(None, state, None)
    progress.on_log(None, state, None, logs={"eval_loss": 3.0112})
    progress.on_log(None, state, None, logs=LOG)


@pytest.mark.parametrize("forced", [False, True])
def test_plain_lines_in_a_file(capsys, monkeypatch, forced):
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    follow(Progress(lambda: "2, 7"))
    first, evaluated, second = capsys.readouterr().out.splitlines()
    figures = (
        "lr 6.2e-06  grad norm 1.43  reward margin 0.25  3,125 tokens/s  process 1.20 GiB  layers 2, 7  0:00:00 left"
    )
    assert first == f"step 20/36  56%  loss 2.9103  {figures}"
    assert evaluated == "step 20/36  held out 3.0112"
    assert second == first, "what was measured before is not said again, as if it were of now"


def test_the_time_left_is_that_of_the_steps_of_this_start(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(monitoring.time, "monotonic", lambda: now[0])
    state = SimpleNamespace(global_step=100, max_steps=160, is_world_process_zero=True)
    progress = Progress(lambda: "")
    progress.on_train_begin(None, state, None)  # resumed at step 100
    now[0], state.global_step = 1090.0, 110
    progress.on_log(None, state, None, logs={"loss": 1.0})
    assert capsys.readouterr().out == "step 110/160  69%  loss 1.0000  0:07:30 left\n"


def test_the_mean_reward_is_in_the_line_of_a_step(capsys):
    """The loss of GRPO is about 0 however good the answers are."""
    progress, state = Progress(lambda: ""), SimpleNamespace(global_step=0, max_steps=8, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    state.global_step = 2
    progress.on_log(None, state, None, logs={"loss": 1e-9, "reward": 0.43751, "rewards/exact/mean": 0.25})
    assert capsys.readouterr().out.startswith("step 2/8  25%  loss 0.0000  reward 0.4375  ")


def test_other_ranks_say_nothing(capsys):
    follow(Progress(lambda: ""), main=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("width", [60, 100, 200])
def test_a_live_line_in_a_terminal(width, capsys):
    terminal = io.StringIO()
    progress = Progress(lambda: "head; layers 7", Console(file=terminal, force_terminal=True, width=width))
    follow(progress)
    progress.on_train_end()
    said = terminal.getvalue()
    assert "\x1b[?25l" in said
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l"), "the cursor comes back"
    shown = said[said.rindex("20/36") :]
    figures = "56%  3,125 tokens/s  process 1.20 GiB  loss 2.9103  held out 3.0112  lr 6.2e-06  layers 7"
    for figure in figures.split("  "):
        assert figure in said, figure
    assert "held out 3.0112" in shown.replace("\n", " ")
    assert capsys.readouterr().out == "", "no plain lines beside it"


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(monitoring.dist, "is_initialized", lambda: False)
    return clock


def test_speed_is_of_training_alone(clock):
    meter = SpeedMeter(torch.device("cpu"))
    clock.now += 50  # loading
    meter.on_evaluate(None, None, None)  # before the first step
    for logged in range(2):
        for _ in range(4):
            meter.on_step_begin(None, None, None)
            meter.count({"input_ids": torch.ones(2, 8), "attention_mask": torch.tensor([[1] * 8, [1] * 2 + [0] * 6])})
            meter.count({"input_ids": torch.ones(1, 6)})
            clock.now += 2
            meter.on_step_end(None, None, None)
        metrics, batch = meter.metrics()
        # 16 tokens in 2 s; the second time a wait of 1 s for data, which is training, follows the save.
        assert metrics["tokens_per_second"] == pytest.approx(64 / 8 if logged == 0 else 64 / 9)
        assert metrics["memory_bytes"] > 2**27, "this process has more"
        assert batch == (None if logged else (pytest.approx(16 / 3), pytest.approx(6 / 22))), "of the first log"
        clock.now += 30
        meter.on_evaluate(None, None, None)
        clock.now += 7
        meter.on_save(None, None, None)
        clock.now += 1


def test_batches_of_padding_are_told_of():
    assert describe_batch(250.4, 0.2, True) == "batches: 250 tokens a row, 20% of a batch is padding"
    assert "62% of a batch is padding: --packing true" in describe_batch(250.4, 0.62, True)
    assert describe_batch(250.4, 0.62, False).endswith("padding"), "packed already, or a task that has no packing"


def test_batches_without_tokens_have_no_speed(clock):
    meter = SpeedMeter(torch.device("cpu"))
    meter.on_step_begin(None, None, None)
    meter.count([{"prompt": "a row that the trainer makes a batch of itself"}])
    clock.now += 2
    metrics, batch = meter.metrics()
    assert (metrics.keys(), batch) == ({"memory_bytes"}, None)


SECRET = "the secret"


def test_arguments_are_written_without_secrets(tmp_path):
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, hub_token=SECRET, lr_scheduler_kwargs={"token": SECRET, "power": 2}
    )
    ds_config = SimpleNamespace(config={"comet": {"api_key": SECRET}})
    args.deepspeed_plugin = SimpleNamespace(hf_ds_config=ds_config, deepspeed_config=ds_config.config)
    args.hf_deepspeed_config = ds_config
    for _ in range(2):  # a second trainer may have the same arguments
        hide_secrets_of(args)
        torch.save(args, tmp_path / "training_args.bin")
        assert SECRET.encode() not in (tmp_path / "training_args.bin").read_bytes()
        loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
        assert type(loaded) is TrainingArguments
        assert loaded.lr_scheduler_kwargs == {"token": "***", "power": 2}
        assert loaded.learning_rate == args.learning_rate
        for text in (args.to_json_string(), str(args.to_sanitized_dict())):
            assert SECRET not in text
    for used in (args, copy.copy(args), copy.deepcopy(args)):
        assert isinstance(used, TrainingArguments)
        assert used.hub_token == SECRET
        assert used.lr_scheduler_kwargs["token"] == SECRET
        assert used.deepspeed_plugin.hf_ds_config.config == {"comet": {"api_key": SECRET}}
