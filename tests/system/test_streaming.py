"""Runs over a stream on two ranks: they learn, and one that is resumed has the bits of one that was not."""

import json

import pytest
import torch
from cases import full
from runs import flags_for, on_two_ranks, refused, run_alone
from safetensors.torch import load_file

from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.check_run import check_config

STREAM = {"streaming": True, "eval_rows": 5, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
BY_FORK = {"dataloader_multiprocessing_context": "fork"}  # the process of a test has another default


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"packing": True, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2}, id="packed"),
        full({"deepspeed": "zero3", "dataloader_num_workers": 1}, id="zero3"),
        full({"sequence_parallel": 2, "dataloader_num_workers": 1}, id="shared rows"),
        full({"method": "full", "packing": True, "dataloader_num_workers": 1}, id="full"),
    ],
)
def test_a_resumed_stream_has_the_bits_of_one_that_was_not_stopped(folder, tmp_path, changes):
    whole, resumed, changes = tmp_path / "whole", tmp_path / "resumed", STREAM | BY_FORK | changes
    said = on_two_ranks(flags_for(folder, whole, **changes), tmp_path)
    assert "question_answer (question, answer), streamed, 10000 rows shuffled at a time" in said
    assert "held out: 5 examples of the first 10000 rows, sampled by --seed 42" in said
    changes |= {"resume_from_checkpoint": whole / "checkpoint-2"}
    said = on_two_ranks(flags_for(folder, resumed, **changes), tmp_path)
    assert "not bit for bit" not in said
    weights = [load_file(at / "model.safetensors") for at in (whole, resumed)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    losses = [json.loads((at / "trainer_state.json").read_text())["log_history"] for at in (whole, resumed)]
    assert losses[0][-2]["eval_loss"] < next(one for one in losses[0] if "eval_loss" in one)["eval_loss"]


def test_a_stream_is_refused_where_it_cannot_go_on(folder, tmp_path):
    """On other ranks, unless the data begin anew. It is refused before the model is loaded."""
    flags = flags_for(folder, tmp_path / "out", **STREAM, dataset_weights=1)
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 0, said
    assert "the stream has ended, and begins again: pass 2" not in said
    changes = {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-2", "per_device_train_batch_size": 1}
    changes |= {"global_batch_size": 2, "max_steps": 40, "dataset_weights": 1}
    flags = flags_for(folder, tmp_path / "other", **STREAM | changes)
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 2
    assert "its run streamed by other rows a batch; give what it had, or --ignore_data_skip true" in said
    assert "first example" not in said, "the header, which comes once the model is loaded"
    more_ranks = changes | {"per_device_train_batch_size": 2, "global_batch_size": 4}
    said = on_two_ranks(flags_for(folder, tmp_path / "other", **STREAM | more_ranks), tmp_path, status=2)
    assert "its run streamed by other ranks; give what it had" in said
    assert "first example" not in said
    assert (tmp_path / "1.txt").read_text() == "", "rank 0 says it for all"
    status, said = run_alone([*flags, "--ignore_data_skip", "true"], tmp_path / "said.txt")
    assert status == 0, said
    assert "the stream has ended, and begins again: pass 2" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_steps": -1}, "--streaming: a stream has no length; give the number of steps, --max_steps."),
        ({"task": "dpo"}, "--streaming True with --task dpo"),
    ],
)
def test_what_a_stream_is_not_for(folder, tmp_path, changes, says):
    def check() -> None:
        check_config(parse_arguments(flags_for(folder, tmp_path, **{"streaming": True, "eval_rows": 5} | changes)))

    assert says in refused(check)
