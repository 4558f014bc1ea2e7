"""The index of the benchmarks: a row for every results file, by the script that made it, and for scripts without."""

import ast
import shlex
from pathlib import Path

from benchmarks.tables.render import Benchmarks, Rows

HEADER = ["benchmark", "question", "command", "results", "machine", "device"]


def index(benchmarks: Benchmarks) -> Rows:
    """The rows of the index, by folder; then the results of scripts that are gone."""
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
        rows += rows_of(about, made_by.pop(path.stem, []), benchmarks) or [[*about, "not run yet", "", "", ""]]
    for script, found in made_by.items():
        rows += rows_of([script, "measured once, by a script that is gone"], found, benchmarks)
    return rows


def rows_of(about: list[str], names: list[str], benchmarks: Benchmarks) -> Rows:
    """A row for each of the results of a script, those of its own name first; the first says what the script is."""
    rows = []
    for name in sorted(names, key=lambda name: not about[0].startswith(f"[{name}]")):
        found = benchmarks.results(name)
        link = f"[{name}](results/{name}.json)"
        rows.append([*about, f"`{shown_command(found)}`", link, found["machine"], found["device"]])
        about = ["", ""]
    return rows


def shown_command(results: dict) -> str:
    """The command that made them; of files outside the repository the name, wherever they lie.

    Of an option that was given twice the last counts, and is shown; pareto.py's --task counts each time.
    """
    options: list[list[str]] = [[]]
    for word in shlex.split(results["command"]):
        if word.startswith("--"):
            options = [option for option in options if option[:1] != [word] or word == "--task"] + [[]]
        options[-1].append(Path(word).name if word.startswith(("/", "..")) else word)
    words = [word for option in options for word in option]
    return " ".join(f'"{word}"' if "'" in word else shlex.quote(word) for word in words)
