"""Where rows come from: files, folders, the hub; several of them, samples, weights.

Each source becomes a dataset of turns, on disk in the cache of `datasets`, which the other ranks of a host find there.
A row that breaks a rule is in it with its problem, file and number, so that all of them can be counted and told.
"""

import csv
import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from lisa_dist.config import UserError
from lisa_dist.data.formats import FORMATS, RowError, describe_columns, detect, refuse_rows, to_turns

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")  # and each of them with .gz, but parquet
_VERSION = 1  # another one for any change of what becomes of a row: caches of others are not taken
_FEATURES = Features(
    {
        "turns": List({"role": Value("string"), "content": Value("string")}),
        "origin": Value("string"),
        "problem": Value("string"),
    }
)


@dataclass(frozen=True)
class Source:
    """What `--dataset_name` and its fellows say of one source."""

    name: str
    flag: str = "--dataset_name"
    format: str | None = None  # by its columns
    columns: tuple[tuple[str, str], ...] = ()  # (what the format calls it, what the rows call it)
    weight: float = 1.0
    config: str | None = None  # of a hub dataset
    split: str = "train"

    def __post_init__(self):
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"--dataset_format {self.format}: unknown; choose one of {', '.join(FORMATS)}.")
        if not self.weight > 0:
            raise UserError(f"--dataset_weights {self.weight:g} of {self.name}: must be above 0.")

    @property
    def said(self) -> str:
        return f"{self.flag} {self.name}"

    def renamed(self, columns: Iterable[str]) -> list[str]:
        """Columns by the names that a format knows."""
        names = {old: new for new, old in self.columns}
        return [names.get(column, column) for column in columns]


def load_turns(source: Source, skip_bad_rows: bool, seed: int) -> tuple[Dataset, str]:
    """The good rows of a source, sampled, with the columns turns and origin; and a line about them.

    Raises UserError naming the file, the row and the rule: for what is no data, and for bad rows that are not skipped.
    """
    name, wanted = _split_sample(source)
    rows, columns = _convert(source, name)
    bad = [index for index, problem in enumerate(rows["problem"]) if problem]
    if bad and not skip_bad_rows:
        refuse_rows(
            (f"{rows[index]['origin']} {rows[index]['problem']}" for index in bad), len(bad), len(rows), source.said
        )
    good = rows.remove_columns("problem")
    if bad:
        left_out = set(bad)
        good = good.select([index for index in range(len(rows)) if index not in left_out])
    if not len(good):
        raise UserError(f"{source.said}: no row is left of {len(rows)}.")
    told = f"{name}: {columns}, {len(good)} rows"
    if bad:
        told += f", {len(bad)} bad ones left out, such as {rows[bad[0]]['origin']} {rows[bad[0]]['problem']}"
    if wanted is not None:
        if wanted > len(good):
            raise UserError(f"{source.said}: has only {len(good)} rows.")
        good = _sample(good, wanted, random.Random(f"{seed} {source.name}"))
        told += f", {wanted} of them drawn by --seed {seed}"
    return good, told


def weigh(rows: Dataset, source: Source, seed: int) -> Dataset:
    """As many times the rows as the weight of their source says. Raises UserError where it leaves none."""
    whole, part = divmod(round(source.weight * len(rows)), len(rows))
    if not whole and not part:
        raise UserError(f"--dataset_weights {source.weight:g} of {source.name}: leaves none of {len(rows)} rows.")
    drawn = [_sample(rows, part, random.Random(f"{seed} {source.name} weight"))] if part else []
    return rows if (whole, part) == (1, 0) else concatenate_datasets([rows] * whole + drawn)


def _split_sample(source: Source) -> tuple[str, int | None]:
    """`name#1000`: the name and the number, which is None where there is none."""
    name, mark, number = source.name.rpartition("#")
    if not mark or Path(source.name).exists():
        return source.name, None
    if not number.isdigit() or int(number) == 0:
        raise UserError(f"{source.said}: after # comes a number of rows, such as {name}#1000.")
    return name, int(number)


