"""Examples of the benchmarks from the user's files, with the columns of the stock tasks, for `eval_tasks/*.yaml`.

Every example is checked before a model is loaded: one without an answer would count as a wrong answer of the model.
Formats are those of the benchmarks' own repositories; docs/evaluation.md says where each file comes from.
"""

import functools
import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from datasets import Dataset

from lisa_dist.errors import UserError

_LETTERS = "ABCDEFGHIJ"
_DECISIONS = ("yes", "no", "maybe")


def gsm8k(data_dir: str, **_: object) -> dict[str, Dataset]:
    """Splits train, for few-shot examples, and test, with the columns `question` and `answer`."""
    return {
        split: Dataset.from_list(read_entries(Path(data_dir) / "gsm8k" / f"{split}.jsonl", _check_gsm8k))
        for split in ("train", "test")
    }


def mmlu(data_dir: str, subject: str, **_: object) -> dict[str, Dataset]:
    """Splits dev, for few-shot examples, and test of one subject: `question`, four `choices`, index of the `answer`."""
    splits = {}
    for split in ("dev", "test"):
        path = Path(data_dir) / "mmlu" / f"{split}.jsonl"
        examples = [entry for entry in read_entries(path, _check_mmlu) if entry["subject"] == subject]
        if not examples:
            raise UserError(f"--data_dir {data_dir}: {path.name} of mmlu has no example with subject {subject}.")
        splits[split] = Dataset.from_list(examples)
    return splits


def agieval(data_dir: str, file: str, **_: object) -> dict[str, Dataset]:
    """Split test of one set: AGIEval's zero-shot prompt as `query`, `choices`, and `gold`, a list of indices."""
    examples = []
    for entry in read_entries(Path(data_dir) / "agieval" / f"{file}.jsonl", _check_agieval):
        options = entry["options"]
        query = f"{entry.get('passage') or ''}Q: {entry['question']} Answer Choices: {' '.join(options)}\n"
        query += f"A: Among A through {_LETTERS[len(options) - 1]}, the answer is"
        examples.append({"query": query, "choices": options, "gold": [_LETTERS.index(entry["label"])]})
    return {"test": Dataset.from_list(examples)}


def winogrande(data_dir: str, **_: object) -> dict[str, Dataset]:
    """Splits validation, and train for few-shot examples, which is empty without its file."""
    folder, columns = Path(data_dir) / "winogrande", ("sentence", "option1", "option2", "answer")
    splits = {"validation": read_entries(folder / "dev.jsonl", _check_winogrande), "train": []}
    if find_file(folder / "train_xl.jsonl"):
        splits["train"] = read_entries(folder / "train_xl.jsonl", _check_winogrande)
    return {
        split: Dataset.from_list([{name: example[name] for name in columns} for example in examples])
        for split, examples in splits.items()
    }


def pubmedqa(data_dir: str, **_: object) -> dict[str, Dataset]:
    """Split test: the abstracts that test_ground_truth.json names, in its order; train: the others."""
    folder = Path(data_dir) / "pubmedqa"
    abstracts, truth = (_read_object(folder / name) for name in ("ori_pqal.json", "test_ground_truth.json"))
    for name, decision in truth.items():
        place = f"{folder / 'test_ground_truth.json'}, {name}"
        if decision not in _DECISIONS:
            raise UserError(f"{place}: the answer must be yes, no or maybe, not {decision!r}.")
        if name not in abstracts:
            raise UserError(f"{place}: ori_pqal.json has no such abstract.")
    splits: dict[str, list[dict]] = {"test": [], "train": []}
    for name in [*truth, *(name for name in abstracts if name not in truth)]:
        abstract = abstracts[name]
        problem = _check_pubmedqa(abstract)
        if problem is None and abstract["final_decision"] != truth.get(name, abstract["final_decision"]):
            problem = "final_decision and test_ground_truth.json differ"
        if problem is not None:
            raise UserError(f"{folder / 'ori_pqal.json'}, {name}: {problem}.")
        example = {column: abstract[column] for column in ("QUESTION", "CONTEXTS", "final_decision")}
        splits["test" if name in truth else "train"].append(example)
    return {split: Dataset.from_list(examples) for split, examples in splits.items()}


