"""Sources of examples: files, folders, the hub; samples of them, and weights.

Each source becomes a dataset of turns in the cache of `datasets` on disk, where the other ranks of a host find it. It
contains invalid examples too, each with its problem, file and line, so that all of them are counted and reported.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Json, List, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from lisa_dist.data.formats import (
    FORMATS,
    ExampleError,
    columns_of_format,
    describe_columns,
    detect,
    refuse_examples,
    to_turns,
    tools_of,
)
from lisa_dist.data.images import COLUMNS, images_of
from lisa_dist.data.readers import OF_SAVED_DATASETS, SUFFIXES, read_file, suffix_of
from lisa_dist.data.row_rules import hint_of_tasks
from lisa_dist.errors import UserError
from lisa_dist.tasks import KTO, TASKS
from lisa_dist.text import in_one_line

_VERSION = 5  # increase it with any change of what an example becomes: older caches are then not used
_FEATURES = Features(
    {
        "turns": List(Json()),  # tool calls have arguments of any kind
        "tools": Json(),
        "origin": Value("string"),
        "problem": Value("string"),
    }
)
_WITH_IMAGES = Features({**_FEATURES, "images": List(Image())})

# What datasets takes for a way to read whatever lies in the current folder.
_KINDS_OF_FILES = ("arrow", "csv", "json", "pandas", "parquet", "sql", "text", "webdataset", "xml")


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

    def fitted(self, columns: Iterable[str]) -> "Source":
        """The same, with the columns of a format found by another case or by synonyms, if none are given."""
        if self.columns or self.format is not None:
            return self
        return replace(self, columns=columns_of_format(columns))

    def renamed(self, columns: Iterable[str]) -> list[str]:
        """Columns by their names in the format."""
        names = {old: new for new, old in self.columns}
        return [names.get(column, column) for column in columns]


def load_turns(source: Source, skip_invalid: bool, seed: int, with_images: bool = False) -> tuple[Dataset, str]:
    """The valid examples of a source, sampled, with the columns turns, tools and origin; and a line of them.

    `with_images`: they have a column images too, and those that have none, or no turns, are invalid.
    Raises UserError naming the file, the line and the rule: for a source that cannot be read, and for invalid examples
    unless `skip_invalid`.
    """
    try:
        name, sample_size = split_sample_size(source)
        opened = open_source(source, name)
        convert: Any = _convert_table if isinstance(opened, Dataset) else _convert_files
        examples, columns = convert(source, opened, with_images)
    except OSError as error:  # of a path that cannot be looked at; what is in files has errors of its own
        raise UserError(f"{source.label}: cannot be read ({error.strerror or error}).") from error
    invalid = [index for index, problem in enumerate(examples["problem"]) if problem]
    if invalid and not skip_invalid:
        problems = (_describe_problem(examples[index]) for index in invalid)
        refuse_examples(problems, len(invalid), len(examples), source.label)
    valid = examples.remove_columns("problem")
    if invalid:
        skipped = set(invalid)
        valid = valid.select([index for index in range(len(examples)) if index not in skipped])
    if not len(valid):
        raise UserError(f"{source.label}: none of {len(examples)} examples can be used.")
    description = f"{name}: {columns}, {len(valid)} examples"
    if invalid:
        description += f", {len(invalid)} invalid ones skipped, such as {_describe_problem(examples[invalid[0]])}"
    if sample_size is not None:
        valid = sample_source(valid, source, sample_size, seed)
        description += f", {sample_size} of them sampled by --seed {seed}"
    return valid, description


def sample_source(examples: Dataset, source: Source, number: int, seed: int) -> Dataset:
    """So many examples of a source, as its name asks for. Raises UserError where it has fewer."""
    if number > len(examples):
        raise UserError(f"{source.label}: has only {len(examples)} examples.")
    return _sample(examples, number, random.Random(f"{seed} {source.name}"))


def apply_weight(examples: Dataset, source: Source, seed: int) -> Dataset:
    """Repeat or sample the examples by the weight of their source. Raises UserError if none is left."""
    repeats, rest = divmod(round(source.weight * len(examples)), len(examples))
    if not repeats and not rest:
        raise UserError(
            f"--dataset_weights {source.weight:g} of {source.name}: leaves none of {len(examples)} examples."
        )
    sampled = [_sample(examples, rest, random.Random(f"{seed} {source.name} weight"))] if rest else []
    return examples if (repeats, rest) == (1, 0) else concatenate_datasets([examples] * repeats + sampled)


def _describe_problem(example: Mapping[str, str]) -> str:
    return f"{example['origin']} {example['problem']}"


def split_sample_size(source: Source) -> tuple[str, int | None]:
    """The name and the number of `name#1000`; the number is None if there is none."""
    name, mark, number = source.name.rpartition("#")
    if not mark or Path(source.name).exists():
        return source.name, None
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", number):
        raise UserError(f"{source.label}: give a number of examples after #, such as {name}#1000.")
    return name, int(number)


def _sample(examples: Dataset, number: int, generator: random.Random) -> Dataset:
    return examples.select(sorted(generator.sample(range(len(examples)), number)))


def open_source(source: Source, name: str) -> Dataset | list[Path]:
    """The table of a source, or its files. Raises UserError for what is neither."""
    path = Path(name)
    if any((path / file).exists() for file in OF_SAVED_DATASETS):
        saved = load_from_disk(name)
        if isinstance(saved, Dataset):
            return saved
        if source.split not in saved:
            raise UserError(f"{source.label}: has no split {source.split}; it has {', '.join(saved)}.")
        return saved[source.split]
    if path.exists() or suffix_of(path) in SUFFIXES:
        return _list_files(source, path)
    if name in _KINDS_OF_FILES:
        raise UserError(f"{source.label}: a kind of file and no name of a dataset; give the file itself.")
    try:
        return load_dataset(name, source.config, split=source.split)
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{source.label}: no such file or folder, and no dataset of that name on the hub can be reached "
            f"({type(error).__name__})."
        ) from error
    except ValueError as error:  # an unknown split or configuration
        raise UserError(f"{source.label}: {error}") from error


def first_columns(source: Source) -> list[str]:
    """The columns of a source's first example, by their names in its format."""
    try:
        opened = open_source(source, split_sample_size(source)[0])
    except OSError as error:
        raise UserError(f"{source.label}: cannot be read ({error.strerror or error}).") from error
    return source.renamed(opened.column_names if isinstance(opened, Dataset) else _first_example(source, opened))