def _sample(rows: Dataset, number: int, generator: random.Random) -> Dataset:
    return rows.select(sorted(generator.sample(range(len(rows)), number)))


def _convert(source: Source, name: str) -> tuple[Dataset, str]:
    """All rows of a source as turns, and what is said of their format."""
    path = Path(name)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():  # of save_to_disk
        saved = load_from_disk(name)
        if isinstance(saved, Mapping) and source.split not in saved:
            raise UserError(f"{source.said}: has no split {source.split}; it has {', '.join(saved)}.")
        rows = saved[source.split] if isinstance(saved, Mapping) else saved
        return _convert_table(source, rows)
    if path.exists() or _suffix(path) in SUFFIXES:
        return _convert_files(source, _files(source, path))
    try:
        rows = load_dataset(name, source.config, split=source.split)
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{source.said}: no such file or folder, and no dataset of that name on the hub can be reached "
            f"({type(error).__name__})."
        ) from error
    except ValueError as error:  # of a split or a config that it has not
        raise UserError(f"{source.said}: {error}") from error
    return _convert_table(source, rows)


def _convert_files(source: Source, files: list[Path]) -> tuple[Dataset, str]:
    problem, first = "it is empty", None
    for path in files:
        for origin, row, found in _read(path, source.said):
            if row is not None:
                first = row
                break
            problem = f"{origin} {found}"
        if first is not None:
            break
    else:
        raise UserError(f"{source.said}: holds no row that can be read: {problem}.")
    format_name = _format(source, list(first))
    # Size and time are for the cache: a file that was changed is read anew.
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    arguments = {
        "version": _VERSION,
        "stamps": stamps,
        "said": source.said,
        "format_name": format_name,
        "columns": source.columns,
    }
    return _generate(_turns_of_files, arguments), describe_columns(format_name, source.renamed(first))


def _convert_table(source: Source, rows: Dataset) -> tuple[Dataset, str]:
    format_name = _format(source, rows.column_names)
    arguments = {"version": _VERSION, "rows": rows, "format_name": format_name, "columns": source.columns}
    columns = source.renamed(rows.column_names)
    return _generate(_turns_of_table, arguments), describe_columns(format_name, columns)


def _format(source: Source, columns: Sequence[str]) -> str:
    renamed = {old: new for new, old in source.columns}
    missing = [old for old in renamed if old not in columns]
    if missing:
        raise UserError(
            f"--dataset_columns: {source.name} has no {', '.join(missing)}; its columns are {', '.join(columns)}."
        )
    found = source.format or detect(source.renamed(columns))
    if found is None:
        formats = "; ".join(f"{name} ({', '.join(needed)})" for name, (needed, _) in FORMATS.items())
        raise UserError(
            f"{source.said}: has the columns {', '.join(columns)}; needed are those of one format: {formats}. "
            "Say what is what with --dataset_columns, such as question=QUESTION answer=LONG_ANSWER."
        )
    return found


def _generate(function, arguments: dict) -> Dataset:
    try:
        return Dataset.from_generator(function, gen_kwargs=arguments, features=_FEATURES)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _turns_of_files(version: int, stamps: list[tuple], said: str, format_name: str, columns: tuple) -> Iterator[dict]:
    for path, *_ in stamps:
        for origin, row, problem in _read(Path(path), said):
            yield _checked(f"{path}, {origin}", row, problem, format_name, columns)


def _turns_of_table(version: int, rows: Dataset, format_name: str, columns: tuple) -> Iterator[dict]:
    for number, row in enumerate(rows, start=1):
        yield _checked(f"row {number}", row, None, format_name, columns)


