"""The index of the benchmarks: a row for every script, with its results; then results of scripts that are gone."""

import ast

from benchmarks.tables.render import Benchmarks, Rows

HEADER = ["benchmark", "question", "results", "device"]


def index(benchmarks: Benchmarks) -> Rows:
    """The rows of the index, by folder; a results file has its command, machine and versions."""
    names = sorted(path.stem for path in benchmarks.folder.glob("results/*.json"))
    made_by: dict[str, list[str]] = {}
    for name in names:
        script = benchmarks.results(name)["command"].split()[2].rpartition(".")[2]
        made_by.setdefault(script, []).append(name)
    rows = [HEADER]
    for path in sorted(benchmarks.folder.glob("*/*.py")):
        script = ast.parse(path.read_text(encoding="utf-8"))
        if path.parent.name == "tables" or "main" not in (getattr(part, "name", None) for part in script.body):
            continue  # what others are made of, and what makes the tables: neither measures anything
        about = [f"[{path.stem}]({path.parent.name}/{path.name})", ast.get_docstring(script).splitlines()[0]]
        rows.append([*about, *results_of(path.stem, made_by.pop(path.stem, []), benchmarks)])
    for script, found in made_by.items():
        rows.append([script, "measured once, by a script that is gone", *results_of(script, found, benchmarks)])
    return rows


def results_of(script: str, names: list[str], benchmarks: Benchmarks) -> list[str]:
    """Links to the results of a script, those of its own name first, and the devices that they are of."""
    names = sorted(names, key=lambda name: name != script)
    links = ", ".join(f"[{name}](results/{name}.json)" for name in names) or "not run yet"
    return [links, ", ".join(sorted({benchmarks.results(name)["device"] for name in names}))]
