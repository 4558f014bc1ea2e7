"""Files that are whole or not there: checked sums, flushed to disk, and ranks that fail together.

A checkpoint is written by all ranks. When one of them meets a full disk the others must not wait for it, nor take the
checkpoint for whole; `together` makes every rank of a phase raise when one does.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import distributed as dist

from lisa_dist.errors import UserError


class SaveError(UserError):
    """A file could not be written: the message names it, the rank and the reason."""


class DamagedError(UserError):
    """A checkpoint is not as it was written: the message names the file."""


class together:  # noqa: N801 - reads as a verb: `with together(folder):`
    """All ranks run the body; when it raises on any of them, all raise, naming the ranks and the reason.

    Every rank must enter it, and the body must hold no collective. `folder` is what the message says was being written.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        every = gather(None if error is None else (f"{kind.__name__}: {error}", _is_of_the_disk(error)))
        failed = {rank: about for rank, about in enumerate(every) if about is not None}
        if not failed:
            return
        reasons = "; ".join(f"rank {rank}: {text}" for rank, (text, _) in failed.items())
        if all(of_the_disk for _, of_the_disk in failed.values()):
            raise SaveError(
                f"{self._folder} could not be written ({reasons}); what was saved before is untouched. Make room, or "
                "choose another --output_dir."
            ) from error
        if error is None:  # else it goes on by itself
            raise RuntimeError(f"{self._folder} could not be written ({reasons})")


def write_json(path: Path, content: dict) -> None:
    """Write `content` with a checksum of itself, flushed to disk."""
    content = content | {"checksum": _checksum(content)}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict:
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


def describe_files(folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of every file under `folder`, each flushed to disk; the ranks share the work."""
    names = _list_files(folder)
    with together(folder):
        mine = {name: _describe(folder / name, flush=True) for name in _my_share(names)}
    return {name: about for part in gather(mine) for name, about in part.items()}


def check_files(folder: Path, described: dict[str, dict]) -> None:
    """Raise DamagedError, on every rank, naming each file that is not as `describe_files` found it."""
    problems = []
    for name in _my_share(sorted(described)):
        path, about = folder / name, described[name]
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != about["bytes"]:
            problems.append(f"{path} is damaged: {path.stat().st_size} bytes, not {about['bytes']}")
        elif _describe(path)["sha256"] != about["sha256"]:
            problems.append(f"{path} is damaged: its bytes are not those that were written")
    raise_together(problems)


def raise_together(problems: list[str]) -> None:
    """Raise DamagedError on every rank when any rank has found a problem."""
    found = sorted({problem for part in gather(problems) for problem in part})
    if found:
        raise DamagedError("; ".join(found) + ".")


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable: those of its files, or of a folder just renamed in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path this gives; it becomes `path` in one step once it is whole."""
    beside = path.with_name(f"tmp-{path.name}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        set_mode_by_umask(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether a file system said no; some writers say so in exceptions of their own kinds."""
    said = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    said += ["iostream error", "unexpected pos", "PytorchStreamWriter"]  # torch.save's
    return isinstance(error, OSError | SafetensorError) or any(words in str(error) for words in said)


def set_mode_by_umask(path: Path) -> None:
    """The mode that the user's umask wants; temporary files and safetensors are their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def gather(value: object) -> list:
    """What every rank holds, in rank order; of the only process where there are no ranks."""
    if not dist.is_initialized():
        return [value]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def _list_files(folder: Path) -> list[str]:
    """Files under `folder` that any rank sees: a shared file system may show a rank its own before those of others."""
    mine = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted({name for names in gather(mine) for name in names})


def _my_share(names: list[str]) -> list[str]:
    return names[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def _describe(path: Path, flush: bool = False) -> dict:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _file_digest(file)
        if flush:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def _file_digest(file):
    digest = hashlib.sha256()  # hashlib.file_digest is of Python 3.11
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
