"""What tables are made of: results, a register of tables and of what the index says, figures as pages have them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Rows = list[list[str]]  # the first is the header
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., Rows]]] = {}  # by name: the results it reads, and the function
LATEST: dict[str, Callable[[dict], str]] = {}


class TableError(ValueError):
    """A page, or results, of which no table can be made; the message says which and why."""


@dataclass(frozen=True)
class Benchmarks:
    """A folder of scripts, and their results, each of which is read once."""

    folder: Path
    _read: dict[str, dict] = field(default_factory=dict, repr=False, compare=False)

    def results(self, name: str) -> dict:
        """A results file: command, machine, device, versions, figures."""
        if name in self._read:
            return self._read[name]
        path = self.folder / "results" / f"{name}.json"
        if not path.is_file():
            raise TableError(f"there is no benchmarks/results/{path.name}")
        try:
            self._read[name] = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise TableError(f"benchmarks/results/{path.name} is no JSON ({error})") from error
        return self._read[name]

    def rows(self, table: str) -> Rows:
        """The rows of a table, from the figures of the results that it reads."""
        names, function = TABLES[table]
        return function(*(self.results(name)["figures"] for name in names))

    def results_of(self, script: str) -> dict[str, dict]:
        """All results that a script has written, by the commands in them; those of its own name first."""
        names = sorted(path.stem for path in self.folder.glob("results/*.json"))
        found = {name: self.results(name) for name in sorted(names, key=lambda name: name != script)}
        return {name: one for name, one in found.items() if one["command"].split()[2].rpartition(".")[2] == script}


def table(name: str, *results: str) -> Callable:
    """Of a function: it makes the rows of the table of this name, from the figures of these results."""
    return lambda function: register(TABLES, name, function, (results, function))


def latest(script: str) -> Callable:
    """Of a function: it says in the index, from the figures of this script, what came of it."""
    return lambda function: register(LATEST, script, function, function)


def register(functions: dict, name: str, function: Callable, entry: object) -> Callable:
    assert name not in functions, name
    functions[name] = entry
    return function


# Figures as the pages have them


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def loss(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}"


def rate(value: float) -> str:
    """A learning rate: 4e-3, 3.2e-2."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def times(value: float) -> str:
    """A ratio, in three digits."""
    return f"{value:#.3g}" if value else "0"


def named(values: dict[str, str]) -> str:
    """Values after their names, in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())
