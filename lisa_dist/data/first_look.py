"""A first look at the data of a run, before torch is imported: files that are not there, rows that cannot serve.

What it lets pass is looked at as a whole when the run begins.
"""

import contextlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lisa_dist.data.formats import refuse_examples
from lisa_dist.data.readers import OF_SAVED_DATASETS, SUFFIXES, read_file, suffix_of
from lisa_dist.data.row_rules import RowRules, why_not_of_columns, why_not_of_sft
from lisa_dist.errors import UserError
from lisa_dist.tasks import SFT, check_rewards_given, check_task, refuse_flags_of_sft
from lisa_dist.text import in_one_line

_ROWS, _FILES = 200, 3  # of each file; of a folder


def look_at_data(given: Mapping[str, Any]) -> None:
    """Raise UserError for flags of a run whose files cannot serve it."""
    task = check_task(given.get("task", SFT))
    if task != SFT:
        refuse_flags_of_sft(task, given)
    check_rewards_given(task, _listed(given.get("reward_funcs")))
    for flag in ("dataset_name", "eval_dataset_name"):
        for name in _listed(given.get(flag)):
            with contextlib.suppress(OSError):  # a path that cannot be looked at: the run says why
                _look_at(name, f"--{flag} {in_one_line(name)}", task, given)


def _look_at(name: str, label: str, task: str, given: Mapping[str, Any]) -> None:
    path = Path(name if Path(name).exists() else name.rpartition("#")[0] or name)
    if suffix_of(path) not in SUFFIXES and not path.is_dir():  # a name of the hub
        return
    if any((path / name).exists() for name in OF_SAVED_DATASETS):  # whose tables are no text
        return
    if not path.exists():
        raise UserError(f"{label}: no such file.")
    if given.get("dataset_format" if task == SFT else "skip_bad_rows"):
        return
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if suffix_of(one) in SUFFIXES)
    pairs = _pairs(given.get("dataset_columns"))
    for file in files[:_FILES]:
        if task == SFT:
            _look_at_columns(file, label, pairs)
        else:
            _look_at_rows(file, label, task, pairs)


def _look_at_columns(path: Path, label: str, pairs: list[tuple[str, str]]) -> None:
    """Of examples the first row: the run reads the others, and says what is wrong with each."""
    first = next((row for _, row, _ in itertools.islice(read_file(path, label), _ROWS) if row is not None), None)
    if first is not None and (why := why_not_of_sft(list(first), pairs, first.get("label"))):
        raise UserError(f"{label}: {why}")


def _look_at_rows(path: Path, label: str, task: str, pairs: list[tuple[str, str]]) -> None:
    rules, problems, looked_at = RowRules(task, pairs), [], 0
    for origin, row, problem in itertools.islice(read_file(path, label), _ROWS):
        if row is not None:
            if not looked_at and (why := why_not_of_columns(task, list(row), pairs)):
                raise UserError(f"{label}: {why}")
            _, problem = rules.checked(row)
        looked_at += 1
        if problem:
            problems.append(f"{path}, {origin} {problem}")
    if problems:
        refuse_examples(problems, len(problems), looked_at, label)


def _listed(value: Any) -> list[str]:
    """What several words give, or a recipe's text, which may have blanks."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _pairs(value: Any) -> list[tuple[str, str]]:
    """The names of `--dataset_columns`; what is no pair of them the run refuses."""
    words = value.split() if isinstance(value, str) else value or []
    return [(name, column) for word in words for name, _, column in [word.partition("=")] if name and column]
