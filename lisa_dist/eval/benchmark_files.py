"""Examples of the benchmarks from the user's files, with the columns of the stock tasks, for `eval_tasks/*.yaml`.

Every example is checked before a model is loaded: one without an answer would count as a wrong answer of the model.
Formats are those of the benchmarks' own repositories; docs/evaluation.md says where each file comes from.
"""

import functools
import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from lisa_dist.errors import UserError
from lisa_dist.shapes import Each, misfit

_LETTERS = "ABCDEFGHIJ"


# Shapes, for `misfit`.


def text(value: object) -> str | None:
    """Text that is not blank."""
    is_text = isinstance(value, str) and value.strip()
    return None if is_text else "is missing" if value is None else "must be text that is not empty"


def one_of(*values: str) -> Callable[[object], str | None]:
    """One of these texts."""
    return lambda value: text(value) or (None if value in values else f"must be one of {', '.join(values)}")


def _matching(pattern: str, words: str) -> Callable[[object], str | None]:
    return lambda value: text(value) or (None if re.search(pattern, str(value)) else words)


def _texts(fewest: int, most: float, words: str) -> Callable[[object], str | None]:
    def check(value: object) -> str | None:
        are_texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
        return None if are_texts and fewest <= len(value) <= most else words  # type: ignore[arg-type]

    return check


def _index(value: object) -> str | None:
    is_index = type(value) is int and 0 <= value <= 3
    return None if is_index else "is missing" if value is None else "must be the index of a choice, 0 to 3"


_GSM8K = {"question": text, "answer": _matching(r"#### *-?[\d$.,]*\d", "must end with #### and the number")}
_MMLU = {"subject": text, "question": text, "choices": _texts(4, 4, "must be four texts"), "answer": _index}
_AGIEVAL = {"question": text, "options": _texts(2, len(_LETTERS), "must be texts, two or more"), "label": text}
_WINOGRANDE = {
    "sentence": _matching("_", "must have a _ in the place of the word"),
    "option1": text,
    "option2": text,
    "answer": one_of("1", "2"),
}
_DECISION = one_of("yes", "no", "maybe")
_ABSTRACT = {
    "QUESTION": text,
    "CONTEXTS": _texts(1, math.inf, "must be texts, one or more"),
    "final_decision": _DECISION,
}


def gsm8k(data_dir: str, **_: object) -> dict[str, Dataset]:
    """Splits train, for few-shot examples, and test, with the columns `question` and `answer`."""
    paths = {split: Path(data_dir) / "gsm8k" / f"{split}.jsonl" for split in ("train", "test")}
    return {split: Dataset.from_list(read_entries(path, _GSM8K)) for split, path in paths.items()}


def mmlu(data_dir: str, subject: str, **_: object) -> dict[str, Dataset]:
    """Splits dev, for few-shot examples, and test of one subject: `question`, four `choices`, index of the `answer`."""
    splits = {}
    for split in ("dev", "test"):
        examples = [entry for entry in _read_mmlu(data_dir, split) if entry["subject"] == subject]
        if not examples:
            raise UserError(f"--data_dir {data_dir}: {split}.jsonl of mmlu has no example with subject {subject}.")
        splits[split] = Dataset.from_list(examples)
    return splits


@functools.cache
def _read_mmlu(data_dir: str, split: str) -> list[dict]:
    """The entries of all subjects, each of which reads them."""
    return read_entries(Path(data_dir) / "mmlu" / f"{split}.jsonl", _MMLU)


def agieval(data_dir: str, file: str, **_: object) -> dict[str, Dataset]:
    """Split test of one set: AGIEval's zero-shot prompt as `query`, `choices`, and `gold`, a list of indices."""
    examples = []
    for entry in read_entries(Path(data_dir) / "agieval" / f"{file}.jsonl", _AGIEVAL, _check_label):
        options = entry["options"]
        query = f"{entry.get('passage') or ''}Q: {entry['question']} Answer Choices: {' '.join(options)}\n"
        query += f"A: Among A through {_LETTERS[len(options) - 1]}, the answer is"
        examples.append({"query": query, "choices": options, "gold": [_LETTERS.index(entry["label"])]})
    return {"test": Dataset.from_list(examples)}


def _check_label(entry: dict) -> str | None:
    letters = [*_LETTERS[: len(entry["options"])]]
    return None if entry["label"] in letters else f"label must be the letter of an option, not {entry['label']!r}"


def winogrande(data_dir: str, **_: object) -> dict[str, Dataset]:
    """Splits validation, and train for few-shot examples, which is empty without its file."""
    folder = Path(data_dir) / "winogrande"
    splits = {"validation": read_entries(folder / "dev.jsonl", _WINOGRANDE), "train": []}
    if any((folder / name).is_file() for name in ("train_xl.jsonl", "train_xl.jsonl.gz")):
        splits["train"] = read_entries(folder / "train_xl.jsonl", _WINOGRANDE)
    return {
        split: Dataset.from_list([{name: example[name] for name in _WINOGRANDE} for example in examples])
        for split, examples in splits.items()
    }


def pubmedqa(data_dir: str, **_: object) -> dict[str, Dataset]:
    """Split test: the abstracts that test_ground_truth.json names, in its order; train: the others."""
    folder = Path(data_dir) / "pubmedqa"
    abstracts = _read_object(folder / "ori_pqal.json", _ABSTRACT)
    truth = _read_object(folder / "test_ground_truth.json", _DECISION)
    for name, decision in truth.items():
        if name not in abstracts:
            raise UserError(f"{folder / 'test_ground_truth.json'}, {name}: ori_pqal.json has no such abstract.")
        if abstracts[name]["final_decision"] != decision:
            raise UserError(f"{folder / 'ori_pqal.json'}, {name}: final_decision and test_ground_truth.json differ.")
    examples = {name: {column: abstract[column] for column in _ABSTRACT} for name, abstract in abstracts.items()}
    splits = {"test": truth, "train": [name for name in examples if name not in truth]}
    return {split: Dataset.from_list([examples[name] for name in names]) for split, names in splits.items()}


def read_entries(path: Path, shape: dict, check: Callable[[dict], str | None] = lambda entry: None) -> list[dict]:
    """The objects of a .jsonl file, or of the same with .gz, all of a shape, and with no problem that `check` names.

    Raises UserError naming the file, the line and the problem.
    """
    entries = []
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is not JSON ({error}).") from error
        if problem := misfit(entry, shape) or check(entry):
            raise UserError(f"{path}, line {number}: {problem}.")
        entries.append(entry)
    if not entries:
        raise UserError(f"{path}: is empty.")
    return entries


def _read_object(path: Path, shape: object) -> dict:
    """A JSON file that is one object, whose values are of a shape."""
    try:
        content = json.loads("".join(_read_lines(path)))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
    if problem := misfit(content, Each(shape)) or (None if content else "is empty"):
        raise UserError(f"{path}: {problem}.")
    return content


def _read_lines(path: Path) -> list[str]:
    """The lines of a file, or of the same with .gz."""
    found = path if path.is_file() else path.with_name(f"{path.name}.gz")
    opened = gzip.open if found.suffix == ".gz" else open
    try:
        with opened(found, "rt", encoding="utf-8") as file:
            return list(file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; docs/evaluation.md says where it comes from.") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{found}: cannot be read ({error}).") from error