def _convert_files(source: Source, files: list[Path], with_images: bool) -> tuple[Dataset, str]:
    first = _first_example(source, files)
    source = source.fitted(first)
    format_name = _choose_format(source, list(first), first.get("label"))
    arguments = {
        "version": _VERSION,
        # Size and time are in the key of the cache, so that a changed file is read again.
        "files": [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "label": source.label,
        "format_name": format_name,
        "columns": source.columns,
        "with_images": with_images,
    }
    columns = describe_columns(format_name, source.renamed(first), COLUMNS if with_images else ())
    return _generate(_turns_of_files, arguments), columns


def _first_example(source: Source, files: list[Path]) -> dict:
    """The first example that can be read. Raises UserError, with the last problem, if there is none."""
    problem = "it is empty"
    for path in files:
        for origin, example, found in read_file(path, source.label):
            if example is not None:
                return example
            problem = f"{origin} {found}"
    raise UserError(f"{source.label}: contains no example that can be read: {problem}.")


def _convert_table(source: Source, table: Dataset, with_images: bool) -> tuple[Dataset, str]:
    source = source.fitted(table.column_names)
    labels = table.select_columns(["label"])[:1]["label"] if "label" in table.column_names else []
    format_name = _choose_format(source, table.column_names, *labels)
    arguments: dict[str, Any] = {"version": _VERSION, "table": table, "format_name": format_name}
    arguments |= {"columns": source.columns, "with_images": with_images}
    columns = describe_columns(format_name, source.renamed(table.column_names), COLUMNS if with_images else ())
    return _generate(_turns_of_table, arguments), columns


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
    format_name = source.format or detect(source.renamed(columns))
    if format_name is None:
        formats = "; ".join(f"{name} ({', '.join(required)})" for name, (required, _) in FORMATS.items())
        raise UserError(
            f"{source.label}: its columns {', '.join(columns)} are those of no format. Formats are {formats}. Rename "
            f"columns with --dataset_columns, such as question=QUESTION answer=LONG_ANSWER.{hint_of_tasks(columns)}"
        )
    return format_name


def _generate(function: Callable[..., Iterator[dict]], arguments: dict) -> Dataset:
    try:
        features = _WITH_IMAGES if arguments["with_images"] else _FEATURES
        return Dataset.from_generator(function, gen_kwargs=arguments, features=features)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _turns_of_files(
    version: int, files: list[tuple], label: str, format_name: str, columns: tuple, with_images: bool
) -> Iterator[dict]:
    for path, *_ in files:
        for origin, example, problem in read_file(Path(path), label):
            if example is None:
                entry: dict[str, Any] = {"turns": [], "tools": None, "origin": f"{path}, {origin}", "problem": problem}
                yield entry | ({"images": []} if with_images else {})
            else:
                folder = Path(path).parent
                yield _to_turns(f"{path}, {origin}", example, format_name, columns, with_images, folder)


def _turns_of_table(
    version: int, table: Dataset, format_name: str, columns: tuple, with_images: bool
) -> Iterator[dict]:
    for number, example in enumerate(table, start=1):
        yield _to_turns(f"row {number}", example, format_name, columns, with_images, None)


def _to_turns(
    origin: str, example: Mapping, format_name: str, columns: tuple, with_images: bool, folder: Path | None
) -> dict:
    """An entry of the cache: the turns of an example, and its images, or none and its problem."""
    turns: list[dict[str, Any]] = []
    images: list[Any] = []
    problem, tools = "", None
    example = {**example, **{name: example.get(column) for name, column in columns}}
    try:
        turns, tools = to_turns(example, format_name), tools_of(example, format_name)
        if with_images and (tools or any("tool_calls" in turn for turn in turns)):
            raise ExampleError("has tools or tool calls beside images; leave one of them out")
        if with_images:
            images = _images_beside(turns, example, folder)
        for turn in turns:
            turn["content"].encode()
    except ExampleError as error:
        turns, problem = [], str(error)
    except UnicodeEncodeError:
        turns, images, problem = [], [], "has half of a character (a lone surrogate)"
    entry: dict[str, Any] = {"turns": turns, "tools": tools, "origin": origin, "problem": problem}
    return entry | ({"images": images} if with_images else {})


def _images_beside(turns: list[dict[str, Any]], example: Mapping, folder: Path | None) -> list[Any]:
    if turns[0]["role"] == "text":
        raise ExampleError("has images beside a text; give a question and an answer, or turns")
    roles = [turn["role"] for turn in turns]
    last = max((place for place, role in enumerate(roles) if role in ("assistant", "completion")), default=0)
    if not {"user", "prompt"}.intersection(roles[:last]):
        raise ExampleError("has images and no question before its last answer, where they would stand")
    return images_of(example, folder)


def _list_files(source: Source, path: Path) -> list[Path]:
    """The file itself, or all files of a folder that can be read, sorted by name."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{source.label}: no such file.")
        if not path.is_file():  # to open a pipe, or to read a device, may take forever
            raise UserError(f"{source.label}: is neither a file nor a folder, but a pipe or a device.")
        if suffix_of(path) not in SUFFIXES:
            raise UserError(
                f"{source.label}: unknown kind of file; give one of {', '.join(SUFFIXES)}, or a folder of them."
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if suffix_of(file) in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{source.label}: the folder contains no file of {', '.join(SUFFIXES)}.")
    return files
