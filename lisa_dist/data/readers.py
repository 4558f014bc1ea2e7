"""Read files of examples, and the images that examples name: each, or why it cannot be read, with its line or row."""

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow
import pyarrow.parquet

from lisa_dist.data.formats import ExampleError
from lisa_dist.errors import UserError
from lisa_dist.text import in_one_line

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")  # and all but .parquet with .gz
IMAGE_COLUMNS = ("images", "image")
OF_SAVED_DATASETS = ("state.json", "dataset_dict.json")  # one is in a folder that save_to_disk has written
_NOT_UTF8 = "is not UTF-8"
_NUM_SHOWN = 100  # characters of what is no image
_MARK = "\ufdd0"  # stands for a line that is not UTF-8: no character, and csv of every Python version accepts it
ORIGIN, PROBLEM = "__origin__", "__problem__"  # columns of where a row is, and of why it is invalid, till it is used
# Where an example is in its file, its columns, and why it cannot be read: one of the last two is None.
FileExample = tuple[str, dict | None, str | None]


def suffix_of(path: Path) -> str:
    """The suffix that tells the format, without .gz."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def read_file(path: Path, source: str) -> Iterator[FileExample]:
    """The examples of a file. Raises UserError, naming the `source`, for a file that cannot be read at all."""
    readers = {".jsonl": _read_lines, ".txt": _read_lines, ".parquet": _read_parquet}
    suffix = suffix_of(path)
    try:
        yield from _read_json(path, source) if suffix == ".json" else readers.get(suffix, _read_csv)(path)
    except (OSError, EOFError, zlib.error, csv.Error, pyarrow.ArrowException, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or in_one_line(error)
        raise UserError(f"{source}: {path} cannot be read ({why}).") from error


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path, keep_blank: bool = False) -> Iterator[tuple[str, str | None]]:
    """Places and texts of lines, without blank ones unless `keep_blank`; None for a line that is not UTF-8.

    Only line feeds end a line: JSON strings may contain other characters that Python treats as line breaks.
    """
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UnicodeDecodeError("utf-8", line, 0, 2, "it is in UTF-16")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                yield f"line {number}", None
            else:
                if keep_blank or text.strip():
                    yield f"line {number}", text


def _read_lines(path: Path) -> Iterator[FileExample]:
    """A text, or else an object in JSON, on each line."""
    for origin, line in _lines(path):
        try:
            if line is None:
                yield origin, None, _NOT_UTF8
            elif suffix_of(path) == ".txt":
                yield origin, {"text": line}, None
            else:
                yield _object(origin, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield origin, None, f"is not JSON ({error})"


def _object(origin: str, example: object) -> FileExample:
    if isinstance(example, dict):
        return origin, example, None
    return origin, None, f"is {type(example).__name__}, not an object"


def _read_json(path: Path, source: str) -> Iterator[FileExample]:
    with _open(path) as file:
        raw = file.read()
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{source}: {path}, line {line} {_NOT_UTF8}.") from error
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # one object per line, despite its name
            yield from _read_lines(path)
            return
        raise UserError(f"{source}: {path} is not JSON ({error}).") from error
    if isinstance(content, dict):
        raise UserError(
            f"{source}: {path} is one object with the keys {', '.join(list(content)[:3])}, ...; it must be a list of "
            "objects, or have one object per line."
        )
    if not isinstance(content, list):
        raise UserError(f"{source}: {path} is {type(content).__name__}; it must be a list of objects.")
    for number, example in enumerate(content, start=1):
        yield _object(f"row {number}", example)


def _read_csv(path: Path) -> Iterator[FileExample]:
    csv.field_size_limit(2**31 - 1)
    texts = (line if line is not None else _MARK for _, line in _lines(path, keep_blank=True))
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    reader = csv.DictReader((f"{text}\n" for text in texts), delimiter=delimiter, strict=True)
    names = reader.fieldnames or ()
    other = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise csv.Error(f"its columns are separated by {other!r}; write it with {delimiter!r}")
    for number, row in enumerate(reader, start=1):
        origin = f"row {number}"
        if any(_MARK in str(value) for value in row.values()):
            yield origin, None, _NOT_UTF8
        elif None in row or None in row.values():
            yield origin, None, f"does not have the {len(names)} fields of the first line"
        else:
            yield origin, row, None


def _read_parquet(path: Path) -> Iterator[FileExample]:
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            try:
                rows = batch.to_pylist()
            except (OverflowError, LookupError, ValueError) as error:  # times that Python has not, zones of no name
                raise pyarrow.ArrowInvalid(f"a value of one of its columns: {error}") from error
            for row in rows:
                number += 1
                yield f"row {number}", row, None


def images_of(example: Mapping[str, Any], folder: Path) -> list[Any]:
    """The images of a row: paths, from `folder` on, bytes, or images that `datasets` has opened; files are looked at.

    Raises ExampleError with what is wrong of them.
    """
    given = next((example[name] for name in IMAGE_COLUMNS if example.get(name) is not None), None)
    images = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if not images:
        raise ExampleError("has no image")
    return [_checked(image, folder) for image in images]


def _checked(image: Any, folder: Path) -> Any:
    """An image by its path or its bytes, or one that `datasets` has opened. Raises ExampleError for what is neither."""
    if isinstance(image, PIL.Image.Image):
        return image
    given = image if isinstance(image, Mapping) else {"bytes" if isinstance(image, bytes) else "path": image}
    path, content = given.get("path"), given.get("bytes")
    if isinstance(content, bytes):  # whose path is a name
        if _is_image(io.BytesIO(content)):
            return {"path": None, "bytes": content}
        raise ExampleError("has an image whose bytes are no image that can be read")
    if not isinstance(path, str) or content is not None:
        raise ExampleError(f"has an image that is neither a path nor bytes: {in_one_line(image)[:_NUM_SHOWN]}")
    if ".." in Path(path).parts:
        raise ExampleError(f"has an image {path}: leads out of its folder; give the path from / on")
    if not (folder / path).is_file():
        raise ExampleError(f"has an image {path}: no such file")
    if not _is_image(folder / path):
        raise ExampleError(f"has an image {path}: is no image that can be read")
    return str(folder / path)


def _is_image(file: Any) -> bool:
    """Whether an image can be opened: the beginning of its file has its kind and its size."""
    with contextlib.suppress(OSError, PIL.Image.DecompressionBombError), PIL.Image.open(file):
        return True
    return False
