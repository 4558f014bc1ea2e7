"""Weights that the ranks of a host share (zero_hpz_partition_size): the same run, with less between the hosts."""

import json
import os
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import deepspeed
import pytest
import torch
from datasets import Dataset
from engines import full_weights, train_step
from models import save_tiny_llama, tiny_llama, tiny_tokenizer, token_batches
from ranks import run_ranks
from torch import distributed as dist
from trainers import cpu_arguments, lisa_trainer, rows_of
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOConfig, DPOTrainer

import lisa_dist
from lisa_dist import LisaMixin
from lisa_dist.checkpoint.resume import load_checkpoint
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.ds_config import fill_secondary_partitions, read_ds_config
from lisa_dist.zero.parameters import parameter_numel
from lisa_dist.zero.stage3 import drop_prefetched


class Preferences(LisaMixin, DPOTrainer):
    """LISA in TRL's trainer, which loads a second model to compare with."""


STEPS, INTERVAL, SAVED = 12, 3, 7  # three switches, and a checkpoint in the middle of a period


def config_of(size: int | str | None, **zero) -> dict:
    """Of ZeRO-3, by which every matrix is gathered for itself, and released after its module's pass."""
    config = read_ds_config("zero3")
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0} | zero
    config["zero_optimization"] |= {} if size is None else {"zero_hpz_partition_size": size}
    return config


