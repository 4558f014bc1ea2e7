"""What a row of a task must hold: turns of known roles with a text, answers that are not empty, one prompt for both."""

import json
from dataclasses import replace

import pytest
from models import TEMPLATE
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lisa_dist.data.dataset import DataArguments
from lisa_dist.data.formats import ExampleError
from lisa_dist.data.task_rows import RowRules, check_template, load_task_data
from lisa_dist.errors import UserError

USER, ANSWER, OTHER = ({"role": role, "content": text} for role, text in
                       (("user", "q"), ("assistant", "a"), ("assistant", "b")))  # fmt: skip


def applied(task: str, row: dict, renamed=()) -> tuple[dict | None, str]:
    """The row as a run of the task takes it, or why it cannot."""
    try:
        return RowRules(task, renamed).apply(row), ""
    except ExampleError as error:
        return None, str(error)


def pair(chosen: list[dict], rejected: list[dict] | None = None) -> dict:
    return {"prompt": [USER], "chosen": chosen, "rejected": rejected or [OTHER]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (pair([ANSWER]), ""),
        (pair([ANSWER | {"content": None, "tool_calls": [{"name": "f"}]}]), ""),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, ""),
        (pair([ANSWER | {"content": None}]), "has a chosen whose turn 1 has a content that is no text"),
        (pair([ANSWER | {"content": 5}]), "has a chosen whose turn 1 has a content that is no text"),
        (pair([ANSWER | {"content": [{"type": "text", "text": "a"}]}]), "has a content that is no text"),
        (pair([ANSWER | {"content": " "}]), "has an empty chosen"),
        (
            pair([ANSWER | {"content": "", "tool_calls": "[]"}]),
            "has a turn of chosen with neither a text nor tool_calls",
        ),
        (pair([ANSWER], [OTHER | {"content": ""}]), "has an empty rejected"),
        (pair([ANSWER | {"role": "wizard"}]), "turn 1 has the role 'wizard'; roles are system, user, assistant, tool"),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER | {"content": "another"}, OTHER]},
            "has chosen and rejected that do not begin with the same turn: that is the prompt; give it to both",
        ),
    ],
)
def test_turns_of_a_pair(row, said):
    taken, why = applied("dpo", row)
    assert (taken is None) == bool(said) == bool(why)
    assert said in why


@pytest.mark.parametrize(("label", "taken"), [(True, True), ("0", False), (1.0, True), ("0.0", False), (0.5, None)])
def test_labels_as_tables_have_them(label, taken):
    row, why = applied("kto", {"prompt": "q", "completion": "a", "label": label})
    assert row["label"] is taken if row else "has the label 0.5; it is true or false" in why


def test_tools_and_tool_calls_of_pairs_reach_trl(tmp_path):
    """As the JSON that TRL's tasks take, and as turns whose calls have arguments of any kind, late in a file too."""
    rows, called = tmp_path / "rows.jsonl", ANSWER | {"content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}
    plain, given = [{"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}] * 1001, {"tools": [{"name": "f"}]}
    rows.write_text("\n".join(map(json.dumps, [*plain, pair([called]) | given])))
    data = load_task_data(DataArguments(dataset_name=[str(rows)]), "dpo", seed=0)
    function = {"type": "function", "function": {"name": "f"}}
    assert data.train[0] == plain[0] | {"tools": None}
    assert json.loads(data.train[1001]["tools"]) == [function]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert data.train[1001]["chosen"] == [ANSWER | {"content": "", "tool_calls": [call]}]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=TEMPLATE)
    check_template(tokenizer, data.train)
    with pytest.raises(UserError, match="has examples with tool_calls, and the chat template leaves them out"):
        check_template(tokenizer, data.train.select([1001]))
    _, why = applied("dpo", pair([called | {"tool_calls": [{"name": "f", "arguments": "no"}]}]))
    assert why.startswith("the arguments of f in tool_calls of chosen is no JSON")


@pytest.mark.parametrize("renamed", [{}, {"tools": "fns"}])
@pytest.mark.parametrize(("task", "shown"), [("dpo", True), ("kto", True), ("orpo", False), ("grpo", False)])
def test_tools_are_shown_or_refused(task, shown, renamed):
    name = renamed.get("tools", "tools")
    taken, why = applied(task, pair([ANSWER]) | {name: [{"name": "f"}]}, renamed.items())
    if shown:
        assert json.loads(taken["tools"]) == [{"type": "function", "function": {"name": "f"}}]
    else:
        assert f"has tools, which --task {task} shows to no chat template" in why
    assert not applied(task, pair([ANSWER]) | {name: "[]"}, renamed.items())[1], "a row without tools, of a table"


def test_columns_that_a_task_leaves_out_are_named_and_all_others_stay(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "q", "origin": "a book", "chosen": "a", "rejected": "b"}
    rows.write_text("\n".join([json.dumps(row)] * 3))
    arguments = DataArguments(dataset_name=[str(rows)])
    pairs, prompts = (load_task_data(arguments, task, seed=0) for task in ("dpo", "grpo"))
    assert "rows.jsonl: prompt, chosen, rejected (ignored: origin), 3 examples" in pairs.lines[0]
    assert prompts.train[0] == row  # which a reward function is given
    assert "prompt, origin, chosen, rejected, 3 examples" in prompts.lines[0]
    split = load_task_data(replace(arguments, eval_rows=1), "dpo", seed=0)
    assert (len(split.train), len(split.held_out), split.train.column_names) == (2, 1, ["prompt", "chosen", "rejected"])


def test_a_thousand_invalid_rows_before_the_first_valid_one_are_left_out(tmp_path):
    """Whose columns, of any kind for grpo, are those of the first rows that are written to the cache."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, [{"prompt": 3}] * 1500 + [{"prompt": "q"}])))
    data = load_task_data(DataArguments(dataset_name=[str(rows)], skip_bad_rows=True), "grpo", seed=0)
    assert data.train[:] == {"prompt": ["q"]}
