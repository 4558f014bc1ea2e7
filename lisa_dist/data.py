"""Rows for TRL from local files or the hub: prompt/completion, messages, instruction (alpaca), question/answer, text.

The format is told from the columns. With a chat template, prompts become a user turn and completions an assistant turn.
"""

import json
from pathlib import Path

from datasets import Dataset, load_dataset

# Columns that tell a format, and the function that turns a row of it into TRL's prompt and completion.
_PAIRS = {
    ("prompt", "completion"): lambda row: (row["prompt"], row["completion"]),
    ("instruction", "output"): lambda row: (_join(row["instruction"], row.get("input")), row["output"]),
    ("question", "answer"): lambda row: (row["question"], row["answer"]),
}
_AS_THEY_ARE = ("messages", "text")  # TRL knows these


def load_rows(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """A local .json or .jsonl file, or a hub dataset. Raises ValueError naming the file, the line and the rule."""
    path = Path(name)
    if path.suffix in (".json", ".jsonl") or path.exists():
        return Dataset.from_list(_read_json_rows(path))
    try:
        return load_dataset(name, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"--dataset_name {name}: no such file (.json or .jsonl), and no dataset of that name on the hub can be "
            f"reached ({type(error).__name__})."
        ) from error


def prepare_rows(rows: Dataset, name: str, chat: bool) -> Dataset:
    """The rows with the columns that TRL expects. `chat` makes turns for a chat template of plain prompts."""
    columns = rows.column_names
    if any(column in columns for column in _AS_THEY_ARE):
        return rows
    for wanted, to_pair in _PAIRS.items():
        if all(column in columns for column in wanted):
            return rows.map(lambda row, to_pair=to_pair: _trl_row(*to_pair(row), chat), remove_columns=columns)
    formats = ["messages", "text", *("+".join(wanted) for wanted in _PAIRS)]
    raise ValueError(
        f"--dataset_name {name}: has the columns {', '.join(columns)}; needed are those of one format: "
        f"{'; '.join(formats)}."
    )


def _join(*parts: str | None) -> str:
    return "\n\n".join(part for part in parts if part)


def _trl_row(prompt: str | list, completion: str | list, chat: bool) -> dict:
    if chat and isinstance(prompt, str):
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }
    return {"prompt": prompt, "completion": completion}


def _read_json_rows(path: Path) -> list[dict]:
    flag = f"--dataset_name {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{flag}: cannot be read ({error.strerror}).") from error
    if not text.strip():
        raise ValueError(f"{flag}: is empty.")
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{flag}: is not JSON ({error}).") from error
        numbered = list(enumerate(rows, start=1)) if isinstance(rows, list) else []
        what = "row"
    else:
        numbered = []
        what = "line"
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                numbered.append((number, json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{flag}: line {number} is not JSON ({error}).") from error
    if not numbered:
        raise ValueError(f"{flag}: holds no rows; needed is a list of objects, or one object a line (.jsonl).")
    first_columns = None
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{flag}: {what} {number} is {type(row).__name__}, not an object.")
        first_columns = first_columns or set(row)
        missing = first_columns - set(row)
        if missing:
            raise ValueError(f"{flag}: {what} {number} lacks {', '.join(sorted(missing))}, which earlier rows have.")
    return [row for _, row in numbered]
