"""What a run leaves in its output folder, read back: for the report, and for whoever compares runs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from lisa_dist.config import UserError
from lisa_dist.files import replacing
from lisa_dist.movement import MOVEMENT_LOG
from lisa_dist.period_log import LOG_NAME, read_lines
from lisa_dist.run_memory import MEMORY_NAME

RUN_NAME = "lisa_run.json"


@dataclass
class RunFiles:
    """A run: its settings, the Trainer's log, and what LISA wrote beside it, empty where the run had none of it."""

    folder: Path
    run: dict = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    periods: list[dict] = field(default_factory=list)
    movement: list[dict] = field(default_factory=list)
    memory: dict | None = None

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one entry of the log, wherever it was logged."""
        logged = [line for line in self.log if name in line]
        return [line["step"] for line in logged], [line[name] for line in logged]

    @property
    def last_step(self) -> int:
        """The step of the last log."""
        return max((line["step"] for line in self.log), default=0)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model; 0 for a run that was none of LISA's."""
        return self.run.get("num_layers") or 0

    @property
    def visits(self) -> list[int]:
        """In how many periods each layer has trained."""
        return [sum(layer in period["layers"] for period in self.periods) for layer in range(self.num_layers)]


def write_run(folder: Path, run: dict) -> None:
    """Write the settings of a run that begins; on one rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RUN_NAME) as path:
        path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def read_run(folder: str | Path) -> RunFiles:
    """Read an output folder; of a run that has not ended, what its newest checkpoint knows.

    Raises ValueError where there is no run in it, or a file of it cannot be read.
    """
    folder = Path(folder)
    states = [folder / TRAINER_STATE_NAME]
    states += sorted(folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"), key=lambda path: -path.stat().st_mtime)
    found = next((path for path in states if path.is_file()), None)
    if found is None:
        raise UserError(
            f"{folder}: there is no {TRAINER_STATE_NAME} in it or in a checkpoint of it: give the --output_dir of a "
            "run that has saved once."
        )
    memory = folder / MEMORY_NAME
    return RunFiles(
        folder,
        run=_read(folder / RUN_NAME, json.loads) if (folder / RUN_NAME).is_file() else {},
        log=_read(found, json.loads)["log_history"],
        periods=read_lines(folder / LOG_NAME),
        movement=read_lines(folder / MOVEMENT_LOG),
        memory=_read(memory, json.loads) if memory.is_file() else None,
    )


def _read(path: Path, parse: Callable[[str], dict]) -> dict:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
