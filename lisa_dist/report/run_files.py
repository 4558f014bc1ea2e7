"""What a run leaves in its output folder, read back for the report."""

from dataclasses import dataclass, field
from pathlib import Path

from lisa_dist.errors import UserError
from lisa_dist.run_folder import (
    LOG_NAME,
    MEMORY_NAME,
    MOVEMENT_LOG,
    RUN_NAME,
    TRAINER_STATE_NAME,
    read_lines,
    read_object,
)


@dataclass
class RunFiles:
    """A run: its settings, the Trainer's log, and LISA's logs, each empty if the run has none."""

    folder: Path
    run: dict = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    periods: list[dict] = field(default_factory=list)
    movement: list[dict] = field(default_factory=list)
    memory: dict | None = None

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one entry of the log."""
        logged = [line for line in self.log if name in line]
        return [line["step"] for line in logged], [line[name] for line in logged]

    @property
    def last_step(self) -> int:
        """The step of the last log."""
        return max((line["step"] for line in self.log), default=0)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model; where it is not recorded, up to the highest that trained."""
        trained = [layer for period in self.periods for layer in period["layers"]]
        return self.run.get("num_layers") or 1 + max(trained, default=-1)

    @property
    def visits(self) -> list[int]:
        """In how many periods each layer has trained."""
        return [sum(layer in period["layers"] for period in self.periods) for layer in range(self.num_layers)]


def read_run(folder: str | Path) -> RunFiles:
    """Read an output folder; a run that has not ended is read up to its newest checkpoint.

    Raises ValueError for a folder without a run, and for a file that cannot be read.
    """
    folder = Path(folder)
    states = [path / TRAINER_STATE_NAME for path in (folder, *folder.glob("checkpoint-*"))]
    newest = max(filter(Path.is_file, states), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(
            f"{folder}: there is no {TRAINER_STATE_NAME} in it or in a checkpoint of it: give the --output_dir of a "
            "run that has saved once."
        )
    memory = folder / MEMORY_NAME
    return RunFiles(
        folder,
        run=read_object(folder / RUN_NAME) if (folder / RUN_NAME).is_file() else {},
        log=read_object(newest)["log_history"],
        periods=read_lines(folder / LOG_NAME),
        movement=read_lines(folder / MOVEMENT_LOG),
        memory=read_object(memory) if memory.is_file() else None,
    )
