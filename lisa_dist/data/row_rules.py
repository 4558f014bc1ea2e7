"""What a row of a task must hold."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lisa_dist.data.formats import ROLES, ExampleError, to_functions
from lisa_dist.tasks import GRPO, KTO, REWARD, TASKS, describe_columns_of, tasks_for

WITH_TOOLS = ("dpo", KTO, REWARD)  # of the others TRL hands the tools of a row to no chat template
_ANSWERS = ("chosen", "rejected", "completion")
_LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}  # as CSV has them


def why_not_of_columns(task: str, columns: Sequence[str], renamed: Iterable[tuple[str, str]]) -> str | None:
    """Why rows of these columns serve no run of a task, and what to do; None where they do.

    `renamed`: names in the format, and in the rows.
    """
    lacking = [column for _, column in renamed if column not in columns]
    if lacking:
        return f"--dataset_columns: there is no {', '.join(lacking)}; its columns are {', '.join(columns)}."
    there = {*columns, *(name for name, _ in renamed)}
    if any(there.issuperset(needed) for needed in TASKS[task].columns):
        return None
    serves = tasks_for(there)
    instead = f", or give --task {' or '.join(serves)}" if serves else ""
    return (
        f"its columns {', '.join(columns)} are none of --task {task}, which takes {describe_columns_of(task)}; rename "
        f"them, as --dataset_columns {TASKS[task].columns[0][0]}=COLUMN{instead}."
    )


def hint_of_tasks(columns: Iterable[str]) -> str:
    """What rows of these columns serve besides examples; empty where they serve nothing, or have a prompt alone."""
    serves = [task for task in tasks_for(columns) if task != GRPO]
    return f" Such rows are for --task {' or '.join(serves)}." if serves else ""


class RowRules:
    """The rules of one source: every row has the columns of the first one, each a text or turns as there."""

    def __init__(self, task: str, renamed: Iterable[tuple[str, str]] = ()):
        self._task, self._renamed = task, tuple(renamed)
        self.shape: dict[str, str] | None = None  # of the first valid row: a text or turns, by column

    def checked(self, row: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        """The row as a run takes it, and why it cannot: one of them is None."""
        new = dict(row) | {name: row.get(column) for name, column in self._renamed}
        tools = new.get("tools") if new.get("tools") != "[]" else None
        if self._task == GRPO:
            names = ["prompt"]
        else:
            is_pair = self._task != KTO or (new.get("chosen") is not None and new.get("rejected") is not None)
            names = ["chosen", "rejected"] if is_pair else ["completion"]
            if new.get("prompt") is not None or not is_pair:
                names.insert(0, "prompt")
            new = {name: new.get(name) for name in [*names, *([] if is_pair else ["label"])]}
        problem = self._problem(new, names)
        if problem is None:
            try:
                new |= {name: _with_calls(new[name], name) for name in names}
                if tools and self._task not in WITH_TOOLS:
                    raise ExampleError(
                        f"has tools, which --task {self._task} shows to no chat template; {', '.join(WITH_TOOLS)} do: "
                        "remove or rename the column, or give one of these tasks"
                    )
                if tools:
                    new["tools"] = json.dumps(to_functions(tools, "tools"))  # of which TRL takes the JSON
            except ExampleError as error:
                problem = str(error)
        return (None, problem) if problem else (new, None)

    def _problem(self, row: dict[str, Any], names: list[str]) -> str | None:
        for name in names:
            if (why := _why_no_text(name, row.get(name), may_be_empty=self._task != GRPO)) is not None:
                return why
        shape = {name: "a text" if isinstance(row[name], str) else "turns" for name in names}
        if len(set(shape.values())) > 1:
            return f"has texts and lists of turns among {', '.join(names)}"
        if self.shape not in (None, shape):
            return f"has {_described(shape)}; the rows before it have {_described(self.shape or {})}"
        if "rejected" in names and row["chosen"] == row["rejected"]:
            return "has the same answer as chosen and rejected"
        if names == ["chosen", "rejected"] and "turns" in shape.values() and row["chosen"][0] != row["rejected"][0]:
            return "has chosen and rejected that do not begin with the same turn: that is the prompt; give it to both"
        if "label" in row:
            label = row["label"] if isinstance(row["label"], bool) else _LABELS.get(str(row["label"]).lower())
            if label is None:
                return f"has the label {row['label']!r}; it is true or false"
            row["label"] = label
        self.shape = shape
        return None


def _with_calls(text: Any, name: str) -> Any:
    """A text, or turns with their tool calls in the form that chat templates take."""
    if isinstance(text, str):
        return text
    turns = []
    for turn in text:
        if calls := turn.get("tool_calls"):
            calls = to_functions(calls, f"tool_calls of {name}", are_calls=True)
            if not calls and not turn["content"]:
                raise ExampleError(f"has a turn of {name} with neither a text nor tool_calls")
            turn = {**turn, "content": turn["content"] or "", "tool_calls": calls}
        turns.append(turn)
    return turns


def _described(shape: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in shape.items())


def _why_no_text(name: str, value: Any, may_be_empty: bool) -> str | None:
    """Why it is neither a text nor turns; a prompt of a text may be empty."""
    if isinstance(value, str):
        if not value.strip() and (name in _ANSWERS or not may_be_empty):
            return f"has an empty {name}"
        return _why_no_characters(name, value)
    if value is None or value == []:
        return f"has no {name}"
    if not isinstance(value, list):
        return f"has a {name} that is neither a text nor turns"
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            return f"has a {name} whose turn {number} is not of role and content"
        if turn["role"] not in (*ROLES, "developer"):
            return f"has a {name} whose turn {number} has the role {turn['role']!r}; roles are {', '.join(ROLES)}"
        content = turn["content"]
        if content is None and turn.get("tool_calls"):
            continue
        if not isinstance(content, str):
            return f"has a {name} whose turn {number} has a content that is no text"
        if (why := _why_no_characters(name, content)) is not None:
            return why
    if name in _ANSWERS and value[-1]["role"] != "assistant":
        return f"has a {name} that does not end with a turn of the assistant"
    if name in _ANSWERS and not (value[-1]["content"] or "").strip() and not value[-1].get("tool_calls"):
        return f"has an empty {name}"
    return None


def _why_no_characters(name: str, text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"has half of a character (a lone surrogate) in {name}"
    return None
