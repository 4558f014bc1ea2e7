"""The first look at a run's files: what words of a command line and texts of a recipe give is the same."""

import json

import pytest

from lisa_dist.config import UserError
from lisa_dist.data.first_look import look_at_data

PAIRS = [{"better": "a", "worse": "b"}] * 3


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two words.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    (tmp_path / "my rewards.py").write_text("def reward(completions, **columns):\n    return []\n")


@pytest.mark.parametrize(
    "name", ["two words.jsonl", "two words.jsonl#2", ["two words.jsonl"], "org/dataset", "x" * 300]
)
def test_a_name_may_have_blanks_or_be_none_of_a_file(name):
    look_at_data({"dataset_name": name})


@pytest.mark.parametrize("columns", ["chosen=better rejected=worse", ["chosen=better", "rejected=worse"]])
def test_columns_are_one_text_or_several_words(columns):
    look_at_data({"task": "dpo", "dataset_name": ["two words.jsonl"], "dataset_columns": columns})


def test_what_is_no_pair_of_names_is_for_the_run_to_refuse():
    look_at_data(
        {"task": "dpo", "dataset_name": "two words.jsonl", "dataset_columns": "chosen=better rejected=worse x="}
    )


def test_a_reward_file_may_have_blanks():
    given = {"task": "grpo", "dataset_name": "two words.jsonl", "dataset_columns": "prompt=better"}
    look_at_data(given | {"reward_funcs": "my rewards.py"})


def test_a_missing_file_and_a_row_that_cannot_serve():
    with pytest.raises(UserError, match=r"--dataset_name three words\.jsonl: no such file"):
        look_at_data({"dataset_name": "three words.jsonl"})
    with pytest.raises(UserError, match="its columns better, worse are none of --task dpo"):
        look_at_data({"task": "dpo", "dataset_name": "two words.jsonl"})
