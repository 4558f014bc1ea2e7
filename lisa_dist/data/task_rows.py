"""Rows of the tasks that TRL tokenizes itself: checked, and handed on with the columns of their task.

Those of grpo keep all columns, for the reward functions. A text is a string or a list of turns of `role` and `content`,
as in TRL's formats; all rows of a source are of one kind.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from transformers import PreTrainedTokenizerBase

from lisa_dist.data.dataset import Data, DataArguments, put_together
from lisa_dist.data.encoding import check_tools_shown
from lisa_dist.data.formats import ROLES, ExampleError, to_functions
from lisa_dist.data.readers import ORIGIN, PROBLEM
from lisa_dist.data.sources import Source, first_row, generate, load_source, read_rows
from lisa_dist.errors import UserError
from lisa_dist.tasks import GRPO, KTO, REWARD, TASKS, describe_columns_of, tasks_for
from lisa_dist.text import in_one_line

_VERSION = 5  # increase it with any change of what a row becomes: older caches are then not used
_NUM_CHECKED = 100  # rows whose tools the chat template is tried with
_NUM_SHOWN = 700  # characters of the first row in the header of a run
_WITH_TOOLS = ("dpo", KTO, REWARD)  # of the others TRL hands the tools of a row to no chat template
_ANSWERS = ("chosen", "rejected", "completion")
_LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}  # as CSV has them


def load_task_data(arguments: DataArguments, task: str, seed: int) -> Data:
    """Load all rows of a task. The first rank of a host fills the cache, the others read it.

    Raises UserError naming the flag, the file, the line and the rule.
    """

    def load(source: Source) -> tuple[Dataset, list[str]]:
        rows, line = load_source(source, arguments.skip_bad_rows, seed, partial(_convert, task=task))
        return rows, [line]

    return put_together(arguments, seed, load, _describe_row)


def check_template(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
    """Raise UserError where the chat template leaves out tools or tool calls of the first rows."""
    for row in rows.select(range(min(len(rows), _NUM_CHECKED))):
        texts = [row[name] for name in ("prompt", "chosen", "completion") if isinstance(row.get(name), list)]
        if turns := [turn for text in texts for turn in text]:
            tools = row.get("tools")
            check_tools_shown(tokenizer, turns, json.loads(tools) if isinstance(tools, str) else None)


def _convert(source: Source, rows: dict[str, Any], task: str) -> tuple[Dataset, str]:
    """The rows of a source, with those that are invalid, and the columns that are used and ignored."""
    first = first_row(rows)
    _check_columns(source, task, list(first))
    arguments: dict[str, Any] = {"version": _VERSION, "rows": rows, "task": task, "columns": source.columns}
    kinds: dict[str, Any] = {}
    for row in _checked(**arguments):
        for column, value in row.items():  # turns are JSON, as the arguments of tool calls are of any kind
            plain = Value("bool" if isinstance(value, bool) else "string")
            kinds[column] = List(Json()) if isinstance(value, list) else plain
    # Columns of grpo may be of any kind, and TRL's orpo puts texts where turns were.
    features = Features(kinds) if task in _WITH_TOOLS else None
    examples = generate(_entries, arguments | {"names": tuple(kinds)}, features)
    used = [column for column in kinds if column not in (ORIGIN, PROBLEM)]
    ignored = [column for column in first if column not in (*used, *(old for _, old in source.columns))]
    return examples, ", ".join(used) + (f" (ignored: {', '.join(ignored)})" if ignored else "")


def _check_columns(source: Source, task: str, columns: Sequence[str]) -> None:
    """Raise UserError for rows of columns that serve no run of a task, with what to do."""
    lacking = [column for _, column in source.columns if column not in columns]
    if lacking:
        raise UserError(
            f"{source.label}: --dataset_columns: there is no {', '.join(lacking)}; its columns are "
            f"{', '.join(columns)}."
        )
    there = {*columns, *(name for name, _ in source.columns)}
    serves = tasks_for(there)
    if task not in serves:
        instead = f", or give --task {' or '.join(serves)}" if serves else ""
        raise UserError(
            f"{source.label}: its columns {', '.join(columns)} are none of --task {task}, which takes "
            f"{describe_columns_of(task)}; rename them, as --dataset_columns "
            f"{TASKS[task].columns[0][0]}=COLUMN{instead}."
        )


def _checked(version: int, rows: Mapping[str, Any], task: str, columns: tuple) -> Iterator[dict[str, Any]]:
    """Each row as a run takes it, or nothing of it, with its ORIGIN and PROBLEM."""
    rules = RowRules(task, columns)
    for _, origin, row, problem in read_rows(rows):
        taken: dict[str, Any] = {}
        try:
            taken = {} if row is None else rules.apply(row)
        except ExampleError as error:
            problem = str(error)
        yield taken | {ORIGIN: origin, PROBLEM: problem or ""}


def _entries(names: tuple[str, ...], **arguments: Any) -> Iterator[dict[str, Any]]:
    """The valid rows before the others, whose columns are empty: without `features` the first rows give the kinds."""
    for is_valid in (True, False):
        for row in _checked(**arguments):
            if bool(row[PROBLEM]) != is_valid:
                yield {name: row.get(name) for name in names}


class RowRules:
    """The rules of one source: every row has the columns of the first one, each a text or turns as there."""

    def __init__(self, task: str, renamed: Iterable[tuple[str, str]] = ()):
        self._task, self._renamed = task, tuple(renamed)
        self._shape: dict[str, str] | None = None  # of the first valid row: a text or turns, by column

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as a run takes it. Raises ExampleError with why it cannot."""
        new = dict(row) | {name: row.get(column) for name, column in self._renamed}
        tools, names = new.get("tools"), ["prompt"]
        if self._task != GRPO:
            is_pair = self._task != KTO or (new.get("chosen") is not None and new.get("rejected") is not None)
            names = ["chosen", "rejected"] if is_pair else ["completion"]
            if new.get("prompt") is not None or not is_pair:
                names.insert(0, "prompt")
            new = {name: new.get(name) for name in [*names, *([] if is_pair else ["label"])]}
        for name in names:
            _check_text(name, new.get(name), may_be_empty=self._task != GRPO)
        self._check(new, names)
        new |= {name: _with_calls(new[name], name) for name in names}
        if tools and tools != "[]":  # as tables have none
            if self._task not in _WITH_TOOLS:
                raise ExampleError(
                    f"has tools, which --task {self._task} shows to no chat template; {', '.join(_WITH_TOOLS)} do: "
                    "remove or rename the column, or give one of these tasks"
                )
            new["tools"] = json.dumps(to_functions(tools, "tools"))  # of which TRL takes the JSON
        return new

    def _check(self, row: dict[str, Any], names: list[str]) -> None:
        """What columns must be to each other, and to those of other rows; a label becomes true or false."""
        shape = {name: "a text" if isinstance(row[name], str) else "turns" for name in names}
        if len(set(shape.values())) > 1:
            raise ExampleError(f"has texts and lists of turns among {', '.join(names)}")
        if self._shape not in (None, shape):
            raise ExampleError(f"has {_described(shape)}; the rows before it have {_described(self._shape or {})}")
        if "rejected" in names and row["chosen"] == row["rejected"]:
            raise ExampleError("has the same answer as chosen and rejected")
        if names == ["chosen", "rejected"] and "turns" in shape.values() and row["chosen"][0] != row["rejected"][0]:
            raise ExampleError(
                "has chosen and rejected that do not begin with the same turn: that is the prompt; give it to both"
            )
        if "label" in row:
            label = row["label"] if isinstance(row["label"], bool) else _LABELS.get(str(row["label"]).lower())
            if label is None:
                raise ExampleError(f"has the label {row['label']!r}; it is true or false")
            row["label"] = label
        self._shape = shape


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


