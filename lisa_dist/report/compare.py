"""Several runs side by side: losses and gradient norms in one plot each, figures, answers and settings as columns."""

import html
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lisa_dist.errors import UserError
from lisa_dist.files import replacing
from lisa_dist.report.html import as_svg, cards, fill_page, format_value, picture, section, title_of
from lisa_dist.report.plots import new_axes, points_of, smoothed, with_style
from lisa_dist.report.run_files import RunFiles, read_run

PAGE_NAME = "lisa_runs.html"
_COLORS = ("#2563eb", "#d9580d", "#15803d", "#9333ea", "#b91c1c", "#0e7490")


def write_comparison(folders: Sequence[str | Path], page: Path) -> Path:
    """Write the page of these output folders.

    Raises ValueError for a folder without a run, or given twice; OSError where the page cannot be written.
    """
    runs = {_name(folder, folders): read_run(folder) for folder in folders}
    if len(runs) < len(folders):
        raise UserError("a run is given twice; name each folder once.")
    problems = [problem for run in runs.values() for problem in run.problems]
    sections = [
        _plot(runs, "loss", "Training loss", "Smoothed.", smooth=True),
        _plot(runs, "eval_loss", "Held-out loss", "At every evaluation."),
        _plot(runs, "grad_norm", "Gradient norm", "Before clipping, smoothed.", smooth=True),
        section("figures", "Figures", "Of each run.", _table(runs, _figures(runs))),
        _answers(runs),
        section("settings", "Settings", "Those that differ.", _table(runs, _differing(runs))),
    ]
    parts = {
        "title": f"{len(runs)} runs",
        "subtitle": html.escape("; ".join(dict.fromkeys(map(title_of, runs.values())))),
        "cards": "",
        "problems": "".join(f"<p>{html.escape(problem)}</p>" for problem in problems),
        "sections": "\n".join(sections),
    }
    with replacing(page) as new:
        new.write_text(fill_page(parts), encoding="utf-8", errors="replace")
    return page


def _name(folder: str | Path, folders: Sequence[str | Path]) -> str:
    """The folder's name; its whole path where others have that name too."""
    names = [Path(one).resolve().name for one in folders]
    path = Path(folder).resolve()
    return path.name if names.count(path.name) == 1 else str(path)


def _plot(runs: dict[str, RunFiles], entry: str, title: str, caption: str, smooth: bool = False) -> str:
    shown = {name: run.series(entry) for name, run in runs.items() if run.series(entry)[0]}
    if not shown:
        return ""

    def draw(figure: Figure) -> None:
        axes = new_axes(figure, "optimizer step", "norm" if entry == "grad_norm" else "loss")
        marker = None if smooth else "o"
        for place, (name, (steps, losses)) in enumerate(shown.items()):
            color, values = _COLORS[place % len(_COLORS)], smoothed(losses) if smooth else losses
            axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=3, label=name)
        axes.legend(frameon=False)

    narrow, wide = with_style(draw, narrow=True), with_style(draw)
    shapes = as_svg(narrow), as_svg(wide)
    points = {"narrow": points_of(narrow, title), "wide": points_of(wide, title)}
    return section(entry, title, caption, picture(title, *shapes, points))


def _figures(runs: dict[str, RunFiles]) -> dict[str, list[str]]:
    of_each = [dict(cards(run)) for run in runs.values()]
    names = dict.fromkeys(name for found in of_each for name in found)
    return {name: [found.get(name, "") for found in of_each] for name in names}


def _answers(runs: dict[str, RunFiles]) -> str:
    """The last answers to every prompt that a run was asked."""
    prompts = dict.fromkeys(answer["prompt"] for run in runs.values() for answer in run.answers)
    of_each = [{answer["prompt"]: answer["answer"] for answer in run.answers} for run in runs.values()]
    rows = {prompt: [answers.get(prompt, "") for answers in of_each] for prompt in prompts}
    return section("answers", "Answers", "The last of each run.", _table(runs, rows)) if rows else ""


def _differing(runs: dict[str, RunFiles]) -> dict[str, list[str]]:
    of_each = [run.run.get("flags", {}) for run in runs.values()]
    names = dict.fromkeys(name for flags in of_each for name in flags)
    rows = {name: [format_value(flags.get(name)) for flags in of_each] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _table(runs: dict[str, RunFiles], rows: dict[str, list[str]]) -> str:
    header = "".join(f"<th>{html.escape(name)}</th>" for name in runs)
    lines = [f"<tr><th></th>{header}</tr>"]
    for name, values in rows.items():
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return f'<table class="runs">{"".join(lines)}</table>'
