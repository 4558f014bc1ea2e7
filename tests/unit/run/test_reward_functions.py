"""Reward functions of files and of TRL, and the outcome of a run with rewards; runs are in system/test_tasks.py."""

import asyncio
import json

import pytest

from lisa_dist.config import UserError
from lisa_dist.run.header import describe_outcome
from lisa_dist.run.reward_functions import load_rewards

FILE = """
import numpy
import torch

def reward(completions, **columns):
    return columns["found"]

def tensor(completions, **columns):
    return torch.tensor([1.0, 2.0])

def array(completions, **columns):
    return numpy.float32([1, 2])

def scalar(completions, **columns):
    return torch.tensor(1.0)

def rows(completions, **columns):
    return torch.ones(2, 2)

def ends(completions, **columns):
    raise SystemExit(0)

async def late(completions, **columns):
    return columns["found"]

number = 3
"""


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "rewards.py").write_text(FILE)
    return str(tmp_path / "rewards.py")


@pytest.mark.parametrize("name", ["tensor", "array", "reward"])
def test_a_list_an_array_and_a_tensor_are_numbers(file, name):
    (function,) = load_rewards([f"{file}:{name}"])
    assert function.__name__ == name, "which TRL logs"
    assert function(completions=["a", "b"], found=(1.0, 2)) == pytest.approx([1.0, 2.0])


def test_none_is_no_reward_and_an_awaited_function_stays_one(file):
    (function,) = load_rewards([f"{file}:late"])
    assert asyncio.run(function(completions=["a", "b"], found=[None, 1])) == [None, 1]
    with pytest.raises(UserError, match="returned inf for completion 2"):
        asyncio.run(function(completions=["a", "b"], found=[None, float("inf")]))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("scalar", "returned a Tensor for 2 completions."),
        ("rows", "for completion 1; a reward is a finite number, or None where there is none."),
        ("ends", "raised SystemExit: 0 ("),
        ("number", "has no function number."),
    ],
)
def test_what_is_no_reward(file, name, problem):
    with pytest.raises(UserError) as refused:
        load_rewards([f"{file}:{name}"])[0](completions=["a", "b"])
    assert f"{file}:{name}: " in str(refused.value)
    assert problem in str(refused.value)


def test_names_of_trl_and_folders_of_reward_models(tmp_path):
    (function,) = load_rewards(["think_format_reward"])
    assert callable(function)
    for name in ("get_soft_overlong_punishment", "other_rewards", "nothing"):
        with pytest.raises(UserError, match=rf"{name}: is no \.py file, no folder, and no function of trl\.rewards"):
            load_rewards([name])
    for architecture, is_one in (("LlamaForSequenceClassification", True), ("LlamaForCausalLM", False)):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        if is_one:
            assert load_rewards([str(tmp_path)]) == [str(tmp_path)]
            continue
        with pytest.raises(UserError, match="is no reward model, as --task reward makes one"):
            load_rewards([str(tmp_path)])


def test_the_outcome_of_a_run_has_its_rewards_where_there_are_any():
    history = [{"step": step, "reward": reward} for step, reward in ((1, None), (2, 0.25), (3, 0.5), (4, None))]
    said = describe_outcome([*history, {"step": 4, "train_runtime": 3.0}])
    assert said == "trained in 3 s; reward 0.2500 at step 2, 0.5000 at step 3"
