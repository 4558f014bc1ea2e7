"""Sources of examples: files, folders, the hub; samples of them, and weights.

Each source becomes a dataset, of turns or of rows for TRL, in the cache of `datasets` on disk, where the other ranks of
a host find it. It contains invalid examples too, each with its problem, file and line, so that all of them are counted
and reported.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Json, List, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from pyarrow.lib import ArrowException

from lisa_dist.data import formats, readers
from lisa_dist.data.formats import FORMATS, ExampleError
from lisa_dist.data.readers import ORIGIN, PROBLEM, SUFFIXES
from lisa_dist.errors import UserError
from lisa_dist.tasks import GRPO, KTO, TASKS, tasks_for
from lisa_dist.text import in_one_line

_VERSION = 6  # increase it with any change of what an example becomes: older caches are then not used
# Tool calls have arguments of any kind.
_FEATURES = Features({"turns": List(Json()), "tools": Json(), ORIGIN: Value("string"), PROBLEM: Value("string")})
_WITH_IMAGES = Features({**_FEATURES, "images": List(Image())})
# What datasets takes for a way to read whatever lies in the current folder.
_KINDS_OF_FILES = ("arrow", "csv", "json", "pandas", "parquet", "sql", "text", "webdataset", "xml")
_MOST_COUNTED = 10**6  # rows


@dataclass(frozen=True)
class Source:
    """One source, as `--dataset_name` and the flags around it describe it."""

    name: str
    flag: str = "--dataset_name"
    format: str | None = None  # None: recognized by its columns
    columns: tuple[tuple[str, str], ...] = ()  # (name in the format, name in the data)
    weight: float = 1.0
    config: str | None = None  # of a hub dataset
    split: str = "train"

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"--dataset_format {self.format}: unknown; choose one of {', '.join(FORMATS)}.")
        if not self.weight > 0:
            raise UserError(f"--dataset_weights {self.weight:g} of {self.name}: must be above 0.")

    @property
    def label(self) -> str:
        """The flag and its value, for messages."""
        return f"{self.flag} {in_one_line(self.name)}"

    def renamed(self, columns: Iterable[str]) -> list[str]:
        """Columns by their names in the format."""
        names = {old: new for new, old in self.columns}
        return [names.get(column, column) for column in columns]


def load_source(
    source: Source, skip_invalid: bool, seed: int, convert: Callable[[Source, dict[str, Any]], tuple[Dataset, str]]
) -> tuple[Dataset, str]:
    """The valid examples of a source, sampled, with their ORIGIN; and a line of them.

    `convert` makes a dataset of what `open_source` gives, and describes its columns. Raises UserError naming the file,
    the line and the rule: for a source that cannot be read, and for invalid examples unless `skip_invalid`.
    """
    examples, columns = convert(source, open_source(source))
    name, sample_size = _split_sample_size(source)
    valid, whys, skipped = examples.remove_columns(PROBLEM), list(examples[PROBLEM]), ""
    if any(whys):
        problems = [f"{origin} {why}" for origin, why in zip(examples[ORIGIN], whys, strict=True) if why]
        if not skip_invalid:
            formats.refuse_examples(problems, len(examples), source.label)
        valid = valid.select([index for index, why in enumerate(whys) if not why])
        skipped = f", {len(problems)} invalid ones skipped, such as {problems[0]}"
    if not len(valid):
        raise UserError(f"{source.label}: none of {len(examples)} examples can be used.")
    description = f"{name}: {columns}, {len(valid)} examples{skipped}"
    if sample_size is not None:
        if sample_size > len(valid):
            raise UserError(f"{source.label}: has only {len(valid)} examples.")
        valid = _sample(valid, sample_size, random.Random(f"{seed} {source.name}"))
        description += f", {sample_size} of them sampled by --seed {seed}"
    return valid, description


def load_turns(source: Source, skip_invalid: bool, seed: int, with_images: bool = False) -> tuple[Dataset, str]:
    """The valid examples of a source, with the columns turns, tools and ORIGIN; and a line of them.

    `with_images`: they have a column images too, and those that have none, or no turns, are invalid.
    """
    return load_source(source, skip_invalid, seed, partial(_convert, with_images=with_images))


def apply_weight(examples: Dataset, source: Source, seed: int) -> Dataset:
    """Repeat or sample the examples by the weight of their source. Raises UserError if none is left."""
    if not len(examples):
        return examples
    repeats, rest = divmod(round(source.weight * len(examples)), len(examples))
    if not repeats and not rest:
        raise UserError(
            f"--dataset_weights {source.weight:g} of {source.name}: leaves none of {len(examples)} examples."
        )
    sampled = [_sample(examples, rest, random.Random(f"{seed} {source.name} weight"))] if rest else []
    return examples if (repeats, rest) == (1, 0) else concatenate_datasets([examples] * repeats + sampled)


def _sample(examples: Dataset, number: int, generator: random.Random) -> Dataset:
    return examples.select(sorted(generator.sample(range(len(examples)), number)))


def _split_sample_size(source: Source) -> tuple[str, int | None]:
    """The name and the number of `name#1000`; the number is None if there is none."""
    name, mark, number = source.name.rpartition("#")
    if not mark or Path(source.name).exists():
        return source.name, None
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", number):
        raise UserError(f"{source.label}: give a number of examples after #, such as {name}#1000.")
    return name, int(number)


def count_rows(name: str) -> int | None:
    """Return the number of rows of a local file, or as many as `name#1000` says.

    None for what is no such file, for texts, which become several examples, and for more rows than a plan needs.
    """
    base, _, number = name.rpartition("#")
    file = Path(name)
    if base and number.isdecimal() and not file.exists():
        return int(number)
    if not file.is_file() or readers.suffix_of(file) not in {*SUFFIXES} - {".txt"}:
        return None
    rows = sum(example is not None for _, example, _ in islice(readers.read_file(file, name), _MOST_COUNTED))
    return rows if rows < _MOST_COUNTED else None


def open_source(source: Source, streaming: bool = False) -> dict[str, Any]:
    """The rows of a source, for `read_rows`: a table, or files with what changes when they do, as keys of the cache."""
    try:
        opened = _open(source, _split_sample_size(source)[0], streaming)
        if not isinstance(opened, list):
            return {"label": source.label, "table": opened}
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in opened]
        return {"label": source.label, "files": files}
    except OSError as error:  # of a path that cannot be looked at; what is in files has errors of its own
        raise UserError(f"{source.label}: cannot be read ({error.strerror or error}).") from error


def _open(source: Source, name: str, streaming: bool) -> Any:
    path = Path(name)
    if any((path / file).exists() for file in readers.OF_SAVED_DATASETS):
        saved = load_from_disk(name)
        if isinstance(saved, Dataset):
            return saved
        if source.split not in saved:
            raise UserError(f"{source.label}: has no split {source.split}; it has {', '.join(saved)}.")
        return saved[source.split]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if readers.suffix_of(file) in SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{source.label}: the folder contains no file of {', '.join(SUFFIXES)}.")
        return files
    if path.exists() and not path.is_file():  # to open a pipe, or to read a device, may take forever
        raise UserError(f"{source.label}: is neither a file nor a folder, but a pipe or a device.")
    if readers.suffix_of(path) in SUFFIXES:
        if not path.exists():
            raise UserError(f"{source.label}: no such file.")
        return [path]
    if path.exists():
        raise UserError(
            f"{source.label}: unknown kind of file; give one of {', '.join(SUFFIXES)}, or a folder of them."
        )
    if name in _KINDS_OF_FILES:
        raise UserError(f"{source.label}: a kind of file and no name of a dataset; give the file itself.")
    try:
        return load_dataset(name, source.config, split=source.split, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{source.label}: no such file or folder, and no dataset of that name on the hub can be reached "
            f"({type(error).__name__})."
        ) from error
    except ValueError as error:  # an unknown split or configuration
        raise UserError(f"{source.label}: {error}") from error


def read_rows(rows: Mapping[str, Any]) -> Iterator[tuple[str, str, dict | None, str | None]]:
    """Each row: its file, where it is, the row, and why it cannot be read: one of the last two is None."""
    if "table" in rows:
        for number, row in enumerate(rows["table"], start=1):
            yield "", f"row {number}", row, None
        return
    for path, *_ in rows["files"]:
        for place, row, problem in readers.read_file(Path(path), rows["label"]):
            yield path, f"{path}, {place}", row, problem


def first_row(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The first row that can be read. Raises UserError, with the last problem, if there is none."""
    problem = "it is empty"
    for path, origin, row, why in read_rows(rows):
        if row is not None:
            return row
        problem = f"{origin.removeprefix(f'{path}, ')} {why}"
    raise UserError(f"{rows['label']}: contains no example that can be read: {problem}.")


