"""The tables of tables.yaml by their names."""

from pathlib import Path

import yaml

from benchmarks.tables import rows
from benchmarks.tables.render import Table, print_table

TABLES = {
    name: Table(**declared | {"rows": getattr(rows, declared["rows"])})
    for name, declared in yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8")).items()
}


def show(results: str, figures: dict) -> None:
    """Print the tables of a results file alone, as they stand on the pages."""
    for table in (table for table in TABLES.values() if table.results == [results]):
        print_table(*table.make(figures))
        print()
