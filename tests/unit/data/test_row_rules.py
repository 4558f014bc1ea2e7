"""What a row of a task must hold: turns of known roles with a text, answers that are not empty, one prompt for both."""

import json
from dataclasses import replace

import pytest

from lisa_dist.data.dataset import DataArguments
from lisa_dist.data.row_rules import RowRules
from lisa_dist.data.task_rows import load_task_data

USER, ANSWER, OTHER = ({"role": role, "content": text} for role, text in
                       (("user", "q"), ("assistant", "a"), ("assistant", "b")))  # fmt: skip


def pair(chosen: list[dict], rejected: list[dict] | None = None) -> dict:
    return {"prompt": [USER], "chosen": chosen, "rejected": rejected or [OTHER]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (pair([ANSWER]), None),
        (pair([ANSWER | {"content": None, "tool_calls": [{"name": "f"}]}]), None),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, None),
        (pair([ANSWER | {"content": None}]), "has a chosen whose turn 1 has a content that is no text"),
        (pair([ANSWER | {"content": 5}]), "has a chosen whose turn 1 has a content that is no text"),
        (pair([ANSWER | {"content": [{"type": "text", "text": "a"}]}]), "has a content that is no text"),
        (pair([ANSWER | {"content": " "}]), "has an empty chosen"),
        (pair([ANSWER], [OTHER | {"content": ""}]), "has an empty rejected"),
        (pair([ANSWER | {"role": "wizard"}]), "turn 1 has the role 'wizard'; roles are system, user, assistant, tool"),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER | {"content": "another"}, OTHER]},
            "has chosen and rejected that do not begin with the same turn: that is the prompt; give it to both",
        ),
    ],
)
def test_turns_of_a_pair(row, said):
    taken, why = RowRules("dpo").checked(row)
    assert (taken is None) is (said is not None)
    assert why is None if said is None else said in why


@pytest.mark.parametrize(("label", "taken"), [(True, True), ("0", False), (1.0, True), ("0.0", False), (0.5, None)])
def test_labels_as_tables_have_them(label, taken):
    row, why = RowRules("kto").checked({"prompt": "q", "completion": "a", "label": label})
    assert row["label"] is taken if row else "has the label 0.5; it is true or false" in why


def test_columns_that_a_task_leaves_out_are_named_and_all_others_stay(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "q", "origin": "a book", "chosen": "a", "rejected": "b"}
    rows.write_text("\n".join([json.dumps(row)] * 3))
    arguments = DataArguments(dataset_name=[str(rows)])
    pairs, prompts = (load_task_data(arguments, task, seed=0) for task in ("dpo", "grpo"))
    assert "rows.jsonl: prompt, chosen, rejected (ignored: origin), 3 rows" in pairs.lines[0]
    assert prompts.train[0] == row  # which a reward function is given
    assert "prompt, origin, chosen, rejected, 3 rows" in prompts.lines[0]
    split = load_task_data(replace(arguments, eval_rows=1), "dpo", seed=0)
    assert (len(split.train), len(split.held_out), split.train.column_names) == (2, 1, ["prompt", "chosen", "rejected"])
