"""Folders of checkpoints: names, staging, putting a whole one in place, which was saved last, rotation.

A checkpoint is written to `tmp-checkpoint-N-RUN`, flushed to disk and renamed to `checkpoint-N`: a folder of that name
is whole. One that is replaced or deleted is renamed first, so that half a checkpoint never has that name. RUN is the id
of the run, so that two runs that save in one folder do not write into each other's.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from lisa_dist.distributed.collectives import gather, together
from lisa_dist.distributed.run_lock import is_held, run_id
from lisa_dist.files import DamagedError, make_durable, read_json, set_mode_by_umask
from lisa_dist.run_folder import STATE_NAME, TRAINER_CHECKPOINT_NAME

# Prefixes of folders that are no checkpoints: being written, about to be replaced, being deleted.
_STAGING, _REPLACED, _DOOMED = "tmp-", "tmp-replaced-", "tmp-deleted-"
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")  # \d has the digits of every script
_LEFTOVER = re.compile(rf"(?:{_STAGING}|{_REPLACED}|{_DOOMED})(checkpoint-[0-9]+)(?:-([0-9a-f]+))?")
_OF_RUNS = (STATE_NAME, TRAINER_CHECKPOINT_NAME)  # one of them is in every checkpoint of a run
_QUIET = 3600.0  # seconds after which nobody goes on writing to a folder


def make_staging(folder: Path, writes: bool) -> Path:
    """A folder next to `folder` to write a checkpoint in, made on the rank that `writes`.

    Raises SaveError on all ranks when it cannot be made.
    """
    staging = folder.with_name(f"{_STAGING}{folder.name}-{gather(run_id())[0]}")
    with together(folder):
        if writes:
            remove_leftovers(folder.parent)
            _remove(staging)
            staging.mkdir(parents=True)
    return staging


def put_in_place(staging: Path, folder: Path) -> None:
    """Rename a staged folder to `folder`; one that exists there is moved aside first and deleted afterwards."""
    for path in (staging, *staging.rglob("*")):
        if not path.is_symlink():  # whose mode is that of what it leads to
            set_mode_by_umask(path)
    make_durable(staging)
    replaced = folder.with_name(f"{_REPLACED}{folder.name}-{run_id()}")
    if os.path.lexists(folder):
        _remove(replaced)
        os.rename(folder, replaced)
    os.rename(staging, folder)
    make_durable(folder.parent)
    _remove(replaced)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what killed saves left behind, and restore a checkpoint that one was about to replace.

    What another run has begun within the last hour stays, unless this process holds the folder: it may go on.
    """
    for path in list(output_dir.glob("tmp-*")):
        leftover = _LEFTOVER.fullmatch(path.name)
        if leftover is None or not (leftover[2] in (None, run_id()) or is_held(output_dir) or _is_quiet(path)):
            continue
        original = path.with_name(leftover[1])
        if path.name.startswith(_REPLACED) and not path.is_symlink() and not original.exists():
            os.rename(path, original)
        else:
            _remove(path)


def _is_quiet(folder: Path) -> bool:
    try:
        return time.time() - max(path.lstat().st_mtime for path in (folder, *folder.glob("*"))) > _QUIET
    except FileNotFoundError:  # its run goes on
        return False


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it; of a link the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def checkpoints_by_age(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder as rank 0 sees them, last saved first; every rank calls it."""
    return gather(list_checkpoints(output_dir))[0]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder as this rank sees them, last saved first."""
    checkpoints = sorted((_saved_at(path), step, path) for path, step in _checkpoints_in(output_dir))
    return [path for *_, path in reversed(checkpoints)]


def rotate_checkpoints(newest: Path, limit: int | None, best: Path | None = None) -> None:
    """Delete the oldest checkpoints next to `newest`, which was just written, until `limit` are left; on one rank.

    `newest` and `best` always stay, and so do links and folders that no run of `lisa-dist` has written. Later
    steps than `newest`'s go first: a run that was resumed from an earlier step left them behind.
    """
    if limit is None or limit < 1:
        return
    kept = {newest.resolve()} | ({best.resolve()} if best is not None and best.is_dir() else set())
    steps = {
        path: step
        for path, step in _checkpoints_in(newest.parent)
        if any((path / name).is_file() for name in _OF_RUNS) and not path.is_symlink() and path.resolve() not in kept
    }
    newest_step = _step_of(newest)
    assert newest_step is not None, f"{newest} is no checkpoint's name"
    order = sorted(steps, key=lambda path: (steps[path] < newest_step, steps[path]))
    for path in order[: max(0, len(order) + len(kept) - max(limit, len(kept)))]:
        doomed = path.with_name(f"{_DOOMED}{path.name}-{run_id()}")
        try:
            _remove(doomed)
            os.rename(path, doomed)
        except OSError as error:
            print(f"warning: {path} could not be deleted ({error.strerror}).", flush=True)
        _remove(doomed)


def _checkpoints_in(output_dir: Path) -> Iterator[tuple[Path, int]]:
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        step = _step_of(path)
        if step is not None and path.is_dir():
            yield path, step


def _step_of(folder: Path) -> int | None:
    """N of checkpoint-N; None for any other name."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return None if match is None else int(match[1])


def _saved_at(folder: Path) -> float:
    for name in _OF_RUNS:
        with contextlib.suppress(DamagedError):  # reported when a resume comes to this checkpoint
            saved_at: float = read_json(folder / name)["saved_at"]
            return saved_at
    return folder.stat().st_mtime
