"""What all ranks do together: gather values, fail as one, check files in shares.

A checkpoint is written by all ranks. When one of them meets a full disk the others must not wait for it, nor take the
checkpoint for complete: `together` makes every rank of a phase raise when one does.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed as dist

from lisa_dist.distributed.ranks import gloo_group
from lisa_dist.errors import SharedError, UserError
from lisa_dist.files import DamagedError, SaveError, describe_file, is_disk_error

T = TypeVar("T")


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The value of every rank, in rank order; where there are no ranks, of this process."""
    if not dist.is_initialized():
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value, group)
    return every


def background_group() -> dist.ProcessGroup | None:
    """Ranks for a thread beside the one that trains, whose collectives must not mix with its; all ranks call it."""
    return _group_beside(dist.group.WORLD) if dist.is_initialized() else None


@functools.cache
def _group_beside(world: Any) -> dist.ProcessGroup:
    return gloo_group(timedelta(hours=6))  # a rank may write long after the others have


@contextlib.contextmanager
def together(folder: Path, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """All ranks run the body; when it raises on any of them, all raise, naming the ranks and the reason.

    Every rank must enter it, and the body must hold no collective. `folder` is what the message says was being written.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        about = None if error is None else (f"{type(error).__name__}: {error}", is_disk_error(error))
        failed = {rank: theirs for rank, theirs in enumerate(gather(about, group)) if theirs is not None}
        reasons = "; ".join(f"rank {rank}: {text}" for rank, (text, _) in failed.items())
        if failed and all(of_the_disk for _, of_the_disk in failed.values()):
            raise SaveError(
                f"{folder} could not be written ({reasons}); what was saved before is untouched. Make room, or "
                "choose another --output_dir."
            ) from error
        if failed and error is None:  # else it goes on by itself
            raise RuntimeError(f"{folder} could not be written ({reasons})")


def describe_files(
    folder: Path,
    known: Mapping[str, dict[str, Any]] | None = None,
    own: Sequence[str] = (),
    group: dist.ProcessGroup | None = None,
) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file under `folder`, each flushed to disk.

    Each rank describes its `own` files, which it has just written, and the ranks share all others but those that are
    `known`.
    """
    described = dict(known or {})
    taken = described.keys() | {name for names in gather(list(own), group) for name in names}
    # All ranks have written theirs by now; a shared file system may show a rank its own files first.
    seen = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    names = sorted({name for names in gather(seen, group) for name in names} - taken)
    with together(folder, group):
        mine = {name: describe_file(folder / name, flush=True) for name in (*own, *my_share(names))}
    return described | {name: about for part in gather(mine, group) for name, about in part.items()}


def check_files(folder: Path, described: dict[str, dict[str, Any]]) -> None:
    """Raise DamagedError, on every rank, naming each file that is not as `describe_files` found it."""
    problems = []
    for name in my_share(sorted(described)):
        path, about = folder / name, described[name]
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != about["bytes"]:
            problems.append(f"{path} is damaged: {path.stat().st_size} bytes, not {about['bytes']}")
        elif describe_file(path)["sha256"] != about["sha256"]:
            problems.append(f"{path} is damaged: its bytes are not those that were written")
    raise_together(problems)


def raise_together(problems: list[str]) -> None:
    """Raise DamagedError on every rank when any rank has found a problem."""
    found = sorted({problem for part in gather(problems) for problem in part})
    if found:
        raise DamagedError("; ".join(found) + ".")


def raise_shared(problem: str | None) -> None:
    """Raise SharedError on every rank, with the problem of the first rank that has one; all ranks call it."""
    found = [one for one in gather(problem) if one]  # a rank that ended alone would be said to be gone
    if found:
        raise SharedError(found[0])


@contextlib.contextmanager
def sharing_errors(*others: type[Exception]) -> Iterator[None]:
    """Raise SharedError on every rank where the body raises UserError, or one of the others, on any of them.

    Every rank must enter it, and the body must hold no collective.
    """
    kinds: tuple[type[Exception], ...] = (UserError, *others)
    problem = None
    try:
        yield
    except kinds as error:
        problem = str(error) or type(error).__name__
    raise_shared(problem)


def my_share(names: list[str]) -> list[str]:
    """Those of this rank, where the ranks share the work on files; all of them where there are no ranks."""
    return names[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else names
