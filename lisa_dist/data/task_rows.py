"""Rows of the tasks that TRL tokenizes itself: checked, and handed on with the columns of their task.

Those of grpo keep all columns, for the reward functions. A text is a string or a list of turns of `role` and `content`,
as in TRL's formats; all rows of a source are of one kind.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from lisa_dist.data.dataset import Data, DataArguments, hold_out
from lisa_dist.data.encoding import check_tools_shown
from lisa_dist.data.formats import refuse_examples
from lisa_dist.data.readers import read_file
from lisa_dist.data.row_rules import WITH_TOOLS, RowRules, why_not_of_columns
from lisa_dist.data.sources import Source, apply_weight, open_source, sample_source, split_sample_size
from lisa_dist.errors import UserError
from lisa_dist.text import in_one_line

ORIGIN = "__origin__"  # the column of where a row is, in memory alone
_VERSION = 4  # increase it with any change of what a row becomes: older caches are then not used
_NUM_CHECKED = 100  # rows whose tools the chat template is tried with
_NUM_SHOWN = 700  # characters of the first row in the header of a run


def load_task_data(arguments: DataArguments, task: str, seed: int) -> Data:
    """Load all rows of a task. The first rank of a host fills the cache, the others read it.

    Raises UserError naming the flag, the file, the line and the rule.
    """
    lines: list[str] = []

    def load(sources: list[Source]) -> list[Dataset]:
        loaded = [_load(source, task, arguments.skip_bad_rows, seed) for source in sources]
        lines.extend(line for _, line in loaded)
        return [rows for rows, _ in loaded]

    train_sources, held_out_sources = arguments.sources()
    parts, held_out = load(train_sources), None
    if not held_out_sources and arguments.eval_rows:
        parts, held_out = hold_out(parts, arguments, seed, ORIGIN)
    given = zip(parts, train_sources, strict=True)
    weighted = [apply_weight(rows, source, seed) if len(rows) else rows for rows, source in given]
    train = _joined(weighted, "--dataset_name")
    lines.append(_describe_row(train[0]))
    if held_out is not None:
        lines.append(f"held out: {len(held_out)} of these rows, sampled by --seed {seed}")
    elif held_out_sources:
        lines.append("held out:")
        held_out = _joined(load(held_out_sources), "--eval_dataset_name")
    return Data(train.remove_columns(ORIGIN), held_out and held_out.remove_columns(ORIGIN), lines)


def check_template(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
    """Raise UserError where the chat template leaves out tools or tool calls of the first rows."""
    for row in rows.select(range(min(len(rows), _NUM_CHECKED))):
        texts = [row[name] for name in ("prompt", "chosen", "completion") if isinstance(row.get(name), list)]
        if turns := [turn for text in texts for turn in text]:
            tools = row.get("tools")
            check_tools_shown(tokenizer, turns, json.loads(tools) if isinstance(tools, str) else None)


def _load(source: Source, task: str, skip_invalid: bool, seed: int) -> tuple[Dataset, str]:
    """The valid rows of a source, sampled, with their origin; and a line that describes them."""
    try:
        name, sample_size = split_sample_size(source)
        opened = open_source(source, name)
    except OSError as error:  # of a path that cannot be looked at
        raise UserError(f"{source.label}: cannot be read ({error.strerror or error}).") from error
    if isinstance(opened, Dataset):
        rows: dict[str, Any] = {"table": opened}
    else:  # size and time are in the key of the cache, so that a changed file is read again
        rows = {"files": [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in opened]}
    first = next((row for _, row, _ in _read(rows, source.label) if row is not None), None)
    if first is None:
        raise UserError(f"{source.label}: contains no row that can be read.")
    if (why := why_not_of_columns(task, list(first), source.columns)) is not None:
        raise UserError(f"{source.label}: {why}")
    arguments: dict[str, Any] = {"version": _VERSION, "task": task, "columns": source.columns, "label": source.label}
    problems, features = [], {ORIGIN: Value("string")}
    for origin, row, why in _checked(rows, **arguments):
        problems.append(why and f"{origin} {why}")
        features |= {column: _feature_of(value) for column, value in (row or {}).items()}
    invalid = [problem for problem in problems if problem]
    if invalid and not skip_invalid:
        refuse_examples(invalid, len(invalid), len(problems), source.label)
    if len(invalid) == len(problems):
        raise UserError(f"{source.label}: none of its {len(problems)} rows can be used.")
    try:
        valid = Dataset.from_generator(
            _valid,
            gen_kwargs=arguments | {"rows": rows, "names": tuple(features)},
            # Columns of grpo may be of any kind, and TRL's orpo puts texts where turns were.
            features=Features(features) if task in WITH_TOOLS else None,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(
            f"{source.label}: a column has values of several kinds ({in_one_line(error.__cause__ or error)}); leave it "
            "out, or give it one kind."
        ) from error
    used = [column for column in valid.column_names if column != ORIGIN]
    ignored = [column for column in first if column not in (*used, *(old for _, old in source.columns))]
    line = f"{name}: {', '.join(used)}" + (f" (ignored: {', '.join(ignored)})" if ignored else "")
    line += f", {len(valid)} rows"
    line += f", {len(invalid)} invalid ones skipped, such as {invalid[0]}" if invalid else ""
    if sample_size is not None:
        valid = sample_source(valid, source, sample_size, seed)
        line += f", {sample_size} of them sampled by --seed {seed}"
    return valid, line


def _feature_of(value: Any) -> Any:
    """A column's kind: of turns JSON, as the arguments of tool calls are of any kind."""
    return List(Json()) if isinstance(value, list) else Value("bool" if isinstance(value, bool) else "string")


def _checked(
    rows: Mapping[str, Any], task: str, columns: tuple, label: str, version: int
) -> Iterator[tuple[str, dict | None, str | None]]:
    """Each row: where it is, what it holds, and why it cannot be trained on: one of the last two is None."""
    rules = RowRules(task, columns)
    for origin, row, problem in _read(rows, label):
        yield (origin, None, problem) if row is None else (origin, *rules.checked(row))


def _read(rows: Mapping[str, Any], label: str) -> Iterator[tuple[str, dict | None, str | None]]:
    if "table" in rows:
        for number, row in enumerate(rows["table"], start=1):
            yield f"row {number}", row, None
        return
    for path, *_ in rows["files"]:
        for origin, row, problem in read_file(Path(path), label):
            yield f"{path}, {origin}", row, problem


def _valid(rows: Mapping[str, Any], names: tuple[str, ...], **arguments: Any) -> Iterator[dict]:
    for origin, row, _ in _checked(rows, **arguments):
        if row is not None:
            yield {name: row.get(name) for name in names} | {ORIGIN: origin}


def _joined(parts: list[Dataset], flag: str) -> Dataset:
    columns = [", ".join(sorted(set(part.column_names) - {ORIGIN})) for part in parts]
    if len(set(columns)) > 1:
        raise UserError(f"{flag}: its sources have other columns each: {'; '.join(columns)}; give them the same ones.")
    try:
        return concatenate_datasets(parts)
    except ValueError as error:  # features that do not align
        raise UserError(f"{flag}: rows of its sources are not of one kind ({in_one_line(error)}).") from error


def _describe_row(row: Mapping[str, Any]) -> str:
    lines = ["first row:"]
    for name, value in row.items():
        if name != ORIGIN and value is not None:
            text = in_one_line(value)
            lines.append(f"  {name}: {text if len(text) <= _NUM_SHOWN else f'{text[:_NUM_SHOWN]} ...'}")
    return "\n".join(lines)
