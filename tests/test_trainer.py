"""LISA in the Hugging Face Trainer: the same losses as the reference, under its schedule and accumulation."""

import json
import math
import os

import deepspeed
import pytest
import torch
from models import tiny_gpt2, tiny_llama, token_batches
from ranks import run_ranks
from reference import train_reference
from torch import distributed as dist
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lisa_dist import LisaConfig, LisaMixin
from lisa_dist.ds_config import find_ds_config

STEPS, ACCUMULATION, INTERVAL, LR, DECAY, ROWS = 8, 2, 3, 1e-3, 0.1, 2

pytestmark = pytest.mark.usefixtures("cpu_ops")


class InOrder(LisaMixin, Trainer):
    """Any Trainer subclass will do; this one takes the rows in order, for the reference to take them so too."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def rows_for(world_size: int) -> list[dict]:
    tokens = token_batches(STEPS * ACCUMULATION * world_size, rows=ROWS).flatten(0, 2)
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(output_dir: str, ds_config: str, **changes) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": output_dir,
            "deepspeed": find_ds_config(ds_config),
            "use_cpu": True,
            "max_steps": STEPS,
            "gradient_accumulation_steps": ACCUMULATION,
            "per_device_train_batch_size": ROWS,
            "learning_rate": LR,
            "lr_scheduler_type": "cosine",
            "weight_decay": DECAY,
            "adam_beta2": 0.95,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        | changes
    )


def train(output_dir: str, ds_config: str, changes: dict) -> dict:
    trainer = InOrder(
        model=tiny_llama(),
        args=arguments(output_dir, ds_config, **changes),
        train_dataset=rows_for(dist.get_world_size()),
        lisa_config=LisaConfig(lisa_interval_steps=INTERVAL, lisa_debug=True),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    parameters = list(trainer.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled="zero3" in ds_config):
        total = float(sum(parameter.detach().double().sum() for parameter in parameters))
    return {
        "losses": [entry["loss"] for entry in logs],
        "learning_rates": [entry["learning_rate"] for entry in logs],
        "metrics": [{name: value for name, value in entry.items() if name.startswith("lisa/")} for entry in logs],
        "layers": [record.layers for record in trainer.lisa.records],
        "header": trainer.describe(),
        "sum_of_weights": total,
    }


def cosine(step: int) -> float:
    return LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))


@pytest.mark.parametrize("ds_config", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_losses_equal_the_reference(tmp_path, ds_config):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    outcome = run_ranks(train, 2, str(tmp_path), ds_config, checkpointing)[0]

    # A micro-batch of the global batch is one batch of rank 0 and the next one, of rank 1.
    batches = token_batches(STEPS * ACCUMULATION * 2, rows=ROWS).view(STEPS, ACCUMULATION, 2 * ROWS, -1)
    model = tiny_llama()
    layers = list(model.model.layers)
    losses = train_reference(
        model, layers, outcome["layers"], INTERVAL, batches, lr=cosine, weight_decay=DECAY, betas=(0.9, 0.95)
    )
    assert outcome["losses"] == pytest.approx(losses, abs=1e-5)
    assert outcome["learning_rates"] == pytest.approx([cosine(step) for step in range(STEPS)])
    total = float(sum(parameter.detach().double().sum() for parameter in model.parameters()))
    assert outcome["sum_of_weights"] == pytest.approx(total, abs=1e-2), "the last step counts too"
    assert len(set(map(tuple, outcome["layers"]))) > 1
    assert (tmp_path / "lisa_log.jsonl").read_text().count("\n") == math.ceil(STEPS / INTERVAL)


def test_metrics_and_header(tmp_path):
    outcome = run_ranks(train, 2, str(tmp_path), "zero2", {})[0]
    metrics = outcome["metrics"][-1]
    assert metrics["lisa/period"] == 2  # step 6 began it, and the log of step 7 comes after its first step
    assert metrics["lisa/switch_seconds"] > 0
    assert metrics["lisa/state_bytes_per_rank"] > 0
    assert metrics["lisa/live_bytes"] > metrics["lisa/state_bytes_per_rank"]
    visits = [metrics[f"lisa/visits/layer_{layer:02d}"] for layer in range(6)]
    assert sum(visits) == 2 * math.ceil(STEPS / INTERVAL)
    for word in ("decoder layers", "6 of", "model.layers", "always on", "embed 8192", "stage 2 on 2 rank(s)"):
        assert word in outcome["header"]


def refused(output_dir: str, what: str) -> str:
    changes, extra = {}, {}
    if what == "no deepspeed":
        changes = {"deepspeed": None}
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # an earlier trainer in this process has set it
    elif what == "reentrant":
        changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    elif what == "optim":
        changes = {"optim": "adafactor"}
    elif what == "optim with offload":
        changes = {"optim": "adamw_8bit", "deepspeed": find_ds_config("zero2_offload")}
    elif what == "stage 0":
        changes = {"deepspeed": {"zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": "auto"}}
    elif what == "contradiction":
        changes = {"deepspeed": {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 7}}
    elif what == "load_best_model_at_end":
        saving = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
        changes = {what: True} | saving
        extra = {"eval_dataset": rows_for(2)}
    elif what == "auto_find_batch_size":
        changes = {what: True}
    elif what == "optim_args":
        changes = {"optim_args": "amsgrad=True"}
    elif what == "optimizer":
        extra = {"optimizers": (torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), None)}
    resume = "checkpoint-3" if what == "resume" else None
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked by the caller
        InOrder(
            model=tiny_llama(),
            args=arguments(output_dir, "zero2", **changes),
            train_dataset=rows_for(2),
            lisa_config=LisaConfig(),
            **extra,
        ).train(resume_from_checkpoint=resume)
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no deepspeed", "--deepspeed zero2"),
        ("reentrant", "use_reentrant=True: reentrant checkpointing"),
        ("optim", "--optim adafactor"),
        ("optim with offload", "--optim adamw_8bit with offload_optimizer"),
        ("stage 0", "use stage 1"),
        ("contradiction", "gradient_accumulation_steps=7 vs hf gradient_accumulation_steps=2"),
        ("optimizer", "pass no optimizers"),
        ("load_best_model_at_end", "--load_best_model_at_end True"),
        ("auto_find_batch_size", "--auto_find_batch_size True"),
        ("optim_args", "--optim_args amsgrad=True"),
        ("resume", "--resume_from_checkpoint checkpoint-3"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, what, said):
    assert said in run_ranks(refused, 2, str(tmp_path), what)[0]
    assert not (tmp_path / "lisa_log.jsonl").exists(), "nothing half-written"


class Shuffled(LisaMixin, Trainer):
    """The Trainer's own shuffling."""


