"""Rows for TRL from local files or the hub: prompt/completion, messages, instruction (alpaca), question/answer, text.

The format is told from the columns. With a chat template, prompts become a user turn and completions an assistant turn.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from lisa_dist.config import UserError

# Columns that tell a format, and the functions that take the prompt and the completion from a row of it.
_PAIRS = {
    ("prompt", "completion"): lambda row: (row["prompt"], row["completion"]),
    ("instruction", "output"): lambda row: (_join(row["instruction"], row.get("input")), row["output"]),
    ("question", "answer"): lambda row: (row["question"], row["answer"]),
}
_AS_THEY_ARE = ("messages", "text")  # TRL knows these


def load_rows(name: str, config: str | None = None, split: str = "train", flag: str = "--dataset_name") -> Dataset:
    """A local .json or .jsonl file, or a hub dataset. Raises UserError naming the file, the line and the rule."""
    path = Path(name)
    said = f"{flag} {name}"
    if path.suffix in (".json", ".jsonl") or path.exists():
        return _load_file(path, said)
    try:
        return load_dataset(name, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{said}: no such file (.json or .jsonl), and no dataset of that name on the hub can be "
            f"reached ({type(error).__name__})."
        ) from error


def prepare_rows(rows: Dataset, name: str, chat: bool, flag: str = "--dataset_name") -> Dataset:
    """The rows with the columns that TRL expects.

    With `chat` plain prompts become turns for a chat template; without, a line break parts question and answer.
    """
    columns = rows.column_names
    if any(column in columns for column in _AS_THEY_ARE):
        return rows
    for wanted, to_pair in _PAIRS.items():
        if all(column in columns for column in wanted):
            _refuse_nulls(rows, wanted, f"{flag} {name}")
            as_written = wanted == ("prompt", "completion")

            def to_trl(row, to_pair=to_pair, as_written=as_written):
                prompt, completion = to_pair(row)
                if chat and isinstance(prompt, str):
                    return {
                        "prompt": [{"role": "user", "content": prompt}],
                        "completion": [{"role": "assistant", "content": completion}],
                    }
                return {"prompt": prompt if as_written else prompt + "\n", "completion": completion}

            return rows.map(to_trl, remove_columns=columns)
    formats = ["messages", "text", *("+".join(wanted) for wanted in _PAIRS)]
    raise UserError(
        f"{flag} {name}: has the columns {', '.join(columns)}; needed are those of one format: {'; '.join(formats)}."
    )


def _load_file(path: Path, said: str) -> Dataset:
    """Rows in a file of the cache of `datasets`: what is made of them is there too, for the other ranks of a host."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{said}: cannot be read ({error.strerror}).") from error
    # Size and time tell a file that has been changed from the one in the cache.
    arguments = {"path": str(path), "said": said, "size": status.st_size, "time": status.st_mtime_ns}
    try:
        return Dataset.from_generator(_rows_of_file, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        if isinstance(error.__cause__, (pyarrow.ArrowException, TypeError, ValueError)):
            raise UserError(f"{said}: a column holds values of different types ({error.__cause__}).") from error
        raise


def _rows_of_file(path: str, said: str, size: int, time: int) -> Iterator[dict]:
    yield from _read_json_rows(Path(path), said)


def _join(*parts: str | None) -> str:
    return "\n\n".join(part for part in parts if part)


def _refuse_nulls(rows: Dataset, columns: tuple[str, ...], said: str) -> None:
    for column in columns:
        for number, value in enumerate(rows[column], start=1):
            if value is None:
                raise UserError(f"{said}: row {number} has no {column}.")


def _read_json_rows(path: Path, said: str) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{said}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{said}: line {line} is not UTF-8.") from error
    if not text.strip():
        raise UserError(f"{said}: is empty.")
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(f"{said}: is not JSON ({error}).") from error
        numbered = list(enumerate(rows, start=1)) if isinstance(rows, list) else []
        what = "row"
    else:
        numbered = []
        what = "line"
        # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                numbered.append((number, json.loads(line)))
            except ValueError as error:
                raise UserError(f"{said}: line {number} is not JSON ({error}).") from error
    if not numbered:
        raise UserError(f"{said}: holds no rows; needed is a list of objects, or one object a line (.jsonl).")
    first_columns, types = None, {}
    for number, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"{said}: {what} {number} is {type(row).__name__}, not an object.")
        first_columns = first_columns or set(row)
        missing = first_columns - set(row)
        if missing:
            raise UserError(f"{said}: {what} {number} lacks {', '.join(sorted(missing))}, which earlier rows have.")
        for column, value in row.items():
            kind = {int: float}.get(type(value), type(value))
            if value is not None and types.setdefault(column, kind) is not kind:
                raise UserError(
                    f"{said}: {what} {number} has a column of another type than before: {column} is "
                    f"{kind.__name__}, not {types[column].__name__}."
                )
    return [row for _, row in numbered]
