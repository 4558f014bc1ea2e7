"""Rows of the benchmarks in files of the user's: what `eval_tasks/*.yaml` read, in the columns of the stock tasks.

Every row is checked before a model is loaded: one without its answer would count as a wrong answer of the model's.
Layouts are those of the benchmarks' own repositories; docs/evaluation.md says where each file comes from.
"""

import functools
import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from datasets import Dataset

from lisa_dist.config import UserError

_LETTERS = "ABCDEFGHIJ"
_DECISIONS = ("yes", "no", "maybe")


def gsm8k(data_dir: str, **_: object) -> dict[str, Dataset]:
    """Splits train, for examples, and test, of `question` and `answer`."""
    return {
        split: Dataset.from_list(read_rows(Path(data_dir) / "gsm8k" / f"{split}.jsonl", _check_gsm8k))
        for split in ("train", "test")
    }


def mmlu(data_dir: str, subject: str, **_: object) -> dict[str, Dataset]:
    """Splits dev, for examples, and test of one subject: `question`, four `choices`, the index of the `answer`."""
    splits = {}
    for split in ("dev", "test"):
        path = Path(data_dir) / "mmlu" / f"{split}.jsonl"
        rows = [row for row in read_rows(path, _check_mmlu) if row["subject"] == subject]
        if not rows:
            raise UserError(f"--data_dir {data_dir}: {path.name} of mmlu has no row with subject {subject}.")
        splits[split] = Dataset.from_list(rows)
    return splits


def agieval(data_dir: str, file: str, **_: object) -> dict[str, Dataset]:
    """Split test of one set: the `query` of AGIEval's zero-shot prompt, `choices`, and `gold`, a list of indices."""
    rows = []
    for row in read_rows(Path(data_dir) / "agieval" / f"{file}.jsonl", _check_agieval):
        options = row["options"]
        query = f"{row.get('passage') or ''}Q: {row['question']} Answer Choices: {' '.join(options)}\n"
        query += f"A: Among A through {_LETTERS[len(options) - 1]}, the answer is"
        rows.append({"query": query, "choices": options, "gold": [_LETTERS.index(row["label"])]})
    return {"test": Dataset.from_list(rows)}


def winogrande(data_dir: str, **_: object) -> dict[str, Dataset]:
    """Splits validation, and train for examples, which is empty without its file."""
    folder, columns = Path(data_dir) / "winogrande", ("sentence", "option1", "option2", "answer")
    splits = {"validation": read_rows(folder / "dev.jsonl", _check_winogrande), "train": []}
    if find(folder / "train_xl.jsonl"):
        splits["train"] = read_rows(folder / "train_xl.jsonl", _check_winogrande)
    return {
        split: Dataset.from_list([{name: row[name] for name in columns} for row in rows])
        for split, rows in splits.items()
    }


def pubmedqa(data_dir: str, **_: object) -> dict[str, Dataset]:
    """Split test: the abstracts that test_ground_truth.json names, in its order; train: the others."""
    folder = Path(data_dir) / "pubmedqa"
    abstracts, truth = (_read_object(folder / name) for name in ("ori_pqal.json", "test_ground_truth.json"))
    for name, decision in truth.items():
        where = f"{folder / 'test_ground_truth.json'}, {name}"
        if decision not in _DECISIONS:
            raise UserError(f"{where}: the answer must be yes, no or maybe, not {decision!r}.")
        if name not in abstracts:
            raise UserError(f"{where}: ori_pqal.json has no such abstract.")
    splits = {"test": [], "train": []}
    for name in [*truth, *(name for name in abstracts if name not in truth)]:
        row = abstracts[name]
        problem = _check_pubmedqa(row)
        if problem is None and row["final_decision"] != truth.get(name, row["final_decision"]):
            problem = "final_decision and test_ground_truth.json differ"
        if problem is not None:
            raise UserError(f"{folder / 'ori_pqal.json'}, {name}: {problem}.")
        columns = {column: row[column] for column in ("QUESTION", "CONTEXTS", "final_decision")}
        splits["test" if name in truth else "train"].append(columns)
    return {split: Dataset.from_list(rows) for split, rows in splits.items()}


