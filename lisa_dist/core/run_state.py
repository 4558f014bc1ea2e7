"""What a checkpoint has of a run: settings that a resumed run may change, and blocks that need not be written again."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_dist.config import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.removed import settings_of_checkpoint

STATE_VERSION = 1
# Settings that a resumed run may change at any step: they decide neither on layers nor on groups of the current period.
FREE_SETTINGS = (
    "lisa_state",
    "lisa_offload",
    "lisa_master",
    "lisa_frozen_bits",
    "lisa_frozen_store",
    "lisa_nonfinite",
    "lisa_layers_attribute",
    "lisa_weights_file",
    "lisa_lr_scale",
    "lisa_debug",
    "lisa_preset",
)


def changed_settings(
    state: Mapping[str, Any], config: LisaConfig, num_layers: int, weights: list[float] | None
) -> list[str]:
    """Describe the settings in which a saved run (`LisaController.state_dict`) differs from this one.

    Each is a phrase such as "--lisa_seed 5 (it had 0)". The free settings are left out. Raises UserError when the state
    is of another model, or when settings differ in the middle of a period.
    """
    if state["version"] != STATE_VERSION:
        raise UserError(f"the LISA state has version {state['version']}; this release reads {STATE_VERSION}.")
    current, step = config.to_dict(), state["step"]
    saved = LisaConfig.plain().to_dict() | settings_of_checkpoint(state["config"], f"the run saved at step {step} had ")
    if saved["lisa_unit"] != config.lisa_unit:
        raise UserError(
            f"--lisa_unit {config.lisa_unit}: the run saved at step {step} sampled by {saved['lisa_unit']}; give that, "
            "or begin a new run from its weights."
        )
    if saved["lisa_adapters"] != config.lisa_adapters:
        raise UserError(
            f"--lisa_adapters {config.lisa_adapters}: the run saved at step {step} had {saved['lisa_adapters']}; give "
            "that, or begin a new run from its exported weights."
        )
    if len(state["visit_counts"]) != num_layers:
        raise UserError(
            f"the LISA state is of a model with {len(state['visit_counts'])} decoder layers; this one has {num_layers}."
        )
    names = [name for name in current if name not in FREE_SETTINGS and current[name] != saved[name]]
    if weights != state["weights"]:
        names.append("lisa_weights_file")  # the same file may have moved
    changed = [f"--{name} {current[name]} (it had {saved[name]})" for name in names]
    intervals = (saved["lisa_interval_steps"], config.lisa_interval_steps)
    if changed and any(step % interval for interval in intervals):
        raise UserError(
            f"the run saved at step {step} had other settings than {', '.join(changed)}: they can only change where a "
            f"period begins, at a multiple of {math.lcm(*intervals)} steps. Give the settings it had, or resume from a "
            "checkpoint of such a step."
        )
    return changed


@dataclass(frozen=True)
class SavedBlocks:
    """The weight files of a checkpoint: the file of each block, and the size and sum of each file."""

    folder: Path
    files: dict[str, str]
    described: dict[str, dict[str, Any]]


class BlockChanges:
    """The names of the blocks that have trained since the last checkpoint, and where that one has the others.

    Steps alone change weights: what else does so must call `forget`. An engine that answers questions has one too, with
    the last weights that it was sent in the place of a checkpoint.
    """

    def __init__(self) -> None:
        self.saved: SavedBlocks | None = None
        self._names: set[str] = set()
        self._step = -1  # of the last checkpoint

    def note(self, names: Iterable[str], step: int) -> None:
        """These blocks have trained up to `step`, or since the last checkpoint where that was within their period."""
        if step > self._step:
            self._names.update(names)

    def take(self, step: int) -> set[str]:
        """The names so far, for a checkpoint after `step`."""
        taken, self._names, self._step = self._names, set(), step
        return taken

    def give_back(self, names: set[str]) -> None:
        """Names of a checkpoint that was not written: they are changes still."""
        self._names |= names

    def begin(self, saved: SavedBlocks | None, step: int) -> None:
        """All weights are those of a checkpoint that was loaded; None where it has no file for each block."""
        self.saved, self._names, self._step = saved, set(), step

    def forget(self) -> None:
        """All weights have changed."""
        self.saved = None
