"""How a table of tables.yaml becomes cells, and figures as the pages have them."""

import json
import statistics
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Rows = list[list[str]]  # the first is the header


class TableError(ValueError):
    """A page, or results, of which no table can be made; the message says which and why."""


def rate(value: float) -> str:
    """A learning rate: 4e-3, 3.2e-2."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the least and the most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


FORMATS: dict[str, Callable[[Any], str]] = {
    "rate": rate,
    "gib": lambda count: f"{count / 2**30:.2f}",
    "gib1": lambda count: f"{count / 2**30:.1f}",
    "host": lambda count: f"{count / 2**30:.0f}" if count else "-",
    "mib": lambda count: f"{count / 2**20:.0f} MiB",
    "mib1": lambda count: f"{count / 2**20:.1f}",
    "MB": lambda count: f"{count / 1e6:,.1f}",
    "GB": lambda count: f"{count / 1e9:.2f}",
    "GB1": lambda count: f"{count / 1e9:.1f}",
    "million": lambda count: f"{count / 1e6:.0f} M",
    "times": lambda ratio: ratio if ratio == "tied" else f"{ratio:#.3g}" if ratio else "0",
    "two digits": lambda value: f"{float(f'{value:.2g}'):,.0f}",
    "median": lambda values: f"{statistics.median(values):.2f}",
    "spread": lambda values: spread(values, 2),
    "spread3": lambda values: spread(values, 3),
}


class _Formatter(string.Formatter):
    """Knows `FORMATS` besides Python's own; None is a dash."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "-"
        return FORMATS[format_spec](value) if format_spec in FORMATS else super().format_field(value, format_spec)


@dataclass(frozen=True)
class Table:
    """A declaration of tables.yaml."""

    results: list[str]
    rows: Callable[..., Iterable[Iterable[Any]]]
    header: str
    cells: str
    of: Any = None
    without: tuple[str, ...] = ()  # parts of names, of rows that are left out: others are much like them

    def make(self, *figures: Any) -> Rows:
        """The cells of each row, header first, from the figures of the results."""
        made = [_filled(self.header, figures), *(_filled(self.cells, row) for row in self.rows(self.of, *figures))]
        made = [row for row in made if not any(part in row[0] for part in self.without)]
        assert {len(row) for row in made} == {len(made[0])}, self.header
        return made


def _filled(template: str, values: Iterable[Any]) -> list[str]:
    of_row = list(values)
    return [_Formatter().vformat(cell.strip(), of_row, {}) for cell in template.split("|")]


def print_table(header: list[str], *rows: list[str]) -> None:
    """A plain table, columns as wide as they need."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    for line in [header, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


@dataclass(frozen=True)
class Benchmarks:
    """A folder of scripts, and their results, each of which is read once."""

    folder: Path
    _read: dict[str, dict] = field(default_factory=dict, repr=False, compare=False)

    def results(self, name: str) -> dict:
        """A results file: command, machine, device, versions, figures."""
        if name not in self._read:
            path = self.folder / "results" / f"{name}.json"
            self._read[name] = json.loads(path.read_text(encoding="utf-8"))
        return self._read[name]

    def rows(self, table: Table) -> Rows:
        """The rows of a table, from the figures of the results that it reads."""
        return table.make(*(self.results(name)["figures"] for name in table.results))
