"""The first look at a run's files: what words of a command line and texts of a recipe give is the same."""

import json

import pytest
from datasets import Dataset, DatasetDict

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


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_tables_of_the_datasets_library_are_for_the_run_to_read(tmp_path, task):
    table = Dataset.from_list(PAIRS)
    table.save_to_disk(tmp_path / "one")
    DatasetDict({"train": table}).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        look_at_data({"dataset_name": str(tmp_path / name), "task": task})


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


KTO = [{"prompt": "q", "completion": "a", "label": True}] * 2


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b"}],
            {},
            r"x\.jsonl: its columns prompt, chosen, rejected are those of no format of --task sft\. Such rows are for "
            "--task dpo or kto or orpo or reward",
        ),
        (PAIRS, {"dataset_columns": ["chosen=better", "rejected=worse"]}, "its columns better, worse .* --task dpo or"),
        (KTO, {}, "its rows have a label that says which completions are wanted: give --task kto, or --dataset_format"),
        (KTO, {"dataset_format": "prompt_completion"}, None),
        ([{"prompt": "q", "completion": "a", "label": "news"}], {}, None),
        ([{"instruction": "q", "output": "a"}], {}, None),
        ([{"prompt": "q"}], {}, None),
        ([{"nothing": "q"}], {}, None),
    ],
)
def test_examples_without_a_task_that_are_those_of_one(tmp_path, rows, given, said):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("x.jsonl", str(tmp_path / "x.jsonl")):
        given = given | {"dataset_name": name}
        if said is None:
            look_at_data(given)
        else:
            with pytest.raises(UserError, match=said):
                look_at_data(given)
