"""What a run leaves in its output folder, read back for the report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisa_dist.config_rules import OUTER_BLOCKS
from lisa_dist.errors import UserError
from lisa_dist.run_folder import (
    ANSWERS_NAME,
    LOG_NAME,
    MEMORY_NAME,
    MEMORY_PARTS,
    MOVEMENT_LOG,
    RUN_NAME,
    STEPS_NAME,
    TRAINER_STATE_NAME,
    read_lines,
    read_object,
)
from lisa_dist.shapes import Each, count, misfit, number

_MOST_LAYERS = 10_000


def _layer(value: object) -> str | None:
    return count(value) or ("is no layer of a model" if value >= _MOST_LAYERS else None)  # type: ignore[operator]


# What the page and the plots take from each file.
_PARTS = dict.fromkeys(["peak", *(name for _, names in MEMORY_PARTS for name in names)], number)
_MEMORY = {"planned?": _PARTS, "measured": _PARTS}
_PERIOD = {
    "step": count,
    "layers": [_layer],
    "blocks?": [lambda value: None if value in OUTER_BLOCKS else "is no block"],
    "probabilities?": [number],
    "state_bytes_per_rank?": count,
    "seconds?": number,
}
_ANSWER = {"step": count, "prompt": str, "answer": str}
_MOVEMENT = {"blocks": Each({"relative": number})}
_LOGGED = ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes", "train_runtime")
_ENTRY = {f"{name}?": number for name in _LOGGED}
# A norm may be infinite or NaN: an fp16 scaler leaves such a step out.
_ENTRY["grad_norm?"] = lambda value: None if isinstance(value, int | float) else "is no number"
_RUN = dict.fromkeys(("method?", "model?", "devices?", "began?", "command?"), str) | {
    "flags?": dict,
    "versions?": dict,
    "given?": [str],
    "rows?": [str],
    "resumed?": [{"began": str, "command": str, "before?": dict}],
    "parameters?": count,
    "num_layers?": _layer,
    "modules?": [str],
}


@dataclass
class RunFiles:
    """A run: its settings, the Trainer's log, and LISA's logs, each empty if the run has none."""

    folder: Path
    run: dict = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    periods: list[dict] = field(default_factory=list)
    movement: list[dict] = field(default_factory=list)
    answers: list[dict] = field(default_factory=list)
    memory: dict | None = None
    problems: list[str] = field(default_factory=list)  # what of the files is damaged, and left out

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one entry of the log."""
        logged = [line for line in self.log if name in line and math.isfinite(line[name])]
        return [line["step"] for line in logged], [line[name] for line in logged]

    @property
    def last_step(self) -> int:
        """The step of the last log."""
        return max((line["step"] for line in self.log), default=0)

    @property
    def modules(self) -> list[str]:
        """The linear modules that were sampled, by name; none where layers were."""
        return self.run.get("modules") or []

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model, or modules; where that is not recorded, up to the highest that trained."""
        trained = [layer for period in self.periods for layer in period["layers"]]
        return len(self.modules) or self.run.get("num_layers") or 1 + max(trained, default=-1)

    @property
    def units(self) -> list[str]:
        """The names of the blocks that were sampled: layers.0 or layers.0.mlp.up_proj."""
        return self.modules or [f"layers.{layer}" for layer in range(self.num_layers)]

    @property
    def unit(self) -> str:
        """What they are."""
        return "linear module" if self.modules else "decoder layer"

    @property
    def visits(self) -> list[int]:
        """In how many periods each layer has trained."""
        return [sum(layer in period["layers"] for period in self.periods) for layer in range(self.num_layers)]


def read_run(folder: str | Path) -> RunFiles:
    """Read an output folder; a run that has not ended is read up to its last log.

    Raises ValueError for a folder without a run, and for a file that cannot be read.
    """
    folder = Path(folder)
    states = [path / TRAINER_STATE_NAME for path in (folder, *folder.glob("checkpoint-*"))]
    newest = max(filter(Path.is_file, states), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None and not (folder / STEPS_NAME).is_file():
        raise UserError(
            f"{folder}: there is no {TRAINER_STATE_NAME} in it or in a checkpoint of it: give the --output_dir of a "
            "run that has begun."
        )
    run = RunFiles(folder)
    run.log = _read_log(newest, run.problems) if newest is not None else []
    logged = read_lines(folder / STEPS_NAME, None, run.problems.append)
    if logged and logged[-1]["step"] > run.last_step:
        name = str(folder / STEPS_NAME)
        run.log = [_fitting(entry, _ENTRY, f"{name}: step {entry['step']}", run.problems) for entry in logged]
    run.periods = read_lines(folder / LOG_NAME, _PERIOD, run.problems.append)
    run.movement = read_lines(folder / MOVEMENT_LOG, _MOVEMENT, run.problems.append)
    run.answers = read_lines(folder / ANSWERS_NAME, _ANSWER, run.problems.append)
    if (path := folder / RUN_NAME).is_file():
        run.run = _fitting(read_object(path), _RUN, str(path), run.problems)
    if (path := folder / MEMORY_NAME).is_file():
        memory = read_object(path)
        found = misfit(memory, _MEMORY)
        run.memory = memory if found is None else None
        run.problems += [f"{path}: is damaged, and left out: {found}."] if found else []
    return run


def _read_log(path: Path, problems: list[str]) -> list[dict]:
    """The entries of the Trainer's log that have a step, with those of their values that are numbers."""
    state = read_object(path)
    if found := misfit(state, {"log_history": list}):
        raise UserError(f"{path}: is damaged: {found}.")
    log = []
    for at, entry in enumerate(state["log_history"]):
        name = f"{path}: log_history[{at}]"
        if found := misfit(entry, {"step": count}):
            problems.append(f"{name} is damaged, and left out: {found}.")
        else:
            log.append(_fitting(entry, _ENTRY, name, problems))
    return log


def _fitting(values: Mapping[str, Any], shapes: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    """The values but those that are null, or not of their shape, of which `problems` gets a line each."""
    kept = {key: value for key, value in values.items() if value is not None}
    for key, shape in shapes.items():
        if found := misfit(values, {key: shape}):
            problems.append(f"{name} is damaged: {found}.")
            del kept[key.removesuffix("?")]
    return kept