def train_shuffled(output_dir: str, ds_config: str, changes: dict, resume_from, seed: int = 0) -> dict:
    """Train with dropout and shuffling; what came of it."""
    unset_hf_deepspeed_config()  # of an earlier trainer in this process: the model would be built under its zero.Init
    rows = rows_for(2) * 2
    world_size = dist.get_world_size()
    trainer = Shuffled(
        model=tiny_gpt2(seed=seed, dropout=0.1).to(torch.bfloat16 if changes.get("bf16") else torch.float32),
        args=arguments(
            output_dir,
            ds_config,
            **{
                "save_strategy": "steps",
                "save_steps": 2,
                "per_device_train_batch_size": 2 * ROWS // world_size,
                "save_total_limit": 3,
            }
            | changes,
        ),
        train_dataset=rows,
        lisa_config=LisaConfig(lisa_interval_steps=INTERVAL, lisa_debug=True),
    )
    trainer.train(resume_from_checkpoint=resume_from)
    parameters = dict(trainer.model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        weights = {name: value.detach().clone() for name, value in parameters.items()}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "weights": weights,
        "losses": [entry["loss"] for entry in logs],
        "learning_rates": [entry["learning_rate"] for entry in logs],
        "stopped_by": trainer.stopped_by,
    }


@pytest.mark.parametrize(
    ("ds_config", "changes"),
    [
        ("zero1", {}),
        ("zero2", {"bf16": True}),
        ("zero3", {}),
        ("zero3", {"bf16": True, "gradient_accumulation_steps": 1, "save_steps": 3}),
        ("zero2_offload", {}),
    ],
)
def test_a_resumed_run_is_the_run(tmp_path, ds_config, changes):
    """Data order, dropout, schedule and accumulation included, from other initial weights."""
    whole = run_ranks(train_shuffled, 2, str(tmp_path), ds_config, changes, None)[0]
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == (["checkpoint-3", "checkpoint-6", "checkpoint-8"] if "save_steps" in changes
                     else ["checkpoint-4", "checkpoint-6", "checkpoint-8"])  # fmt: skip
    log = (tmp_path / "lisa_log.jsonl").read_text()
    for folder in saved[:2]:
        resumed = run_ranks(train_shuffled, 2, str(tmp_path), ds_config, changes, str(tmp_path / folder), 99)[0]
        for name, value in whole["weights"].items():
            assert torch.equal(value, resumed["weights"][name]), f"{name} from {folder}"
        assert resumed["losses"] == whole["losses"]
        assert resumed["learning_rates"] == whole["learning_rates"]
    periods = [json.loads(line) for line in (tmp_path / "lisa_log.jsonl").read_text().splitlines()]
    assert [(one["period"], one["layers"]) for one in periods] == [
        (one["period"], one["layers"]) for one in map(json.loads, log.splitlines())
    ]


def resume_finished_and_changed(output_dir: str) -> None:
    """A finished run takes no step more; other settings at the end of a period keep the schedule."""

    def trainer(gamma: int) -> Shuffled:
        unset_hf_deepspeed_config()
        changes = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 1}
        return Shuffled(
            model=tiny_llama(),
            args=arguments(output_dir, "zero2", **changes),
            train_dataset=rows_for(2),
            lisa_config=LisaConfig(lisa_interval_steps=INTERVAL, lisa_activated_layers=gamma),
        )

    trainer(2).train()
    again = trainer(2)
    again.train("auto")
    assert again.state.global_step == STEPS
    for gamma in (3, 1):
        changed = trainer(gamma)
        changed.train(f"{output_dir}/checkpoint-3")
        rates = [entry["learning_rate"] for entry in changed.state.log_history if "loss" in entry]
        assert rates == pytest.approx([cosine(step) for step in range(STEPS)])
        assert {group["lr"] for group in changed.lisa.engine.optimizer.param_groups} == {cosine(STEPS)}
        assert len(changed.lisa.active_layers) == gamma


def test_a_finished_run_and_other_settings(tmp_path):
    run_ranks(resume_finished_and_changed, 2, str(tmp_path))
