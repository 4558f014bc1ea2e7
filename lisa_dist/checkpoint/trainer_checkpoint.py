"""Checkpoints of `--method full` and `--method lora`: the Trainer's files, complete or absent.

The Trainer and DeepSpeed write a checkpoint file by file, and a run may be killed between two of them. So they write
into a staging folder, which becomes `checkpoint-N` once all files are on disk. `lisa_checkpoint.json` lists the files
with their SHA-256.
"""

import os
import shutil
import time
from pathlib import Path

from torch import distributed as dist

from lisa_dist.checkpoint.folders import checkpoints_by_age, list_checkpoints, put_in_place, remove_leftovers
from lisa_dist.checkpoint.weights import remove_weights
from lisa_dist.distributed.collectives import check_files, describe_files, raise_together, together
from lisa_dist.files import DamagedError, make_durable, set_mode_by_umask, write_json
from lisa_dist.run_folder import (
    STATE_NAME,
    TRAINER_CHECKPOINT_NAME,
    TRAINER_STATE_NAME,
    check_trainer_checkpoint,
)


def complete_checkpoint(staging: Path, folder: Path, writes: bool) -> None:
    """Rename the staging folder, in which all ranks have written, to `folder`. Collective.

    Args:
        staging: The folder that `make_staging` has made.
        folder: `checkpoint-N`.
        writes: True on the rank that renames it.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    state = {"saved_at": time.time(), "world_size": ranks, "files": describe_files(staging)}
    with together(folder):
        if writes:
            write_json(staging / TRAINER_CHECKPOINT_NAME, state)
            put_in_place(staging, folder)


def find_trainer_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the complete checkpoint that was saved last, or None. Collective; rank 0 warns of damaged ones."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if is_first:
        remove_leftovers(Path(output_dir))
    for folder in checkpoints_by_age(Path(output_dir)):
        try:
            check_complete(folder)
            return folder
        except DamagedError as error:
            if is_first:
                print(f"warning: {folder} is passed over: {error}", flush=True)
    return None


def newest_trainer_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint that was saved last, as far as small files tell. Not collective."""
    return next((one for one in list_checkpoints(output_dir) if (one / TRAINER_STATE_NAME).is_file()), None)


def check_complete(folder: Path) -> None:
    """Raise DamagedError on every rank for a checkpoint that a full or LoRA run cannot resume. Collective.

    Checkpoints of other programs have no list of files. The Trainer writes `trainer_state.json` last.
    """
    problems, files = [], {}
    try:
        if (folder / TRAINER_CHECKPOINT_NAME).exists():
            files = check_trainer_checkpoint(folder)["files"]
        elif not (folder / TRAINER_STATE_NAME).is_file():
            problems.append(f"there is no {TRAINER_STATE_NAME} in it, which is written last")
        elif (folder / STATE_NAME).exists():
            problems.append("it is a checkpoint of --method lisa")
    except DamagedError as error:
        problems.append(str(error).removesuffix("."))
    raise_together(problems)
    check_files(folder, files)


def move_model(staging: Path, folder: Path) -> None:
    """Move a model's complete files into `folder`, where they replace an earlier model. A card is left out."""
    (staging / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in; the run's card is written afterwards
    # An index comes last: until then the earlier one stays.
    paths = sorted(staging.iterdir(), key=lambda path: path.name.endswith(".index.json"))
    for path in paths:
        if path.is_dir():  # DeepSpeed's, of a model that is not gathered
            shutil.rmtree(folder / path.name, ignore_errors=True)
        else:
            make_durable(path)
            set_mode_by_umask(path)
        os.replace(path, folder / path.name)
    remove_weights(folder, except_names=[path.name for path in paths])
    staging.rmdir()
