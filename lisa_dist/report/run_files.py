"""What a run leaves in its output folder, read back: for the report, and for whoever compares runs."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from lisa_dist.config import UserError
from lisa_dist.core.movement import MOVEMENT_LOG
from lisa_dist.core.period_log import LOG_NAME, read_lines
from lisa_dist.files import replacing
from lisa_dist.memory.run_memory import MEMORY_NAME
from lisa_dist.train.layer_norms import NORMS_NAME

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
        """Decoder layers of the model, or as many as have trained where nothing tells; 0 for a run without LISA."""
        trained = [layer for period in self.periods for layer in period["layers"]]
        return self.run.get("num_layers") or 1 + max(trained, default=-1)

    @property
    def visits(self) -> list[int]:
        """In how many periods each layer has trained."""
        return [sum(layer in period["layers"] for period in self.periods) for layer in range(self.num_layers)]


def write_run(folder: Path, run: dict, resumes: bool = False) -> None:
    """Write the settings of a run that begins, on one rank; of one that goes on the first beginning stays.

    What another run has left in the folder is no part of one that begins anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if resumes and (folder / RUN_NAME).is_file():
        first = _read(folder / RUN_NAME, json.loads)
        kept = {name: first[name] for name in ("began", "command", "given") if name in first}
        run = run | kept | {"resumed": [*first.get("resumed", []), {name: run[name] for name in ("began", "command")}]}
    elif not resumes:
        for name in (LOG_NAME, MOVEMENT_LOG, MEMORY_NAME, NORMS_NAME, TRAINER_STATE_NAME):
            (folder / name).unlink(missing_ok=True)
    with replacing(folder / RUN_NAME) as path:
        path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def without_secrets(words: Iterable[str]) -> list[str]:
    """The words of a command line with *** in the place of tokens and the like."""
    kept, hides = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = word.startswith("--") and any(part in name for part in ("token", "secret", "password", "api_key"))
        kept.append("***" if hides else f"{name}=***" if secret and equals else word)
        hides = secret and not equals
    return kept


def read_run(folder: str | Path) -> RunFiles:
    """Read an output folder; of a run that has not ended, what its newest checkpoint knows.

    Raises ValueError where there is no run in it, or a file of it cannot be read.
    """
    folder = Path(folder)
    states = [path for path in (folder, *folder.glob("checkpoint-*")) if (path / TRAINER_STATE_NAME).is_file()]
    found = max((path / TRAINER_STATE_NAME for path in states), key=lambda path: path.stat().st_mtime, default=None)
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
