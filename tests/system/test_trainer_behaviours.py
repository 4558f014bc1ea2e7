"""LISA with all layers active is the plain Trainer under ZeRO: in every number that is logged, and in the weights."""

import math
import tempfile

import deepspeed
import pytest
import torch
from models import VOCABULARY, tiny_llama
from ranks import run_ranks
from torch import distributed as dist
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lisa_dist import LisaConfig, LisaMixin
from lisa_dist.ds_config import find_ds_config

LAYERS, STEPS = 3, 6
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
BEHAVIOURS: dict[str, dict] = {
    "as it is": {},
    "cosine, with warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "own arguments": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "reduced on a plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATED},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation, an incomplete step": {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1},
    "epochs": {"max_steps": -1, "num_train_epochs": 2},
    "an incomplete batch left out": {"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": True},
    "evaluated by steps": EVALUATED,
    "evaluated by epochs": {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "evaluated at the start": {"eval_on_start": True},
    "stopped early": EVALUATED | {"metric_for_best_model": "loss", "greater_is_better": False},
    "logged by epochs": {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "logged every other step": {"logging_steps": 2, "logging_first_step": True},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "in order": {"train_sampling_strategy": "sequential"},
    "another seed of the data": {"data_seed": 7},
    "clipped": {"max_grad_norm": 0.01},
    "not clipped": {"max_grad_norm": 0.0},
    "weight decay": {"weight_decay": 0.5},
    "betas and epsilon": {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-4},
    "AdamW of torch": {"optim": "adamw_torch"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "tokens counted": {"include_num_input_tokens_seen": "all"},
    "tokens not averaged over ranks": {"average_tokens_across_devices": False},
    "bf16": {"bf16": True},
    "activations checkpointed": {"gradient_checkpointing": True},
}
BEHAVIOURS["stopped early"]["callbacks"] = [EarlyStoppingCallback(1, early_stopping_threshold=9.0)]
# What depends on the number of ranks; on one rank all others take half the time.
ON_TWO_RANKS = ["as it is", "accumulation, an incomplete step", "evaluated by epochs", "grouped by length"]
ON_TWO_RANKS += ["tokens counted", "tokens not averaged over ranks"]
ON_STAGE_3 = ["accumulation", "clipped", "bf16", "activations checkpointed"]
# Of speed and memory, and what a LISA run logs besides.
_NOT_COMPARED = ("runtime", "per_second", "memory", "lisa/", "flos", "preparation")


class LisaOfAll(LisaMixin, Trainer):
    """All layers train in every period."""


def rows() -> list[dict]:
    """Rows of different lengths, some of the tokens without a label; 26, which no batch size here divides."""
    generator = torch.Generator().manual_seed(0)
    lengths = [6 + 3 * (number % 4) for number in range(26)]
    made = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row.clone().index_fill(0, torch.arange(2), -100)} for row in made]


def padded(batch: list[dict]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    found = {
        "input_ids": pad([row["input_ids"] for row in batch], True, 0),
        "labels": pad([row["labels"] for row in batch], True, -100),
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in batch])
    return found | {"attention_mask": (torch.arange(found["labels"].shape[1]) < lengths[:, None]).long()}


def train(kind: type[Trainer], ds_config: str, changes: dict) -> tuple[list[dict], list[torch.Tensor]]:
    """Logs and weights of a run."""
    unset_hf_deepspeed_config()
    changes = dict(changes)
    callbacks = changes.pop("callbacks", None)
    args = {"deepspeed": find_ds_config(ds_config), "use_cpu": True, "max_steps": STEPS, "learning_rate": 1e-3}
    args |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "logging_steps": 1}
    args |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    lisa = {"lisa_config": LisaConfig(lisa_activated_layers=LAYERS, lisa_interval_steps=2)} if kind is LisaOfAll else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=tiny_llama(num_layers=LAYERS).to(torch.bfloat16 if changes.get("bf16") else torch.float32),
            args=TrainingArguments(**args | {"output_dir": folder} | changes),
            train_dataset=rows(),
            eval_dataset=rows()[:7],
            data_collator=padded,
            callbacks=callbacks,
            **lisa,
        )
        trainer.train()
        dist.barrier()
    parameters = list(trainer.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=ds_config == "zero3"):
        weights = [parameter.detach().float().clone() for parameter in parameters]
    logs = [
        {name: value for name, value in entry.items() if not any(part in name for part in _NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]
    return logs, weights


def compare(ds_config: str, names: list[str]) -> dict[str, str]:
    """What differs, by behaviour; "" where nothing does."""
    found = {}
    for name, changes in ((name, BEHAVIOURS[name]) for name in names):
        try:
            found[name] = differs(ds_config, changes)
        except Exception as error:  # noqa: BLE001 - of either trainer; the other behaviours are compared all the same
            found[name] = f"{type(error).__name__}: {error}"
    return found


def differs(ds_config: str, changes: dict) -> str:
    (plain, weights), (ours, our_weights) = (train(kind, ds_config, changes) for kind in (Trainer, LisaOfAll))
    tolerance = 2e-2 if changes.get("bf16") else 1e-5
    if [sorted(one) for one in plain] != [sorted(one) for one in ours]:
        return f"other logs: {plain} and {ours}"
    for one, other in zip(plain, ours, strict=True):
        for name, value in one.items():
            if not math.isclose(value, other[name], rel_tol=tolerance, abs_tol=1e-9):
                return f"{name} at step {one['step']}: {value} and {other[name]}"
    # A step of AdamW is about the rate, whatever the gradient: rounding may turn the sign of the smallest.
    far = max((one - other).abs().max().item() for one, other in zip(weights, our_weights, strict=True))
    return "" if far < (1e-2 if changes.get("bf16") else 1e-4) else f"weights differ by {far}"


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(
    ("ds_config", "world_size", "names"),
    [
        ("zero2", 1, [name for name in BEHAVIOURS if name not in (*ON_TWO_RANKS, *ON_STAGE_3)]),
        ("zero2", 2, ON_TWO_RANKS),
        ("zero3", 2, ["accumulation, an incomplete step", "evaluated by epochs", "tokens counted", *ON_STAGE_3]),
    ],
)
def test_lisa_of_all_layers_is_the_plain_trainer(ds_config, world_size, names):
    """In every way; on stage 3, which takes twice as long, in those that change the engine or sum over ranks."""
    found = run_ranks(compare, world_size, ds_config, names)[0]
    assert len(found) == len(names)
    assert {name: said for name, said in found.items() if said} == {}
