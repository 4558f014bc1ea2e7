"""The plots of a run, for a wide or a narrow page. A plot without data leaves its figure empty."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lisa_dist.report.run_files import RunFiles
from lisa_dist.run_folder import MEMORY_PARTS
from lisa_dist.text import MIB

BLUE, ORANGE, GREY, PALE = "#2563eb", "#d9580d", "#6b7280", "#e8edf5"
_INK, _EDGE, _GRID = "#4b5563", "#9ca3af", "#e5e7eb"
_COLORS = (BLUE, ORANGE, "#15803d", "#9333ea", "#b91c1c", "#0e7490")  # of several runs
# Each in a page's light theme, and in its dark one.
THEMES = dict(zip(_COLORS, ("#60a5fa", "#fb923c", "#4ade80", "#c084fc", "#f87171", "#22d3ee"), strict=True))
THEMES |= {GREY: "#94a3b8", PALE: "#283548", _INK: "#cbd5e1", _EDGE: "#64748b", _GRID: "#334155"}
# More bands or points cannot be told apart.
_MOST_BANDS, _MOST_POINTS, _MOST_TIPS = 40, 2000, 400
STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "lisa_dist", "axes.edgecolor": _EDGE}
STYLE |= {"text.color": _INK, "axes.labelcolor": _INK}


def plot_loss(run: RunFiles, figure: Figure) -> None:
    """Training loss, logged and smoothed, and held-out loss, with periods as bands."""
    axes = _plot_series(run, figure, "loss", "loss", label="training")
    if axes is None:
        return
    steps, losses = _thin(*run.series("loss"))
    if len(losses) > 30:
        axes.lines[0].set_alpha(0.35)
        axes.plot(steps, smoothed(losses), color=BLUE, linewidth=1.8, label="training, smoothed")
    steps, losses = run.series("eval_loss")
    if losses:
        axes.plot(steps, losses, color=ORANGE, marker="o", markersize=4, linewidth=1.5, label="held out")
    axes.legend(frameon=False)


def plot_layers(run: RunFiles, figure: Figure) -> None:
    """Which layer trained in which period: one row per layer, the first layer at the bottom."""
    if not any(run.visits):
        return
    outer_blocks = sorted({block for period in run.periods for block in period.get("blocks") or []})
    names = [name.removeprefix("layers.") for name in run.units]
    cells = [[int(layer in period["layers"]) for period in run.periods] for layer in range(run.num_layers)]
    cells += [[int(block in (period.get("blocks") or [])) for period in run.periods] for block in outer_blocks]
    # Rows of the outer blocks are as high as their names, whatever the number of layers.
    height = max(1, math.ceil(run.num_layers / 12))
    tops = [run.num_layers - 0.5 + height * row for row in range(1, len(outer_blocks) + 1)]
    axes = new_axes(figure, "period", run.unit)
    few = len(run.periods) <= 60
    axes.pcolormesh(
        [column - 0.5 for column in range(len(run.periods) + 1)],
        [row - 0.5 for row in range(run.num_layers + 1)] + tops,
        cells,
        cmap=ListedColormap(["none", BLUE]),
        vmin=0,
        vmax=1,
        edgecolors=PALE if few else "none",
        linewidth=0.6 if few else 0.0,
        rasterized=not few,  # else the SVG has one shape per cell
    )
    ticks = range(0, run.num_layers, height)
    axes.set_yticks([*ticks, *(top - height / 2 for top in tops)], [*(names[row] for row in ticks), *outer_blocks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_visits(run: RunFiles, figure: Figure) -> None:
    """In how many periods each layer trained, and the number expected from its probabilities."""
    visits = run.visits
    if not any(visits):
        return
    axes = new_axes(figure, run.unit, "periods")
    axes.bar(range(run.num_layers), visits, color=BLUE, width=0.8)
    probabilities = [period["probabilities"] for period in run.periods if period.get("probabilities")]
    probabilities = [one for one in probabilities if len(one) == run.num_layers]
    if probabilities:
        expected = [math.fsum(by_period) for by_period in zip(*probabilities, strict=True)]
        axes.plot(expected, color=ORANGE, linewidth=1.5, linestyle="--", label="expected from probabilities")
    elif not run.modules:  # of which smaller ones fit more often
        uniform = sum(visits) / run.num_layers
        axes.axhline(uniform, color=ORANGE, linewidth=1.5, linestyle="--", label=f"uniform: {uniform:.1f}")
    if axes.get_legend_handles_labels()[0]:
        _legend_above(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def plot_movement(run: RunFiles, figure: Figure) -> None:
    """The distance of each block's weights from their start, relative to their norm there."""
    if not run.movement or not run.num_layers:
        return
    latest: dict[str, float] = {}
    for line in run.movement:
        latest |= {block: figures["relative"] for block, figures in line["blocks"].items()}
    layers = [latest.get(name, 0.0) for name in run.units]
    outer = {block: latest[block] for block in ("embed", "head", "rest", "adapters") if block in latest}
    axes = new_axes(figure, run.unit, "distance from start, % of norm")
    axes.bar(range(len(layers)), [100 * value for value in layers], color=BLUE, width=0.8)
    # Bars of the outer blocks are as wide as their names, whatever the number of layers.
    width = max(1.0, (len(layers) + 3) / 8)
    places = [len(layers) + width * (place + 0.5) for place in range(len(outer))]
    axes.bar(places, [100 * value for value in outer.values()], color=ORANGE, width=0.8 * width)
    ticks = list(range(0, len(layers), max(1, math.ceil(len(layers) / 8))))
    axes.set_xticks([*ticks, *places], [*map(str, ticks), *outer])