def _convert(source: Source, rows: dict[str, Any], with_images: bool) -> tuple[Dataset, str]:
    convert, columns = recognize(source, rows, with_images)
    arguments = {"version": _VERSION, "rows": rows} | convert
    return generate(_entries, arguments, _WITH_IMAGES if with_images else _FEATURES), columns


def recognize(source: Source, rows: dict[str, Any], with_images: bool = False) -> tuple[dict[str, Any], str]:
    """What `entry_of` is to be given for the rows of a source, by the first of them; and a line about its columns."""
    first = first_row(rows)
    if not source.columns and source.format is None:
        source = replace(source, columns=formats.columns_of_format(first))
    format_name = _choose_format(source, list(first), first.get("label"))
    columns = formats.describe_columns(format_name, source.renamed(first), readers.IMAGE_COLUMNS if with_images else ())
    return {"format_name": format_name, "columns": source.columns, "with_images": with_images}, columns


def _choose_format(source: Source, columns: Sequence[str], label: Any = None) -> str:
    """The format of a source with these columns, whose first example has this label."""
    missing = [name for _, name in source.columns if name not in columns]
    if missing:
        raise UserError(
            f"--dataset_columns: {source.name} has no {', '.join(missing)}; its columns are {', '.join(columns)}."
        )
    if source.format is None and isinstance(label, bool) and {*source.renamed(columns)} >= {*TASKS[KTO].columns[0]}:
        raise UserError(
            f"{source.label}: its rows have a label that says which completions are wanted: give --task {KTO}, or "
            "--dataset_format prompt_completion to train on them all."
        )
    format_name = source.format or formats.detect(source.renamed(columns))
    if format_name is None:
        serves = [task for task in tasks_for(columns) if task != GRPO]  # grpo takes any row with a prompt
        hint = f" Such rows are for --task {' or '.join(serves)}." if serves else ""
        known = "; ".join(f"{name} ({', '.join(required)})" for name, (required, *_) in FORMATS.items())
        raise UserError(
            f"{source.label}: its columns {', '.join(columns)} are those of no format. Formats are {known}. Rename "
            f"columns with --dataset_columns, such as question=QUESTION answer=LONG_ANSWER.{hint}"
        )
    return format_name