def _check_text(name: str, value: Any, may_be_empty: bool) -> None:
    """Raise ExampleError for what is neither a text nor turns; a prompt of a text may be empty."""
    is_answer, turns = name in _ANSWERS, value if isinstance(value, list) else []
    if value is None or value == []:
        raise ExampleError(f"has no {name}")
    if not isinstance(value, str | list):
        raise ExampleError(f"has a {name} that is neither a text nor turns")
    for number, turn in enumerate(turns, start=1):
        place = f"has a {name} whose turn {number}"
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise ExampleError(f"{place} is not of role and content")
        if turn["role"] not in (*ROLES, "developer"):
            raise ExampleError(f"{place} has the role {turn['role']!r}; roles are {', '.join(ROLES)}")
        if not isinstance(turn["content"], str) and not (turn["content"] is None and turn.get("tool_calls")):
            raise ExampleError(f"{place} has a content that is no text")
    if is_answer and turns and turns[-1]["role"] != "assistant":
        raise ExampleError(f"has a {name} that does not end with a turn of the assistant")
    last: Mapping[str, Any] = turns[-1] if turns else {"content": value}
    if (
        (is_answer or not (turns or may_be_empty))
        and not (last["content"] or "").strip()
        and not last.get("tool_calls")
    ):
        raise ExampleError(f"has an empty {name}")
    try:
        "".join(turn["content"] or "" for turn in turns or [last]).encode()
    except UnicodeEncodeError:
        raise ExampleError(f"has half of a character (a lone surrogate) in {name}") from None


def _describe_row(row: Mapping[str, Any]) -> str:
    lines = ["first row:"]
    for name, value in row.items():
        if value is not None:
            text = in_one_line(value)
            lines.append(f"  {name}: {text if len(text) <= _NUM_SHOWN else f'{text[:_NUM_SHOWN]} ...'}")
    return "\n".join(lines)
