"""What a row of a task must hold, in plain Python: a first look at a file needs nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from lisa_dist.tasks import GRPO, KTO, TASKS, describe_columns_of, tasks_for

_ANSWERS = ("chosen", "rejected", "completion")


def why_not_of_columns(task: str, columns: Sequence[str]) -> str | None:
    """Why rows of these columns serve no run of a task, and what to do; None where they do."""
    if any(set(columns).issuperset(needed) for needed in TASKS[task].columns):
        return None
    serves = tasks_for(columns)
    instead = f", or give --task {' or '.join(serves)}" if serves else ""
    return (
        f"its columns {', '.join(columns)} are none of --task {task}, which takes {describe_columns_of(task)}; rename "
        f"them, as --dataset_columns {TASKS[task].columns[0][0]}=COLUMN{instead}."
    )


def why_not_of_task(task: str, row: Mapping[str, Any]) -> str | None:
    """Why a row cannot be trained on, for after its file and line; None where it can."""
    names = [name for name in ("prompt", *_ANSWERS) if row.get(name) is not None]
    if task == GRPO:
        names = ["prompt"]
    for name in names:
        if (why := _why_no_text(name, row.get(name))) is not None:
            return why
    if len({isinstance(row[name], str) for name in names}) > 1:
        return f"has texts and lists of turns among {', '.join(names)}"
    if task == GRPO:
        return None
    if task == KTO and "label" in row and row["label"] is not None:
        return None if isinstance(row["label"], bool) else f"has the label {row['label']!r}; it is true or false"
    for name in ("completion",) if task == KTO and "chosen" not in names else ("chosen", "rejected"):
        if name not in names:
            return f"has no {name}"
    if task == KTO and "chosen" not in names:
        return "has no label"
    return "has the same answer as chosen and rejected" if row["chosen"] == row["rejected"] else None


def _why_no_text(name: str, value: Any) -> str | None:
    """Why it is neither a text nor turns."""
    if isinstance(value, str):
        return None if value.strip() or name == "prompt" else f"has an empty {name}"
    if not isinstance(value, list) or not value:
        return f"has no {name}" if value is None or value == [] else f"has a {name} that is neither a text nor turns"
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            return f"has a {name} whose turn {number} is not of role and content"
    return None
