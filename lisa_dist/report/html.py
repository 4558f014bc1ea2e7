"""`report.html` of a run: plots, settings and the command that repeats it, in one file that needs no network.

The folder `report/` has the plots as PNG. Written at the end of a run, and at any time by `lisa-dist report DIR`.
"""

import base64
import html
import io
import re
from collections.abc import Callable
from datetime import timedelta
from importlib import resources
from pathlib import Path

from matplotlib.figure import Figure

from lisa_dist.files import replacing
from lisa_dist.report.plots import PLOTS, Plot, draw
from lisa_dist.report.run_files import RunFiles, read_run
from lisa_dist.text import format_bytes, format_count

REPORT_NAME, PLOTS_FOLDER = "report.html", "report"
_DPI = 150


def write_report(folder: str | Path) -> Path:
    """Write the report and the plots of the run in an output folder; returns the path of the report.

    Raises ValueError for a folder without a run, OSError where a file cannot be written.
    """
    run = read_run(folder)
    for problem in run.problems:
        print(f"warning: {problem}", flush=True)
    page = _fill(run, "\n".join(_section(run, *plot) for plot in PLOTS))
    path = run.folder / REPORT_NAME
    with replacing(path) as new:
        new.write_text(page, encoding="utf-8", errors="replace")  # halves of characters, which JSON can hold
    return path


def _section(
    run: RunFiles, name: str, title: str, caption: str, plot: Plot, has_data: Callable[[RunFiles], bool]
) -> str:
    if not has_data(run):
        return ""
    wide, narrow = draw(plot, run), draw(plot, run, narrow=True)
    (run.folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    with replacing(run.folder / PLOTS_FOLDER / f"{name}.png") as new:
        wide.savefig(new, dpi=_DPI, format="png")
    return (
        f'<section id="{name}"><h2>{title}</h2><p>{caption}</p><picture>'
        f'<source media="(max-width: 640px)" srcset="{_as_svg(narrow)}">'
        f'<img alt="{title}" src="{_as_svg(wide)}"></picture></section>'
    )


def _as_svg(figure: Figure) -> str:
    """A figure as a data URL. Its text is drawn as shapes, so it needs no font."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue().encode()).decode()


def _fill(run: RunFiles, sections: str) -> str:
    template = (resources.files("lisa_dist.report") / "report.html").read_text(encoding="utf-8")
    flags = run.run.get("flags", {})
    parts = {
        "title": html.escape(run.folder.resolve().name),
        "subtitle": html.escape(_subtitle(run)),
        "cards": "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in _cards(run)),
        "problems": "".join(f"<p>{html.escape(problem)}</p>" for problem in run.problems),
        "sections": sections,
        "command": html.escape(_commands(run)),
        "given": _table({name: value for name, value in flags.items() if name in run.run.get("given", [])}),
        "flags": _table(flags),
        "versions": _table(run.run.get("versions", {})),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # in one pass: values may have braces too


def _commands(run: RunFiles) -> str:
    """The command that started the run, and those that resumed it."""
    if not run.run:
        return "# a custom loop or trainer: its settings are in its code"
    resumed = [f"# resumed {part['began']}\n{part['command']}" for part in run.run.get("resumed", [])]
    return "\n".join([run.run.get("command", ""), *resumed])


def _subtitle(run: RunFiles) -> str:
    values = [run.run.get(name, "") for name in ("method", "model", "devices", "began")]
    return ", ".join(filter(None, values))


def _cards(run: RunFiles) -> list[tuple[str, str]]:
    """The key figures at the top of the page."""
    losses, held_out = run.series("loss")[1], run.series("eval_loss")[1]
    speeds, peaks = sorted(run.series("tokens_per_second")[1]), run.series("memory_bytes")[1]
    seconds = run.series("train_runtime")[1]
    cards = [("steps", str(run.last_step))]
    cards += [("last loss", f"{losses[-1]:.4f}")] if losses else []
    if len(held_out) > 1:
        cards.append(("held-out loss, first to last", f"{held_out[0]:.4f} → {held_out[-1]:.4f}"))
    elif held_out:
        cards.append(("held-out loss", f"{held_out[-1]:.4f}"))
    duration = "time since the last resume" if run.run.get("resumed") else "time"
    cards += [(duration, str(timedelta(seconds=round(seconds[-1]))))] if seconds else []
    cards += [("tokens / s, median", f"{speeds[len(speeds) // 2]:,.0f}")] if speeds else []
    cards += [("peak memory per rank", format_bytes(int(max(peaks))))] if peaks else []
    if run.run.get("parameters"):
        cards.append(("parameters", format_count(run.run["parameters"])))
    if run.periods:
        cards.append(("periods", str(len(run.periods))))
        states = [period["state_bytes_per_rank"] for period in run.periods if period.get("state_bytes_per_rank")]
        cards += [("optimizer states per rank", format_bytes(states[-1]))] if states else []
        switches = [period["seconds"] for period in run.periods[1:] if period.get("seconds") is not None]
        cards += [("seconds per switch, mean", f"{sum(switches) / len(switches):.3f}")] if switches else []
    return cards


def _table(entries: dict) -> str:
    cells = ((html.escape(name), html.escape(_format(value))) for name, value in entries.items())
    rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
    return f"<table>{rows}</table>"


def _format(value: object) -> str:
    """A value as a recipe or a command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_format, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
