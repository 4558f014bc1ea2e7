"""`report.html` of a run, and a page of several: plots, settings and commands, in one file that needs no network.

The folder `report/` of a run has its plots as PNG. Its report is written at its end, and at any time by
`lisa-dist report DIR`.
"""

import io
import json
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Template
from matplotlib.figure import Figure

from lisa_dist.errors import UserError
from lisa_dist.files import replacing
from lisa_dist.report.plots import PLOTS, THEMES, plot_of_runs, points_of, with_style
from lisa_dist.report.run_files import RunFiles, read_run
from lisa_dist.text import format_bytes, format_count

REPORT_NAME, PAGE_NAME, PLOTS_FOLDER = "report.html", "lisa_runs.html", "report"
_DPI = 150


def write_report(folder: str | Path) -> Path:
    """Write the report and the plots of the run in an output folder; returns the path of the report.

    Raises ValueError for a folder without a run, OSError where a file cannot be written.
    """
    run = read_run(folder)
    for problem in run.problems:
        print(f"warning: {problem}", flush=True)
    plots = run.folder / PLOTS_FOLDER
    plots.mkdir(exist_ok=True)
    return _write_page(run.folder / REPORT_NAME, report_of(run, plots))


def report_of(run: RunFiles, plots: Path | None = None) -> dict[str, Any]:
    """The parts of a run's page; its plots go to a folder too, where one is given."""
    sections = []
    for name, title, caption, plot, has_tips in PLOTS:
        sections += _plot_section(name, title, caption, lambda figure: plot(run, figure), has_tips, plots)  # noqa: B023
    if run.answers:
        about = {"name": "answers", "title": "Answers", "caption": "To prompts, before and after training."}
        sections.insert(1, about | {"said": _first_and_last(run.answers)})
    if rows := run.run.get("rows"):
        caption = "Sources and examples; where lines begin with >, loss is computed on those alone."
        sections.append({"name": "data", "title": "Data", "caption": caption, "text": "\n".join(rows)})
    flags = {name: _since(run, name, value) for name, value in run.run.get("flags", {}).items()}
    given = {name: value for name, value in flags.items() if name in run.run.get("given", [])}
    tables = {"given": given, "flags": flags, "versions": run.run.get("versions", {})}
    settings: dict[str, Any] = {
        name: [(key, format_value(value)) for key, value in entries.items()] for name, entries in tables.items()
    }
    return {
        "title": title_of(run),
        "subtitle": ", ".join(
            filter(None, (run.folder.resolve().name, *map(run.run.get, ("method", "model", "devices", "began"))))
        ),
        "cards": figures_of(run).items(),
        "problems": run.problems,
        "sections": sections,
        "settings": settings | {"command": _commands(run)},
    }


def write_comparison(folders: Sequence[str | Path], page: Path) -> Path:
    """Write the page of these output folders: losses and gradient norms in one plot each, all else as columns.

    Raises ValueError for a folder without a run, or given twice; OSError where the page cannot be written.
    """
    return _write_page(page, comparison_of(folders))


def comparison_of(folders: Sequence[str | Path]) -> dict[str, Any]:
    """The parts of a page of several runs."""
    paths = [Path(folder).resolve() for folder in folders]
    names = [path.name for path in paths]
    names = [path.name if names.count(path.name) == 1 else str(path) for path in paths]
    runs = {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}
    if len(runs) < len(folders):
        raise UserError("a run is given twice; name each folder once.")
    sections = []
    for entry, title, caption, smooth in (
        ("loss", "Training loss", "Smoothed.", True),
        ("eval_loss", "Held-out loss", "At every evaluation.", False),
        ("grad_norm", "Gradient norm", "Before clipping, smoothed.", True),
    ):
        sections += _plot_section(entry, title, caption, partial(plot_of_runs, runs, entry, smooth))
    flags = [{name: format_value(value) for name, value in run.run.get("flags", {}).items()} for run in runs.values()]
    answers = [{answer["prompt"]: answer["answer"] for answer in run.answers} for run in runs.values()]
    differing = [row for row in _side_by_side(flags) if len(set(row[1:])) > 1]
    for name, title, caption, rows in (
        ("figures", "Figures", "Of each run.", _side_by_side(list(map(figures_of, runs.values())))),
        ("answers", "Answers", "The last of each run.", _side_by_side(answers)),
        ("settings", "Settings", "Those that differ.", differing),
    ):
        about = {"name": name, "title": title, "caption": caption, "rows": rows, "header": list(runs)}
        sections += [about] if rows or name != "answers" else []
    titles = "; ".join(dict.fromkeys(map(title_of, runs.values())))
    problems = [problem for run in runs.values() for problem in run.problems]
    return {"title": f"{len(runs)} runs", "subtitle": titles, "problems": problems, "sections": sections}


def render(parts: dict[str, Any]) -> bytes:
    """A page of these parts. With `refresh` it is loaded again after so many seconds."""
    template = (resources.files("lisa_dist.report") / "report.html").read_text(encoding="utf-8")
    page = Template(template, autoescape=True).render(parts | {"themes": THEMES})
    return page.encode("utf-8", errors="replace")  # halves of characters, which JSON can hold


