"""What a resumed run may change of the saved one's settings, and when."""

import math
from collections.abc import Mapping
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
)


def changed_settings(
    state: Mapping[str, Any], config: LisaConfig, num_layers: int, weights: list[float] | None
) -> list[str]:
    """The settings in which a saved run (`LisaController.state_dict`) differs from this one, the free ones left out.

    Raises ValueError when the state is of another model, or when settings differ in the middle of a period.
    """
    if state["version"] != STATE_VERSION:
        raise UserError(f"the LISA state has version {state['version']}; this release reads {STATE_VERSION}.")
    current, step = config.to_dict(), state["step"]
    saved = LisaConfig().to_dict() | settings_of_checkpoint(state["config"], f"the run saved at step {step} had ")
    if saved["lisa_unit"] != config.lisa_unit:
        raise UserError(
            f"--lisa_unit {config.lisa_unit}: the run saved at step {step} sampled by {saved['lisa_unit']}; give that, "
            "or begin a new run from its weights."
        )
    if len(state["visit_counts"]) != num_layers:
        raise UserError(
            f"the LISA state is of a model with {len(state['visit_counts'])} decoder layers; this one has {num_layers}."
        )
    changed = [name for name in current if name not in FREE_SETTINGS and current[name] != saved[name]]
    if weights != state["weights"]:
        changed.append("lisa_weights_file")  # the same file may have moved
    intervals = (saved["lisa_interval_steps"], config.lisa_interval_steps)
    if changed and any(step % interval for interval in intervals):
        listed = ", ".join(f"--{name} {current[name]} (it had {saved[name]})" for name in changed)
        raise UserError(
            f"the run saved at step {step} had other settings than {listed}: they can only change where a period "
            f"begins, at a multiple of {math.lcm(*intervals)} steps. Give the settings it had, or resume from a "
            "checkpoint of such a step."
        )
    return changed