def find(path: Path) -> Path | None:
    """The file, or the same with .gz; None where there is neither."""
    return next((one for one in (path, path.with_name(f"{path.name}.gz")) if one.is_file()), None)


@functools.cache
def read_rows(path: Path, check: Callable[[dict], str | None]) -> list[dict]:
    """Objects of a .jsonl file, or of the same with .gz, each without a problem by `check`.

    Raises UserError naming the file, the number of the row and what is wrong with it.
    """
    found = find(path)
    if found is None:
        raise UserError(f"{path}: no such file; docs/evaluation.md says where it comes from.")
    rows = []
    for number, line in enumerate(_lines(found), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{found}, row {number}: is not JSON ({error}).") from error
        problem = check(row) if isinstance(row, dict) else "must be an object"
        if problem is not None:
            raise UserError(f"{found}, row {number}: {problem}.")
        rows.append(row)
    if not rows:
        raise UserError(f"{found}: holds no rows.")
    return rows


def lacks_text(row: Mapping[str, object], *names: str) -> str | None:
    """The first of these fields that is missing or no text with something in it, as a problem of the row."""
    for name in names:
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"{name} {'is missing' if row.get(name) is None else 'must be text that is not empty'}"
    return None


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            yield from file
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error


def _read_object(path: Path) -> dict:
    """A JSON file that is one object, of which something is there."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; docs/evaluation.md says where it comes from.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: must be an object with an entry for each abstract.")
    return content


def _check_gsm8k(row: dict) -> str | None:
    problem = lacks_text(row, "question", "answer")
    if problem is None and not re.search(r"#### *-?[\d$.,]*\d", row["answer"]):
        return "answer must end with #### and the number"
    return problem


def _check_mmlu(row: dict) -> str | None:
    problem, choices, answer = lacks_text(row, "subject", "question"), row.get("choices"), row.get("answer")
    if problem is None and not _is_texts(choices, 4):
        return "choices must be four texts"
    if problem is None and (type(answer) is not int or not 0 <= answer <= 3):
        return (
            "answer is missing" if answer is None else f"answer must be the index of a choice, 0 to 3, not {answer!r}"
        )
    return problem


def _check_agieval(row: dict) -> str | None:
    problem, options, label = lacks_text(row, "question"), row.get("options"), row.get("label")
    if problem is None and not (_is_texts(options) and 2 <= len(options) <= len(_LETTERS)):
        return "options must be texts, two or more"
    if problem is None and (not isinstance(label, str) or label not in [*_LETTERS[: len(options)]]):
        return "label is missing" if label is None else f"label must be the letter of an option, not {label!r}"
    return problem


def _check_winogrande(row: dict) -> str | None:
    problem = lacks_text(row, "sentence", "option1", "option2", "answer")
    if problem is None and "_" not in row["sentence"]:
        return "sentence must have a _ in the place of the word"
    if problem is None and row["answer"] not in ("1", "2"):
        return f"answer must be 1 or 2, not {row['answer']!r}"
    return problem


def _check_pubmedqa(row: object) -> str | None:
    if not isinstance(row, dict):
        return "must be an object"
    problem = lacks_text(row, "QUESTION", "final_decision")
    if problem is None and not (_is_texts(row.get("CONTEXTS")) and row["CONTEXTS"]):
        return "CONTEXTS must be texts, one or more"
    if problem is None and row["final_decision"] not in _DECISIONS:
        return f"final_decision must be yes, no or maybe, not {row['final_decision']!r}"
    return problem


def _is_texts(value: object, number: int | None = None) -> bool:
    texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return texts and number in (None, len(value))
