"""`report.html` of a run: plots, settings and the command that repeats it, in one file that needs no network.

The folder `report/` has the plots as PNG. Written at the end of a run, and at any time by `lisa-dist report DIR`.
"""

import base64
import html
import io
import json
import re
from collections.abc import Callable
from datetime import timedelta
from importlib import resources
from pathlib import Path

from matplotlib.figure import Figure

from lisa_dist.files import replacing
from lisa_dist.report.plots import OF_LINES, PLOTS, Plot, draw, points_of
from lisa_dist.report.run_files import RunFiles, read_run
from lisa_dist.text import format_bytes, format_count

REPORT_NAME, PLOTS_FOLDER = "report.html", "report"
_SETTINGS = """<section id="settings">
<h2>Settings</h2>
<p>The command that repeats the run, and what it was given; everything else had its default.</p>
<pre>{{command}}</pre>
{{given}}
<details><summary>All flags</summary>{{flags}}</details>
<h2 style="margin-top: 1.25rem">Versions</h2>
{{versions}}
</section>"""
_OF_DATA = "Sources, and the first example as the model reads it: loss is computed on lines with &gt;."
_DPI = 150


def write_report(folder: str | Path) -> Path:
    """Write the report and the plots of the run in an output folder; returns the path of the report.

    Raises ValueError for a folder without a run, OSError where a file cannot be written.
    """
    run = read_run(folder)
    for problem in run.problems:
        print(f"warning: {problem}", flush=True)
    sections = [_section(run, *plot) for plot in PLOTS]
    if run.answers:
        sections.insert(1, section("answers", "Answers", "To prompts, before and after training.", _answers(run)))
    if rows := run.run.get("rows"):
        sections.append(section("data", "Data", _OF_DATA, f"<pre>{html.escape(chr(10).join(rows))}</pre>"))
    page = _fill(run, "\n".join(sections))
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
    pictures = as_svg(narrow), as_svg(wide)
    points = {"narrow": points_of(narrow, title), "wide": points_of(wide, title)} if name in OF_LINES else None
    return section(name, title, caption, picture(title, *pictures, points))


def section(name: str, title: str, caption: str, content: str) -> str:
    """A part of the page."""
    return f'<section id="{name}"><h2>{title}</h2><p>{caption}</p>{content}</section>'


def picture(title: str, narrow: str, wide: str, points: dict | None) -> str:
    """A plot for a narrow and for a wide page; with points the page's script shows the nearest ones."""
    data = "" if points is None else f' data-points="{html.escape(json.dumps(points))}"'
    source = f'<source media="(max-width: 640px)" srcset="{narrow}">'
    return f'<picture{data}>{source}<img alt="{title}" src="{wide}"></picture>'


def as_svg(figure: Figure) -> str:
    """A figure as a data URL. Its text is drawn as shapes, so it needs no font."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)  # on the page's own ground
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue().encode()).decode()


def _fill(run: RunFiles, sections: str) -> str:
    flags = {name: _since(run, name, value) for name, value in run.run.get("flags", {}).items()}
    settings = {
        "command": html.escape(_commands(run)),
        "given": table({name: value for name, value in flags.items() if name in run.run.get("given", [])}),
        "flags": table(flags),
        "versions": table(run.run.get("versions", {})),
    }
    parts = {
        "title": html.escape(title_of(run)),
        "subtitle": html.escape(_subtitle(run)),
        "cards": "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in cards(run)),
        "problems": "".join(f"<p>{html.escape(problem)}</p>" for problem in run.problems),
        "sections": sections + "\n" + _filled(_SETTINGS, settings),
    }
    return fill_page(parts)


def fill_page(parts: dict[str, str]) -> str:
    """The page with these parts: title, subtitle, cards, problems and sections, as HTML."""
    return _filled((resources.files("lisa_dist.report") / "report.html").read_text(encoding="utf-8"), parts)


def _filled(template: str, parts: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # in one pass: values may have braces too


def title_of(run: RunFiles) -> str:
    """The model on its data; of a run that has not recorded them the name of its folder."""
    data = run.run.get("flags", {}).get("--dataset_name") or []
    data = [data] if isinstance(data, str) else data
    if not run.run.get("model") or not data:
        return run.folder.resolve().name
    names = [Path(str(name)).name for name in data]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{Path(run.run['model']).name} on {shown}"


def _answers(run: RunFiles) -> str:
    """A row for each prompt: the first answer and the last one."""
    rows = []
    for prompt in dict.fromkeys(answer["prompt"] for answer in run.answers):
        said = [(answer["step"], answer["answer"]) for answer in run.answers if answer["prompt"] == prompt]
        cells = "".join(
            f"<p><b>step {step}</b> {html.escape(answer) or '(nothing)'}</p>"
            for step, answer in dict.fromkeys((said[0], said[-1]))
        )
        rows.append(f"<tr><th>{html.escape(prompt)}</th><td>{cells}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


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


def _subtitle(run: RunFiles) -> str:
    values = [run.run.get(name, "") for name in ("method", "model", "devices", "began")]
    values.insert(0, run.folder.resolve().name)
    return ", ".join(filter(None, values))


def cards(run: RunFiles) -> list[tuple[str, str]]:
    """The key figures at the top of the page."""
    losses, held_out = run.series("loss")[1], run.series("eval_loss")[1]
    speeds, peaks = sorted(run.series("tokens_per_second")[1]), run.series("memory_bytes")[1]
    seconds = run.series("train_runtime")[1]
    found = [("steps", str(run.last_step))]
    found += [("last loss", f"{losses[-1]:.4f}")] if losses else []
    if len(held_out) > 1:
        found.append(("held-out loss, first to last", f"{held_out[0]:.4f} → {held_out[-1]:.4f}"))
    elif held_out:
        found.append(("held-out loss", f"{held_out[-1]:.4f}"))
    duration = "time since the last resume" if run.run.get("resumed") else "time"
    found += [(duration, str(timedelta(seconds=round(seconds[-1]))))] if seconds else []
    found += [("tokens / s, median", f"{speeds[len(speeds) // 2]:,.0f}")] if speeds else []
    found += [("peak memory of a rank's GPU, or process", format_bytes(int(max(peaks))))] if peaks else []
    if run.run.get("parameters"):
        found.append(("parameters", format_count(run.run["parameters"])))
    if run.periods:
        found.append(("periods", str(len(run.periods))))
        states = [period["state_bytes_per_rank"] for period in run.periods if period.get("state_bytes_per_rank")]
        found += [("optimizer states per rank", format_bytes(states[-1]))] if states else []
        switches = [period["seconds"] for period in run.periods[1:] if period.get("seconds") is not None]
        found += [("seconds per switch, mean", f"{sum(switches) / len(switches):.3f}")] if switches else []
    return found


def table(entries: dict) -> str:
    """Names and values."""
    cells = ((html.escape(name), html.escape(format_value(value))) for name, value in entries.items())
    rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
    return f"<table>{rows}</table>"


def format_value(value: object) -> str:
    """A value as a recipe or a command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(format_value, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
