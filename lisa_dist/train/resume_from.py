"""What a trainer's run begins from, as `--resume_from_checkpoint` says, and the schedule that it goes on with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lisa_dist.checkpoint.resume import find_checkpoint, has_only_weights, read_state
from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import UserError
from lisa_dist.train.given_paths import check_saved_by_trainer


class Beginning(NamedTuple):
    """A checkpoint and its state, or a folder whose weights a new run begins from, or neither: step 0."""

    checkpoint: Path | None = None
    state: dict[str, Any] | None = None
    weights_from: Path | None = None


def find_beginning(wanted: str | bool | None, output_dir: str, say: Callable[[str], object]) -> Beginning:
    """What `wanted` is: a folder, True for the newest whole checkpoint, or "auto"; all ranks call it.

    Raises ValueError on all ranks where there is none.
    """
    if wanted in (None, False):
        return Beginning()
    if wanted in (True, "auto"):
        found = find_checkpoint(output_dir)
        if found is not None:
            check_saved_by_trainer(*found)
            return Beginning(*found)
        if wanted is True:
            raise UserError(
                f"--resume_from_checkpoint true: there is no whole checkpoint in --output_dir {output_dir}."
            )
        say(f"no checkpoint in {output_dir} yet: the run begins at step 0.")
        return Beginning()
    folder = Path(str(wanted))
    # Rank 0's view counts: a rank that saw no folder and raised alone would leave the others waiting.
    is_folder, only_weights = gather((folder.is_dir(), has_only_weights(folder)))[0]
    if not is_folder:
        raise UserError(f"--resume_from_checkpoint {folder}: no such folder.")
    if only_weights:
        say(f"{folder} is no checkpoint of a LISA run: a new run begins from its weights.")
        return Beginning(weights_from=folder)
    state = read_state(folder)
    check_saved_by_trainer(folder, state)
    return Beginning(folder, state)


def load_schedule(scheduler: Any, groups: list[dict[str, Any]], state: dict[str, Any], ratio: float) -> None:
    """Go on with a saved schedule, times `ratio`; where there are other groups, each has the schedule's rate."""
    for name in ("base_lrs", "_last_lr"):
        if name in state:
            state[name] = [rate * ratio for rate in state[name]]
    if len(state.get("base_lrs", groups)) != len(groups):
        state |= {name: value for name, value in scheduler.state_dict().items() if isinstance(value, list)}
        state["_last_lr"] = [group["lr"] for group in groups]
    scheduler.load_state_dict(state)