def _checked(origin: str, row: Mapping | None, problem: str | None, format_name: str, columns: tuple) -> dict:
    turns = []
    if problem is None:
        row = {**row, **{new: row.get(old) for new, old in columns}}
        try:
            turns = to_turns(row, format_name)
            for turn in turns:
                turn["content"].encode()
        except RowError as error:
            problem = str(error)
        except UnicodeEncodeError:
            turns, problem = [], "has half of a character (a lone surrogate)"
    return {"turns": turns, "origin": origin, "problem": problem or ""}


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _files(source: Source, path: Path) -> list[Path]:
    """The file, or all that can be read in a folder, in the order of their names."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{source.said}: no such file.")
        if _suffix(path) not in SUFFIXES:
            raise UserError(
                f"{source.said}: cannot tell what it is; known are {', '.join(SUFFIXES)}, and a folder of them."
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if _suffix(file) in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{source.said}: the folder holds none of {', '.join(SUFFIXES)}.")
    return files


def _read(path: Path, said: str) -> Iterator[tuple[str, dict | None, str | None]]:
    """Of each row of a file: where it is, its columns, and what is wrong if it cannot be read."""
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path)
        elif suffix == ".json":
            yield from _read_json(path, said)
        else:
            yield from {".jsonl": _read_jsonl, ".txt": _read_txt}.get(suffix, _read_csv)(path)
    except (OSError, EOFError, zlib.error, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"{said}: {path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _lines(path: Path, blank: bool = False) -> Iterator[tuple[int, str | None]]:
    """Numbers and texts of lines, blank ones only if wanted; None for one that is not UTF-8.

    Only line feeds end a line: JSON strings may hold other characters that Python takes for line ends.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                yield number, None
            else:
                if blank or text.strip():
                    yield number, text


_NOT_UTF8 = "is not UTF-8"
_MARK = "\ufdd0"  # no character, and csv of every Python takes it


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict | None, str | None]]:
    for number, line in _lines(path):
        origin = f"line {number}"
        if line is None:
            yield origin, None, _NOT_UTF8
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield origin, None, f"is not JSON ({error})"
            continue
        yield _object(origin, row)


def _object(origin: str, row: object) -> tuple[str, dict | None, str | None]:
    if isinstance(row, dict):
        return origin, row, None
    return origin, None, f"is {type(row).__name__}, not an object"


def _read_json(path: Path, said: str) -> Iterator[tuple[str, dict | None, str | None]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        raw = file.read()
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{said}: {path}, line {line} {_NOT_UTF8}.") from error
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # an object a line, whatever the name says
            yield from _read_jsonl(path)
            return
        raise UserError(f"{said}: {path} is not JSON ({error}).") from error
    if isinstance(rows, dict):
        raise UserError(
            f"{said}: {path} is one object with the keys {', '.join(list(rows)[:3])}, ...; needed is a list of "
            "objects, or an object a line."
        )
    if not isinstance(rows, list):
        raise UserError(f"{said}: {path} is {type(rows).__name__}; needed is a list of objects.")
    for number, row in enumerate(rows, start=1):
        yield _object(f"row {number}", row)


def _read_csv(path: Path) -> Iterator[tuple[str, dict | None, str | None]]:
    csv.field_size_limit(2**31 - 1)
    texts = (line if line is not None else _MARK for _, line in _lines(path, blank=True))
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    reader = csv.DictReader((f"{text}\n" for text in texts), delimiter=delimiter, strict=True)
    for number, row in enumerate(reader, start=1):
        origin = f"row {number}"
        if any(_MARK in str(value) for value in row.values()):
            yield origin, None, _NOT_UTF8
        elif None in row or None in row.values():
            yield origin, None, f"has not the {len(reader.fieldnames)} fields of the first line"
        else:
            yield origin, row, None


def _read_txt(path: Path) -> Iterator[tuple[str, dict | None, str | None]]:
    for number, line in _lines(path):
        row = None if line is None else {"text": line}
        yield f"line {number}", row, _NOT_UTF8 if line is None else None


def _read_parquet(path: Path) -> Iterator[tuple[str, dict | None, str | None]]:
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row, None
