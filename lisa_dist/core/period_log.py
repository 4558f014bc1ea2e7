"""lisa_log.jsonl: a line for each period, written after its first step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisa_dist.core.sampling import ActiveSet
from lisa_dist.run_folder import LOG_NAME, append_line


@dataclass
class PeriodRecord:
    """One line of lisa_log.jsonl. Seconds are of the switch; bytes are of this rank, after the period's first step.

    `blocks` are the outer blocks that train in this period in addition to the always-trained ones; `host_bytes` are
    states of inactive blocks that wait on the host; `probabilities`, of samplers with weights, are those of each layer
    to be sampled.
    """

    period: int
    step: int
    layers: list[int]
    blocks: list[str]
    seconds: float
    state_bytes_per_rank: int = 0
    bytes_released: int = 0
    live_bytes: int = 0
    host_bytes: int = 0
    probabilities: list[float] = field(default_factory=list)


class PeriodLog:
    """The records of a run in `records`; the rank that was given a folder writes them too."""

    def __init__(self) -> None:
        self.records: list[PeriodRecord] = []
        self.resumed = False
        self._open: PeriodRecord | None = None
        self._path: Path | None = None
        self._begun = False

    def write_to(self, folder: str) -> None:
        """Write to lisa_log.jsonl in a folder, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._path = Path(folder) / LOG_NAME

    def resume(self) -> None:
        """A state has been loaded: the lines of the steps before it stay, those of later ones go."""
        self.resumed, self._begun = True, False

    def begin(self, active: ActiveSet, **fields: Any) -> None:
        """A period begins, in which these blocks train; `fields` are further ones of its record."""
        self.open(PeriodRecord(layers=list(active.layers), blocks=list(active.blocks), **fields))

    def open(self, record: PeriodRecord | None) -> None:
        """A period begins; its bytes are not known yet. None: there is no line to be written before the next switch."""
        self._open = record
        if record is not None:
            self.records = [earlier for earlier in self.records if earlier.step < record.step]

    def close(self, step: int, measure: Callable[[], dict[str, int]]) -> None:
        """Complete the period's record by what `measure` gives, and write it, if its first step has been taken."""
        record = self._open
        if record is None or step == record.step:
            return
        self._open = None
        vars(record).update(measure())
        self.records.append(record)
        if self._path is not None:
            before = record.step if self.resumed else 0
            append_line(self._path, vars(record), None if self._begun else lambda earlier: earlier["step"] < before)
            self._begun = True

    def state_dict(self) -> dict[str, Any] | None:
        """The record that is still open, for a resumed run to complete."""
        return None if self._open is None else vars(self._open).copy()
