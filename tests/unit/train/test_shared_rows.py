"""--sequence_parallel in trainers: the run of whole rows, on every stage, with prompts, packing and accumulation."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import ParallelismConfig
from cases import full
from datasets import Dataset, IterableDataset
from engines import full_weights
from models import VOCABULARY, tiny_llama, tiny_tokenizer
from ranks import run_ranks
from trainers import InOrder, cpu_arguments
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig

from lisa_dist import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.run.task_configs import LisaSFTConfig
from lisa_dist.run.trainer import TRAINERS
from lisa_dist.run_folder import MEMORY_NAME
from lisa_dist.train.sequence_parallel import check_can_share, take_sequence_parallel
from lisa_dist.train.sft_trainer import BaselineTrainer, LisaTrainer

STEPS, INTERVAL, SAVED, TOKENS = 6, 2, 3, 40  # three periods, and a checkpoint in the middle of the second

pytestmark = pytest.mark.usefixtures("cpu_ops")


def rows_of(kind: str) -> Dataset:
    """masked: rows with prompts of several lengths; packed: documents, to be packed; padded: prompts and answers."""
    generator, rows = torch.Generator().manual_seed(1), []
    for number in range(27):  # an odd number, which a run goes through more than once
        length = TOKENS if kind == "masked" else 7 + 5 * (number % 5)
        ids = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
        prompt = 0 if kind == "packed" else 5 + 3 * (number % 3)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def train(
    folder: str, stage: str, kind: str, size: int, accumulation: int, resumes: bool = False, trainer_class=LisaTrainer
) -> dict:
    """A run; `size` by the flag, or with padded rows by Accelerate's object."""
    unset_hf_deepspeed_config()
    config_class, given = LisaSFTConfig, {"sequence_parallel": size}
    if kind == "padded" and size > 1:
        config_class, given = SFTConfig, {"parallelism_config": ParallelismConfig(sp_size=size)}
    args = config_class(
        output_dir=folder,
        deepspeed=str(Path(__file__).parents[3] / "ds_configs" / f"{stage}.json"),
        use_cpu=True,
        bf16=False,
        max_steps=STEPS,
        max_length=TOKENS,
        packing=kind == "packed",
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2 if kind == "padded" else 1,
        learning_rate=2e-3,
        adam_epsilon=1e-5,  # or elements whose gradient is rounding alone would move by the whole rate
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVED,
        eval_strategy="steps",
        eval_steps=SAVED,
        report_to="none",
        disable_tqdm=True,
        **given,
    )
    own = {"lisa_config": LisaConfig(lisa_activated_layers=2, lisa_interval_steps=INTERVAL), "optim": "lisa_adamw"}
    trainer = trainer_class(
        model=tiny_llama(tied=stage == "zero1"),
        args=args,
        train_dataset=rows_of(kind),
        eval_dataset=rows_of(kind).select(range(4)),
        processing_class=tiny_tokenizer(),
        loss="logits" if kind == "masked" else "chunked",
        **(own if trainer_class is LisaTrainer else {}),
    )
    trainer.train(resume_from_checkpoint=resumes or None)
    engine = trainer.model_wrapped
    found = {
        "logs": [one for one in trainer.state.log_history if "loss" in one],
        "evaluated": [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one],
        "weights": full_weights(engine),
    }
    engine.destroy()
    return found


def differences(one: dict, two: dict) -> tuple[float, float, float]:
    """Of losses, of norms in parts, of weights."""
    losses, norms = ([[log[name] for log in run["logs"]] for run in (one, two)] for name in ("loss", "grad_norm"))
    weights = max((one["weights"][name] - value).abs().max().item() for name, value in two["weights"].items())
    off = max(abs(ours / theirs - 1) for ours, theirs in zip(*norms, strict=True))
    return max(abs(ours - theirs) for ours, theirs in zip(*losses, strict=True)), off, weights


def tokens_of(run: dict) -> list[float]:
    return [log["num_tokens"] for log in run["logs"]]


def places_of(run: dict) -> list[float]:
    """In the data, and the losses of evaluations."""
    return [log["epoch"] for log in run["logs"]] + run["evaluated"]