def plot_learning_rate(run: RunFiles, figure: Figure) -> None:
    """The learning rate of each logged step."""
    if axes := _plot_series(run, figure, "learning_rate", "learning rate", bands=False):
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_ylim(bottom=0)


def plot_gradient_norm(run: RunFiles, figure: Figure) -> None:
    """The norm of each logged step's gradients, before clipping."""
    if axes := _plot_series(run, figure, "grad_norm", "gradient norm"):
        axes.set_ylim(bottom=0)


def plot_memory(run: RunFiles, figure: Figure) -> None:
    """The parts of a rank's memory in one step, planned and measured."""
    if run.memory is None:
        return
    planned, measured = run.memory.get("planned"), run.memory["measured"]
    sums = {
        title: [sum(parts[name] for name in fields) if parts else 0 for parts in (planned, measured)]
        for title, fields in [*MEMORY_PARTS, ("peak", ("peak",))]
    }
    shown = {title: pair for title, pair in sums.items() if max(pair) >= sums["peak"][1] / 1000}
    axes = new_axes(figure, "MiB per rank", "")
    rows = range(len(shown))
    for offset, which, color, label in ((-0.2, 0, GREY, "planned"), (0.2, 1, BLUE, "measured")):
        if which == 1 or planned:
            widths = [pair[which] / MIB for pair in shown.values()]
            axes.barh([row + offset for row in rows], widths, height=0.38, color=color, label=label)
    axes.set_yticks(list(rows), list(shown))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    _legend_above(axes)


def plot_speed(run: RunFiles, figure: Figure) -> None:
    """Tokens per second of all ranks."""
    if axes := _plot_series(run, figure, "tokens_per_second", "tokens / s", bands=False):
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylim(bottom=0)


_LAYERS = "One row per decoder layer, the first at the bottom; one column per period."
_MOVEMENT = "Distance of each block from its initial weights, relative to their norm (L2, on a sample of the weights)."
_SPEED = "Tokens of all ranks, without padding; time of evaluation and saving is excluded."
_MEMORY = (
    "The tensors of rank 0 in one early step, part by part: planned and measured. The log has more: on a GPU what any "
    "rank's tensors took at most, on CPUs the whole process."
)
# Name, title, caption, the plot, and whether a reader may point at its lines.
PLOTS: tuple[tuple[str, str, str, Callable[[RunFiles, Figure], None], bool], ...] = (
    ("loss", "Loss", "Bands are periods: the active layers change at each edge.", plot_loss, True),
    ("layers", "Layers that trained", _LAYERS, plot_layers, False),
    ("visits", "Visits", "In how many periods each layer trained.", plot_visits, False),
    ("movement", "Weight movement", _MOVEMENT, plot_movement, False),
    ("learning_rate", "Learning rate", "Switches do not restart the schedule.", plot_learning_rate, True),
    ("gradient_norm", "Gradient norm", "Of what trains in the period, before clipping.", plot_gradient_norm, True),
    ("memory", "Memory", _MEMORY, plot_memory, False),
    ("speed", "Speed", _SPEED, plot_speed, True),
)