def count_gathers(counts: Counter) -> None:
    """From now on, elements of what is gathered by so many ranks."""
    backend = deepspeed.comm.comm.cdb
    original = backend.all_gather_into_tensor

    def counting(*, output_tensor, input_tensor, **options):
        if output_tensor.is_floating_point():
            counts[output_tensor.numel() // input_tensor.numel()] += output_tensor.numel()
        return original(output_tensor=output_tensor, input_tensor=input_tensor, **options)

    backend.all_gather_into_tensor = counting


def run(folder: str, size: int | str | None, resumes: bool = False) -> dict:
    """Four ranks on two hosts; `resumes` from the checkpoint after one step of its own, whose weights go."""
    config = lisa_dist.LisaConfig(lisa_activated_layers=2, lisa_interval_steps=INTERVAL, lisa_debug=True)
    with patch.dict(os.environ, {"SLURMD_NODENAME": f"host{dist.get_rank() // 2}"}):
        engine, lisa = lisa_dist.initialize(tiny_llama(seed=99 * resumes), config_of(size), config, lr=1e-2)
    batches, losses, counts, of_steps = token_batches(STEPS, rows=4), [], Counter(), []
    checkpoint = Path(folder) / f"checkpoint-{size}"
    if resumes:
        with torch.no_grad():  # after which each host has the weights of another model
            engine(input_ids=batches[0, 0], labels=batches[0, 0])
        load_checkpoint(lisa, checkpoint)
    count_gathers(counts)
    for micro_batches in batches[engine.global_steps :]:
        counts.clear()
        losses.append(train_step(engine, lisa, micro_batches))
        of_steps.append(dict(counts))
        if engine.global_steps == SAVED and not resumes:
            save_checkpoint(lisa, checkpoint)
    active = sum(parameter_numel(parameter) for group in lisa.param_groups() for parameter in group["params"])
    found = {"losses": losses, "weights": full_weights(engine), "gathered": of_steps, "active": active}
    engine.destroy()
    return found


@pytest.mark.usefixtures("cpu_ops")
def test_a_run_is_the_same_and_gathers_frozen_layers_from_its_host(tmp_path):
    shared, plain = (run_ranks(run, 4, str(tmp_path), size)[0] for size in ("auto", None))
    assert plain["losses"] == shared["losses"]
    assert all(torch.equal(plain["weights"][name], value) for name, value in shared["weights"].items())
    total = sum(value.numel() for value in tiny_llama().parameters())
    for step in (1, 2, 4, 5):  # without a switch
        assert set(plain["gathered"][step]) == {4}
        assert shared["gathered"][step][4] == shared["active"], "once, in the forward pass"
        assert shared["gathered"][step][2] >= total - shared["active"]
    resumed = run_ranks(run, 4, str(tmp_path), "auto", True)[0]
    assert resumed["losses"] == shared["losses"][SAVED:]
    assert all(torch.equal(resumed["weights"][name], value) for name, value in shared["weights"].items())


def run_otherwise(size: int | str | None) -> dict:
    """Small weights stay whole, a step has two micro-batches, and steps are followed by evaluations."""
    settings = {"lisa_state": "keep", "lisa_master": "bf16_sr", "lisa_always_on": "rest"}
    config = lisa_dist.LisaConfig(lisa_interval_steps=2, lisa_debug=True, **settings)
    model, options = tiny_llama().to(torch.bfloat16), {"optim": "lisa_adamw", "gradient_accumulation_steps": 2}
    ds_config = config_of(size, stage3_param_persistence_threshold=640)
    with patch.dict(os.environ, {"SLURMD_NODENAME": f"host{dist.get_rank() // 2}"}):
        engine, lisa = lisa_dist.initialize(model, ds_config, config, lr=1e-2, **options)
    losses = []
    for micro_batches in token_batches(STEPS, rows=4, micro_batches=2):
        losses.append(train_step(engine, lisa, micro_batches))
        with torch.no_grad():
            losses.append(engine(input_ids=micro_batches[0], labels=micro_batches[0]).loss.item())
    drop_prefetched(engine)  # of a backward pass that never came
    found = {"losses": losses, "weights": full_weights(engine)}
    engine.destroy()
    return found


@pytest.mark.usefixtures("cpu_ops")
def test_small_weights_micro_batches_and_evaluations_are_the_same_too():
    shared, plain = (run_ranks(run_otherwise, 4, size)[0] for size in ("auto", None))
    assert plain["losses"] == shared["losses"]
    assert all(torch.equal(plain["weights"][name], value) for name, value in shared["weights"].items())


@pytest.mark.parametrize(
    ("size", "hosts", "filled"),
    [
        ("auto", [2, 2], 2),
        ("auto", [8], 1),
        ("auto", [4, 2], 1),
        ("auto", [1, 1, 1, 1], 1),
        (8, [8, 8], 8),
        (1, [3], 1),
    ],
)
def test_a_host_s_ranks_are_filled_in(size, hosts, filled):
    fill_secondary_partitions(config := config_of(size), hosts)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == filled


def test_no_second_model_is_cut_for_a_host():
    """DeepSpeed makes the groups of ranks once, as a model is cut, and a reference model is cut too."""
    fill_secondary_partitions(config := config_of("auto"), [2, 2], has_reference=True)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 1
    with pytest.raises(ValueError, match="zero_hpz_partition_size = 2: not with a reference model; make it 1"):
        fill_secondary_partitions(config_of(2), [2, 2], has_reference=True)


@pytest.mark.parametrize(
    ("size", "hosts"), [(3, [4, 4]), (4, [8, 8]), (16, [8, 8]), (4, [4, 2]), (2, [1, 1]), (8, [8]), ("8", [8, 8])]
)
def test_other_numbers_than_a_host_s_ranks_are_refused(size, hosts):
    listed = ", ".join(map(str, hosts))
    with pytest.raises(
        ValueError, match=rf"zero_hpz_partition_size = {json.dumps(size)}: .* have {listed} ranks; make it"
    ):
        fill_secondary_partitions(config_of(size), hosts)


def train_on_preferences(folder: str) -> float:
    unset_hf_deepspeed_config()
    rows = Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e f"}] * 8)
    with patch.dict(os.environ, {"SLURMD_NODENAME": f"host{dist.get_rank() // 2}"}):
        args = cpu_arguments(folder, DPOConfig, max_steps=2, per_device_train_batch_size=1, bf16=False)
        trainer = Preferences(
            model=f"{folder}/model",
            args=args,
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
            lisa_config=lisa_dist.LisaConfig(lisa_interval_steps=1),
            deepspeed="zero3_hpz",
        )
        trainer.train()
    assert trainer.ref_model is not None
    return trainer.state.log_history[0]["loss"]


def test_a_trainer_with_a_reference_model_does_not_share_weights(tmp_path):
    """DeepSpeed makes the groups of ranks once, and fails for the second model."""
    save_tiny_llama(tmp_path / "model")
    assert len(set(run_ranks(train_on_preferences, 4, str(tmp_path)))) == 1


def evaluate_first(folder: str) -> str:
    rows = rows_of(token_batches(2, rows=4))
    with patch.dict(os.environ, {"SLURMD_NODENAME": f"host{dist.get_rank() // 2}"}):
        trainer = lisa_trainer(folder, rows, {"deepspeed": read_ds_config("zero3_hpz")}, eval_dataset=rows)
        with pytest.raises(ValueError, match="this one was loaded before the training arguments") as refused:
            trainer.evaluate()
    return str(refused.value)


def test_an_evaluation_before_training_is_refused(tmp_path):
    assert all(run_ranks(evaluate_first, 4, str(tmp_path)))
