"""Files that are complete or absent: with checksums, flushed to disk, replaced in one step. All of it is local."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from safetensors import SafetensorError

from lisa_dist.errors import UserError


class SaveError(UserError):
    """A file could not be written: the message names it, the rank and the reason."""


class DamagedError(UserError):
    """A checkpoint is not as it was written: the message names the file."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with a checksum of itself, flushed to disk."""
    content = content | {"checksum": _checksum(content)}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises DamagedError when it is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: not JSON ({error}).") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise DamagedError(f"{path} is damaged: its checksum does not fit its content.")
    return content


def find_foreign_name(names: Iterable[object]) -> object | None:
    """The first name that leads out of the folder it is read in; None where all of them stay in it.

    Absolute ones do, and ones with `..`. Links are not looked at: those of a hub's cache lead out of their folder.
    """
    for name in names:
        path = PurePosixPath(name if isinstance(name, str) and "\0" not in name else "..")  # no file's name either
        if path.is_absolute() or ".." in path.parts:
            return name
    return None


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable: those of its files, or of a folder just renamed in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path this gives; it becomes `path` in one step once it is complete.

    A link at either path is replaced, and what it leads to stays as it is.
    """
    staged = path.with_name(f"tmp-{path.name}")
    staged.unlink(missing_ok=True)
    try:
        yield staged
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        set_mode_by_umask(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def is_disk_error(error: BaseException) -> bool:
    """Whether a file system refused a write; some writers report it in exceptions of their own kinds."""
    messages = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    messages += ["iostream error", "unexpected pos", "PytorchStreamWriter"]  # torch.save's
    return isinstance(error, OSError | SafetensorError) or any(message in str(error) for message in messages)


def set_mode_by_umask(path: Path) -> None:
    """The mode that the user's umask wants; temporary files and safetensors are their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def describe_file(path: Path, flush: bool = False) -> dict[str, Any]:
    """Size and SHA-256 of a file, which is flushed to disk if asked for."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _file_digest(file)
        if flush:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def _file_digest(file: BinaryIO) -> Any:
    digest = hashlib.sha256()  # hashlib.file_digest is of Python 3.11
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