def plot_of_runs(runs: Mapping[str, RunFiles], entry: str, smooth: bool, figure: Figure) -> None:
    """One entry of the logs of several runs, by their names."""
    shown = {name: run.series(entry) for name, run in runs.items() if run.series(entry)[0]}
    if not shown:
        return
    axes = new_axes(figure, "optimizer step", "norm" if entry == "grad_norm" else "loss")
    for place, (name, (steps, values)) in enumerate(shown.items()):
        how: Any = {"color": _COLORS[place % len(_COLORS)], "marker": None if smooth else "o", "label": name}
        axes.plot(steps, smoothed(values) if smooth else values, linewidth=1.6, markersize=3, **how)
    axes.legend(frameon=False)


def with_style(plot: Callable[[Figure], None], narrow: bool = False) -> Figure:
    """A figure in the look of the page."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.2) if narrow else (8.8, 3.3), layout="constrained")
        plot(figure)
        return figure


def points_of(figure: Figure, title: str) -> dict[str, Any]:
    """What a reader may point at: where the axes are on the figure, their limits, and the points of each line."""
    (axes,) = figure.axes
    box = axes.get_position()
    lines = []
    for line in axes.get_lines():
        label = str(line.get_label())
        points: Any = line.get_xydata()
        points = points[:: max(1, len(points) // _MOST_TIPS)].tolist()
        shown = [[round(x), float(f"{y:.5g}")] for x, y in points]
        lines.append({"name": title.lower() if label.startswith("_") else label, "points": shown})
    return {"left": box.x0, "width": box.width, "from": axes.get_xlim()[0], "to": axes.get_xlim()[1], "lines": lines}


def new_axes(figure: Figure, x: str, y: str) -> Axes:
    """Labelled axes in the common look of all plots."""
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    style_axes(axes)
    return axes


def style_axes(axes: Axes) -> None:
    """Apply the common look of all plots."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK)


def _legend_above(axes: Axes) -> None:
    """Beside bars, which leave no room for a legend in a narrow figure."""
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)


def _plot_series(
    run: RunFiles, figure: Figure, entry: str, name: str, bands: bool = True, label: str | None = None
) -> Axes | None:
    """One entry of the log by step, with periods as bands; None where there is none.

    Every second period is a band; where there are many, groups of periods that are wide enough to be seen.
    """
    steps, values = _thin(*run.series(entry))
    if not steps:
        return None
    axes = new_axes(figure, "optimizer step", name)
    periods_per_band = max(1, math.ceil(len(run.periods) / _MOST_BANDS))
    starts = [period["step"] for period in run.periods[::periods_per_band]] + [run.last_step]
    for left, right in list(pairwise(starts))[1::2] if bands else ():
        axes.axvspan(left, right, color=PALE, linewidth=0, zorder=0)
    axes.plot(steps, values, color=BLUE, linewidth=1.2, label=label)
    axes.set_xlim(0, max(1, run.last_step))
    return axes


def _thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most `_MOST_POINTS` points, each the mean of a chunk of values at the chunk's last step."""
    size = max(1, math.ceil(len(values) / _MOST_POINTS))
    chunks = [slice(start, start + size) for start in range(0, len(values), size)]
    return [steps[chunk][-1] for chunk in chunks], [math.fsum(values[chunk]) / len(values[chunk]) for chunk in chunks]


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving mean over a tenth of the values, with the bias of its start corrected."""
    keep, mean, weight, smoothed = 1 - 1 / max(2.0, len(values) / 20), 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed
