"""Which blocks have changed since the last checkpoint: the next one has no need to write the others again."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SavedBlocks:
    """The weight files of a checkpoint: the file of each block, and the size and sum of each file."""

    folder: Path
    files: dict[str, str]
    described: dict[str, dict[str, Any]]


class BlockChanges:
    """The names of the blocks that have trained since the last checkpoint, and where that one has the others.

    Steps alone change weights: what else does so must call `forget`.
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