@pytest.mark.parametrize(
    ("stage", "kind", "ranks", "size"),
    [
        ("zero1", "padded", 4, 2),
        ("zero2", "masked", 2, 2),
        ("zero3", "packed", 4, 4),
        *(full(stage, kind, 4, 4) for stage in ("zero1", "zero2") for kind in ("masked", "packed")),
        *(full("zero3", kind, ranks, 2) for kind in ("masked", "padded") for ranks in (2, 4)),
    ],
)
def test_a_run_is_that_of_whole_rows(tmp_path, stage, kind, ranks, size):
    groups = ranks // size
    whole = run_ranks(train, groups, str(tmp_path / "whole"), stage, kind, 1, 2)[0]
    shared = run_ranks(train, ranks, str(tmp_path / "shared"), stage, kind, size, 2)[0]
    losses, norms, weights = differences(whole, shared)
    assert losses < 1e-5
    assert norms < 1e-3
    assert weights < 1e-4
    padding = 0.03 if kind == "packed" else 0.0  # to a multiple of the ranks, which TRL counts in packed rows
    assert tokens_of(shared) == pytest.approx(tokens_of(whole), rel=padding)
    assert places_of(shared) == pytest.approx(places_of(whole), abs=1e-5)
    if kind != "packed":  # whose mask SDPA keeps on a CPU, which no plan counts
        memory = json.loads((tmp_path / "shared" / MEMORY_NAME).read_text())
        assert memory["measured"]["activations"] == pytest.approx(memory["planned"]["activations"], rel=0.03)
    again = run_ranks(train, ranks, str(tmp_path / "shared"), stage, kind, size, 2, True)[0]
    assert [log["loss"] for log in again["logs"]][-(STEPS - SAVED) :] == [log["loss"] for log in shared["logs"]][SAVED:]
    assert all(torch.equal(again["weights"][name], one) for name, one in shared["weights"].items())


def test_full_training_shares_rows_too(tmp_path):
    whole = run_ranks(train, 1, str(tmp_path / "whole"), "zero2", "masked", 1, 1, False, BaselineTrainer)[0]
    shared = run_ranks(train, 2, str(tmp_path / "shared"), "zero2", "masked", 2, 1, False, BaselineTrainer)[0]
    losses, norms, weights = differences(whole, shared)
    assert losses < 1e-5
    assert norms < 1e-3
    assert weights < 1e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1: it is for whole rows"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha 5.0: it is for whole rows"),
        ({"average_tokens_across_devices": False}, "--average_tokens_across_devices False: it is for whole rows"),
        ({"train_sampling_strategy": "group_by_length"}, "--train_sampling_strategy group_by_length: it is for whole"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "ranks of a group would take other rows"),
        ({"accelerator_config": {"dispatch_batches": True}}, "rank 0 would give each rank rows of its own"),
        ({"trainer": "dpo"}, "DPOTrainer makes its batches of whole rows"),
        ({"trainer": "grpo"}, "GRPOTrainer makes its batches of whole rows"),
        ({"trainer": "kto"}, "KTOTrainer makes its batches of whole rows"),
        ({"trainer": "reward"}, "RewardTrainer makes its batches of whole rows"),
    ],
)
def test_what_has_a_loss_of_whole_rows_is_refused(tmp_path, changes, said):
    trainer_class = TRAINERS[changes.pop("trainer", "sft")][0]
    with pytest.raises(UserError, match=said), patch.object(TrainingArguments, "world_size", 2):
        check_can_share(trainer_class, cpu_arguments(str(tmp_path), **changes), 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sp_size": 2, "tp_size": 2}, "sp_size 2 beside {'tp_size': 2}"),
        ({"sp_size": 2, "sequence_parallel": 4}, "sp_size 2 beside --sequence_parallel 4"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(given, said):
    size = given.pop("sequence_parallel", 1)
    args = SimpleNamespace(sequence_parallel=size, parallelism_config=ParallelismConfig(**given))
    with pytest.raises(UserError, match=re.escape(said)):
        take_sequence_parallel(args)


def test_arguments_serve_a_second_trainer():
    args = SimpleNamespace(parallelism_config=ParallelismConfig(sp_size=2))
    assert [take_sequence_parallel(args), take_sequence_parallel(args)] == [2, 2]


def test_more_ranks_to_a_row_than_there_are_is_refused(tmp_path):
    with pytest.raises(UserError, match="groups of 8 ranks do not make 1"):
        LisaSFTConfig(output_dir=str(tmp_path), sequence_parallel=8, global_batch_size=4)
    with pytest.raises(UserError, match="groups of 8 ranks do not make 2"):
        PlanArguments("llama3.1-8b", gpus=2, sequence_parallel=8)


def refused(folder: str, what: str) -> str:
    unset_hf_deepspeed_config()
    given = {"parallelism_config": ParallelismConfig(sp_size=2), "max_steps": 1}
    own = {"train_dataset": IterableDataset.from_generator(list) if what == "stream" else rows_of("masked")}
    own |= {"compute_loss_func": print} if what == "loss" else {}
    with pytest.raises(UserError) as raised:
        InOrder(tiny_llama(), cpu_arguments(folder, **given), **own)
    return str(raised.value)


@pytest.mark.parametrize(
    ("what", "said"), [("stream", "rank 0 deals out a stream's rows"), ("loss", "it would shift labels again")]
)
def test_streams_and_losses_of_ones_own_are_refused(tmp_path, what, said):
    assert said in run_ranks(refused, 2, str(tmp_path), what)[1]