def _write_page(path: Path, parts: dict[str, Any]) -> Path:
    with replacing(path) as new:
        new.write_bytes(render(parts))
    return path


def _plot_section(
    name: str,
    title: str,
    caption: str,
    plot: Callable[[Figure], None],
    has_tips: bool = True,
    folder: Path | None = None,
) -> list[dict]:
    """A plot for a narrow and for a wide page, also as a PNG in a folder; nothing where it has no data.

    With tips the page's script shows the nearest points.
    """
    wide, narrow = with_style(plot), with_style(plot, narrow=True)
    if not wide.axes:
        return []
    if folder is not None:
        with replacing(folder / f"{name}.png") as new:
            wide.savefig(new, dpi=_DPI, format="png")
    section = {
        "name": name,
        "title": title,
        "caption": caption,
        "narrow": as_svg(narrow, f"n-{name}"),
        "wide": as_svg(wide, f"w-{name}"),
    }
    points = {"narrow": points_of(narrow, title), "wide": points_of(wide, title)} if has_tips else None
    return [section | {"points": points and json.dumps(points)}]


def as_svg(figure: Figure, name: str) -> str:
    """A figure to stand in a page, in the page's colors. Its text is drawn as shapes, so it needs no font.

    `name` is what makes its ids other than those of the page's other figures.
    """
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), transparent=True)
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style .*?</style>", "", svg.getvalue(), flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text[text.index("<svg") :])
    return re.sub("#[0-9a-f]{6}(?![0-9a-f])", lambda found: f"var(--c{found[0][1:]}, {found[0]})", text)


def title_of(run: RunFiles) -> str:
    """The model on its data; of a run that has not recorded them the name of its folder."""
    data = run.run.get("flags", {}).get("--dataset_name") or []
    data = [data] if isinstance(data, str) else data
    if not run.run.get("model") or not data:
        return run.folder.resolve().name
    names = [Path(str(name)).name for name in data]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{Path(run.run['model']).name} on {shown}"


def _first_and_last(answers: list[dict]) -> dict[str, list[tuple[int, str]]]:
    """Steps and answers of each prompt."""
    said: dict[str, list[tuple[int, str]]] = {}
    for answer in answers:
        said.setdefault(answer["prompt"], []).append((answer["step"], answer["answer"]))
    return {prompt: list(dict.fromkeys((found[0], found[-1]))) for prompt, found in said.items()}


def _side_by_side(of_each: list[dict[str, str]]) -> list[list[str]]:
    """A row for each name, with the values of all."""
    names = dict.fromkeys(name for found in of_each for name in found)
    return [[name, *(found.get(name, "") for found in of_each)] for name in names]


def _since(run: RunFiles, name: str, value: object) -> object:
    """The value of a flag; where resumes have changed it the first one, and each of the others with its beginning."""
    changes = [part for part in run.run.get("resumed", []) if name in part.get("before", {})]
    if not changes:
        return value
    values = [*(part["before"][name] for part in changes), value]
    since = [f"{format_value(new)} since {part['began']}" for part, new in zip(changes, values[1:], strict=True)]
    return "; ".join([format_value(values[0]), *since])


def _commands(run: RunFiles) -> str:
    """The command that started the run, and those that resumed it."""
    if not run.run:
        return "# a custom loop or trainer: its settings are in its code"
    resumed = [f"# resumed {part['began']}\n{part['command']}" for part in run.run.get("resumed", [])]
    return "\n".join([run.run.get("command", ""), *resumed])


def figures_of(run: RunFiles) -> dict[str, str]:
    """The key figures of a run, by what they are."""
    losses, held_out = run.series("loss")[1], run.series("eval_loss")[1]
    speeds, peaks = sorted(run.series("tokens_per_second")[1]), run.series("memory_bytes")[1]
    seconds = run.series("train_runtime")[1]
    states = [period["state_bytes_per_rank"] for period in run.periods if period.get("state_bytes_per_rank")]
    switches = [period["seconds"] for period in run.periods[1:] if period.get("seconds") is not None]
    evaluated = "held-out loss, first to last" if len(held_out) > 1 else "held-out loss"
    duration = "time since the last resume" if run.run.get("resumed") else "time"
    found = {
        "steps": str(run.last_step),
        "last loss": losses and f"{losses[-1]:.4f}",
        evaluated: " → ".join(f"{loss:.4f}" for loss in held_out[:: max(1, len(held_out) - 1)]),  # the two ends
        duration: seconds and str(timedelta(seconds=round(seconds[-1]))),
        "tokens / s, median": speeds and f"{speeds[len(speeds) // 2]:,.0f}",
        "peak memory of a rank's GPU, or process": peaks and format_bytes(int(max(peaks))),
        "parameters": run.run.get("parameters") and format_count(run.run["parameters"]),
        "periods": run.periods and str(len(run.periods)),
        "optimizer states per rank": states and format_bytes(states[-1]),
        "seconds per switch, mean": switches and f"{sum(switches) / len(switches):.3f}",
    }
    return {name: str(figure) for name, figure in found.items() if figure}


def format_value(value: object) -> str:
    """A value as a recipe or a command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(format_value, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