def generate(function: Callable[..., Iterator[dict]], arguments: dict, features: Features | None) -> Dataset:
    """The rows that a generator gives for these arguments, in the cache. Raises UserError for what it refuses.

    Without `features` they are those of the first rows, and all others must have them.
    """
    label = arguments["rows"]["label"]
    try:
        return Dataset.from_generator(function, gen_kwargs=arguments, features=features)
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, OSError):
            raise UserError(
                f"{label}: its rows cannot be cached ({cause.strerror or cause}); make room in the cache of datasets, "
                "or set HF_DATASETS_CACHE."
            ) from error
        if not isinstance(cause, TypeError | ValueError | ArrowException):  # of the writer
            raise
        raise UserError(
            f"{label}: a column has values of several kinds ({in_one_line(cause)}); leave it out, or give it one kind."
        ) from error


def dataset_of(entries: list[dict[str, Any]]) -> Dataset:
    """Valid entries as `load_turns` has them."""
    return Dataset.from_list(entries, features=_FEATURES).remove_columns(PROBLEM)


def _entries(version: int, rows: Mapping[str, Any], **convert: Any) -> Iterator[dict]:
    for row in read_rows(rows):
        yield entry_of(*row, **convert)


def entry_of(
    path: str,
    origin: str,
    row: dict | None,
    problem: str | None,
    format_name: str,
    columns: Iterable[Sequence[str]],
    with_images: bool,
) -> dict[str, Any]:
    """Of what `read_rows` gives the turns of the example, and its images, or none and its problem."""
    entry: dict[str, Any] = {"turns": [], "tools": None, ORIGIN: origin, PROBLEM: problem}
    if with_images:
        entry["images"] = []
    try:
        if row is not None:
            row = {**row, **{name: row.get(column) for name, column in columns}}
            found: dict[str, Any] = {
                "turns": formats.to_turns(row, format_name),
                "tools": formats.tools_of(row, format_name),
            }
            if with_images:
                _check_beside_images(**found)
                found["images"] = readers.images_of(row, Path(path).parent)
            "".join(turn["content"] for turn in found["turns"]).encode()
            entry |= found
    except ExampleError as error:
        entry[PROBLEM] = str(error)
    except UnicodeEncodeError:
        entry[PROBLEM] = "has half of a character (a lone surrogate)"
    return entry


def _check_beside_images(turns: list[dict[str, Any]], tools: Any) -> None:
    if tools or any("tool_calls" in turn for turn in turns):
        raise ExampleError("has tools or tool calls beside images; leave one of them out")
    roles = [turn["role"] for turn in turns]
    if roles[0] == "text":
        raise ExampleError("has images beside a text; give a question and an answer, or turns")
    last = max((place for place, role in enumerate(roles) if role in ("assistant", "completion")), default=0)
    if not {"user", "prompt"}.intersection(roles[:last]):
        raise ExampleError("has images and no question before its last answer, where they would stand")
