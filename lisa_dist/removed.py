"""Settings of earlier releases, and values of settings, that are gone, each with what to do instead.

One rule for all: who gives one gets one line, a UserError. Files of an earlier release, recipes and checkpoints, may
have a setting with its old default, which did nothing: they are read as if it were not there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lisa_dist.errors import UserError
from lisa_dist.text import in_one_line


class Removed(NamedTuple):
    """What to do instead of a setting, its old default, and the first release without it."""

    instead: str
    default: Any = None
    since: str = "0.2.0"


# By the name of a setting, or by a name and a value.
REMOVED = {
    "lisa_probe_steps": Removed("leave it out, or give weights of layers by --lisa_weights_file", 0),
    "lisa_depth_bias": Removed("give the weights (l / N)^bias of layers l = 1 to N by --lisa_weights_file", 0.0),
    "lisa_importance": Removed("leave it out: the adaptive sampler measures a layer by its gradient", "gradient"),
    "lisa_importance_decay": Removed("leave it out: it is always 0.5", 0.5),
    "lisa_importance_temperature": Removed("leave it out: it is always 1", 1.0),
    "lisa_importance_floor": Removed("leave it out: it is always 0.2", 0.2),
    "lisa_lr_power": Removed("give --learning_rate times (layers of the model / active layers)^power", 0.0),
    "lisa_wake_warmup_steps": Removed("leave it out, or give --lisa_state keep, by which moments stay", 0),
    "lisa_sampler cyclic": Removed("give reshuffle: each layer trains once before any repeats"),
    "lisa_sampler window": Removed("give uniform or reshuffle"),
    "lisa_interval_steps auto": Removed("give a number of steps, such as 20"),
    "lisa_preset lora": Removed("leave it out: adapters, embedding and head train in less memory, and reach more"),
    "lisa_activated_layers lora": Removed("give a number of layers, or auto for as many as fit the GPU"),
}


def refuse_removed(settings: Mapping[str, Any], where: str = "", how: str = "") -> None:
    """Raise UserError, `where` before its flag and `how` at its end, for the first setting or value that is gone."""
    for name, value in settings.items():
        given = f"{name} {value}".strip()
        found = REMOVED.get(name) or REMOVED.get(given)
        if found is not None:
            raise UserError(f"{where}--{in_one_line(given)}: removed since {found.since}; {found.instead}{how}.")


def refuse_removed_flags(words: Sequence[str]) -> None:
    """The same for words of a command line that belong to no flag: the first of them, and its value if it has one."""
    if words and words[0].startswith("--"):
        flag, _, value = words[0].partition("=")
        if not value and len(words) > 1 and not words[1].startswith("--"):
            value = words[1]
        refuse_removed({flag[2:].replace("-", "_"): value})


def without_removed(settings: Mapping[str, Any], where: str = "", how: str = "") -> dict[str, Any]:
    """The settings of a file, those left out that are gone and have their old default; others raise UserError."""
    kept = {name: value for name, value in settings.items() if name not in REMOVED or not _is_default(name, value)}
    refuse_removed(kept, where, how)
    return kept


def _is_default(name: str, value: Any) -> bool:
    """Whether a removed setting has its old default, also as a text that a recipe may have."""
    default = REMOVED[name].default
    try:
        return bool(type(default)(value) == default)
    except (TypeError, ValueError):
        return False


def settings_of_checkpoint(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of LISA in a checkpoint. Raises UserError, beginning with `where`, for a run that used others."""
    how = "; do so in a new run from its weights, or resume this one by the release that saved it"
    return without_removed(saved, where, how)
