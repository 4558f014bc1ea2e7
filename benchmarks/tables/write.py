"""Write the tables of README, docs and benchmarks from benchmarks/results, so that no figure is typed by hand.

python -m benchmarks.tables.write            # writes what has changed
python -m benchmarks.tables.write --check    # writes nothing; exit status 1 where a page and the results differ

A table stands on any of the pages between `<!-- table: NAME -->` and `<!-- end -->`, and NAME is one of tables.yaml, or
`index`: a row for every script, with its results.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

from benchmarks.tables.render import Benchmarks, Rows, TableError
from benchmarks.tables.rows import TABLES

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/*.md", "benchmarks/*.md")
END = "<!-- end -->"


def index(benchmarks: Benchmarks) -> Rows:
    """A row for every script, with its results and their devices; then for results of scripts that are gone."""
    abouts, rows = {}, [["benchmark", "question", "results", "device"]]
    for path in sorted(benchmarks.folder.glob("*/*.py")):
        script = ast.parse(path.read_text(encoding="utf-8"))
        # Others measure nothing: what scripts are made of, and what makes the tables.
        if path.parent.name != "tables" and "main" in (getattr(part, "name", None) for part in script.body):
            asked = ast.get_docstring(script).splitlines()[0]
            abouts[path.stem] = [f"[{path.stem}]({path.parent.name}/{path.name})", asked]
    results = {path.stem: benchmarks.results(path.stem) for path in sorted(benchmarks.folder.glob("results/*.json"))}
    made_by = {name: one["command"].split()[2].rpartition(".")[2] for name, one in results.items()}
    for script in dict.fromkeys([*abouts, *made_by.values()]):
        names = sorted((name for name in results if made_by[name] == script), key=lambda name: name != script)
        links = ", ".join(f"[{name}](results/{name}.json)" for name in names) or "not run yet"
        devices = ", ".join(sorted({results[name]["device"] for name in names}))
        rows.append([*abouts.get(script, [script, "measured once, by a script that is gone"]), links, devices])
    return rows


def markdown(rows: Rows) -> str:
    """A table; its first row is the header. A bar within a cell would end it."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return re.sub(r" +\|", " |", "\n".join(lines)) + "\n"


def make(name: str, benchmarks: Benchmarks) -> str:
    """The table of a name as it should be."""
    if name not in (*TABLES, "index"):
        raise TableError(f"there is no table {name}; there are {', '.join(sorted([*TABLES, 'index']))}")
    try:
        return markdown(index(benchmarks) if name == "index" else benchmarks.rows(TABLES[name]))
    except TableError as error:
        raise TableError(f"table {name}: {error}") from error
    except (OSError, LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise TableError(f"table {name}: its results are missing, or of another shape ({error!r})") from error


def with_tables(page: str, benchmarks: Benchmarks) -> tuple[str, list[str]]:
    """A page with its tables as they should be, and the names of those that were not."""
    written, *parts = re.split(r"^<!-- table: (.*) -->\n", page, flags=re.MULTILINE)
    loose, differ = written, []
    for name, rest in zip(parts[::2], parts[1::2], strict=True):
        old, end, after = rest.partition(END)
        if not end:
            raise TableError(f"the table {name} has no {END}")
        new = make(name, benchmarks)
        written += f"<!-- table: {name} -->\n{new}{END}{after}"
        loose += after
        differ += [name] * (old != new)
    if END in loose:
        raise TableError(f"there is an {END} that no line <!-- table: NAME --> begins")
    return written, differ


def changed_pages(root: Path) -> dict[Path, tuple[str, list[str]]]:
    """The pages whose tables differ: what they should be, and the names of the tables."""
    benchmarks, changed = Benchmarks(root / "benchmarks"), {}
    for path in (path for pattern in PAGES for path in sorted(root.glob(pattern))):
        try:
            page, differ = with_tables(path.read_text(encoding="utf-8"), benchmarks)
        except TableError as error:
            raise TableError(f"{path.relative_to(root)}: {error}.") from error
        if differ:
            changed[path] = (page, differ)
    return changed


def main(words: list[str] | None = None, root: Path = ROOT) -> None:
    """Write the pages whose tables differ, or with --check name them and exit with status 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    arguments = parser.parse_args(words)
    try:
        changed = changed_pages(root)
    except TableError as error:
        sys.exit(str(error))
    for path, (page, differ) in changed.items():
        print(f"{path.relative_to(root)}: {', '.join(differ)}")
        if not arguments.check:
            path.write_text(page, encoding="utf-8")
    if arguments.check and changed:
        sys.exit("These tables are not what the results say: python -m benchmarks.tables.write writes them.")


if __name__ == "__main__":
    main()
