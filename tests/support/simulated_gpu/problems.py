"""What a real GPU would have done wrong or refused, each place once."""

import traceback
from dataclasses import dataclass

# Files of the simulation itself and of what only passes a call on.
_PASSING = ("simulated_gpu", "torch/overrides", "_python_dispatch", "torch/nn/modules/module", "torch/_compile")


@dataclass(frozen=True)
class Problem:
    """`kind` is one of a few words, `text` says what happened, `where` the calls that led to it, the innermost last."""

    kind: str
    text: str
    where: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}\n    " + "\n    ".join(self.where)


PROBLEMS: dict[tuple, Problem] = {}


def report(kind: str, text: str) -> None:
    """Note a problem, if it is the first of its kind in its place."""
    where = calls(14)
    PROBLEMS.setdefault((kind, where[-5:]), Problem(kind, text, where))


def calls(count: int) -> tuple[str, ...]:
    """The innermost calls of the program that is rehearsed."""
    frames = traceback.extract_stack(limit=60)
    shown = [frame for frame in frames if not any(part in frame.filename for part in _PASSING)]
    return tuple(f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in shown[-count:])


def _short(path: str) -> str:
    return path.split("site-packages/")[-1].split("/lisa_dist/")[-1]
