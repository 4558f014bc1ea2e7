"""Print the tables that a script's figures make, as they stand on the pages."""

from benchmarks.common.results import print_table
from benchmarks.tables import quality, rows  # noqa: F401 - both register tables
from benchmarks.tables.index import sentence
from benchmarks.tables.parts import TABLES


def show(script: str, figures: dict, results: str | None = None) -> None:
    """The tables of a results file alone, by default that of the script's name, and what the index says of it."""
    for names, function in TABLES.values():
        if names == (results or script,):
            header, *lines = function(figures)
            print_table(header, lines)
            print()
    print(sentence(script, figures))