def find_file(path: Path) -> Path | None:
    """The file, or the same with .gz; None where there is neither."""
    return next(filter(Path.is_file, (path, path.with_name(f"{path.name}.gz"))), None)


@functools.cache
def read_entries(path: Path, check: Callable[[dict], str | None]) -> list[dict]:
    """The objects of a .jsonl file, or of the same with .gz, for none of which `check` names a problem.

    Raises UserError naming the file, the line and the problem.
    """
    found = find_file(path)
    if found is None:
        raise UserError(f"{path}: no such file; docs/evaluation.md says where it comes from.")
    entries = []
    for number, line in enumerate(_lines(found), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{found}, line {number}: is not JSON ({error}).") from error
        problem = check(entry) if isinstance(entry, dict) else "must be an object"
        if problem is not None:
            raise UserError(f"{found}, line {number}: {problem}.")
        entries.append(entry)
    if not entries:
        raise UserError(f"{found}: is empty.")
    return entries


def check_texts(entry: Mapping[str, object], *names: str) -> str | None:
    """A problem if one of these fields is missing, is not text, or is blank."""
    for name in names:
        value = entry.get(name)
        if not isinstance(value, str) or not value.strip():
            return f"{name} {'is missing' if value is None else 'must be text that is not empty'}"
    return None


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            yield from file
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error


def _read_object(path: Path) -> dict:
    """A JSON file that is one object and not empty."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; docs/evaluation.md says where it comes from.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: must be an object with an entry for each abstract.")
    return content


def _check_gsm8k(entry: dict) -> str | None:
    problem = check_texts(entry, "question", "answer")
    if problem is None and not re.search(r"#### *-?[\d$.,]*\d", entry["answer"]):
        return "answer must end with #### and the number"
    return problem


def _check_mmlu(entry: dict) -> str | None:
    problem, choices, answer = check_texts(entry, "subject", "question"), entry.get("choices"), entry.get("answer")
    if problem is None and not _are_texts(choices, 4):
        return "choices must be four texts"
    if problem is None and (type(answer) is not int or not 0 <= answer <= 3):
        return (
            "answer is missing" if answer is None else f"answer must be the index of a choice, 0 to 3, not {answer!r}"
        )
    return problem


def _check_agieval(entry: dict) -> str | None:
    problem, options, label = check_texts(entry, "question"), entry.get("options"), entry.get("label")
    if problem is not None:
        return problem
    if not isinstance(options, list) or not _are_texts(options) or not 2 <= len(options) <= len(_LETTERS):
        return "options must be texts, two or more"
    if not isinstance(label, str) or label not in [*_LETTERS[: len(options)]]:
        return "label is missing" if label is None else f"label must be the letter of an option, not {label!r}"
    return None


def _check_winogrande(entry: dict) -> str | None:
    problem = check_texts(entry, "sentence", "option1", "option2", "answer")
    if problem is None and "_" not in entry["sentence"]:
        return "sentence must have a _ in the place of the word"
    if problem is None and entry["answer"] not in ("1", "2"):
        return f"answer must be 1 or 2, not {entry['answer']!r}"
    return problem


def _check_pubmedqa(entry: object) -> str | None:
    if not isinstance(entry, dict):
        return "must be an object"
    problem = check_texts(entry, "QUESTION", "final_decision")
    if problem is None and not (_are_texts(entry.get("CONTEXTS")) and entry["CONTEXTS"]):
        return "CONTEXTS must be texts, one or more"
    if problem is None and entry["final_decision"] not in _DECISIONS:
        return f"final_decision must be yes, no or maybe, not {entry['final_decision']!r}"
    return problem


def _are_texts(value: object, number: int | None = None) -> bool:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        return False
    return number in (None, len(value))
