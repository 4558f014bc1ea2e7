"""What a real GPU would have done wrong or refused, each place once."""

import functools
import sys
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
    """The innermost calls of the program that is rehearsed, the innermost last."""
    shown: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(shown) < count:
        code = frame.f_code
        if not _passes(code.co_filename):
            shown.append(f"{_short(code.co_filename)}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return tuple(reversed(shown))


@functools.cache
def _passes(path: str) -> bool:
    return any(part in path for part in _PASSING)


def _short(path: str) -> str:
    return path.split("site-packages/")[-1].split("/lisa_dist/")[-1]
