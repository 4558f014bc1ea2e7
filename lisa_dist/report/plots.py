"""The plots of a run, for a wide or a narrow page. A plot without data is left out."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lisa_dist.report.run_files import RunFiles
from lisa_dist.run_folder import MEMORY_PARTS
from lisa_dist.text import MIB

BLUE, ORANGE, GREY, PALE = "#2563eb", "#d9580d", "#6b7280", "#e8edf5"
# More bands or points cannot be told apart.
_MOST_BANDS, _MOST_POINTS, _MOST_TIPS = 40, 2000, 400
STYLE: Any = {"font.size": 9, "axes.edgecolor": "#9ca3af", "axes.labelcolor": "#374151", "axes.titlesize": 10}


def legend_above(axes: Axes) -> None:
    """Beside bars, which leave no room for a legend in a narrow figure."""
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)


def plot_loss(run: RunFiles, figure: Figure) -> None:
    """Training loss, logged and smoothed, and held-out loss, with periods as bands."""
    axes = new_axes(figure, "optimizer step", "loss")
    _shade_periods(run, axes)
    steps, losses = _thin(*run.series("loss"))
    axes.plot(steps, losses, color=BLUE, alpha=0.35 if len(losses) > 30 else 1.0, linewidth=1.2, label="training")
    if len(losses) > 30:
        axes.plot(steps, smoothed(losses), color=BLUE, linewidth=1.8, label="training, smoothed")
    steps, losses = run.series("eval_loss")
    if losses:
        axes.plot(steps, losses, color=ORANGE, marker="o", markersize=4, linewidth=1.5, label="held out")
    axes.legend(frameon=False)
    axes.set_xlim(0, max(1, run.last_step))


def plot_layers(run: RunFiles, figure: Figure) -> None:
    """Which layer trained in which period: one row per layer, the first layer at the bottom."""
    outer_blocks = sorted({block for period in run.periods for block in period.get("blocks") or []})
    names = [name.removeprefix("layers.") for name in run.units] + outer_blocks
    cells = [[int(layer in period["layers"]) for period in run.periods] for layer in range(run.num_layers)]
    cells += [[int(block in (period.get("blocks") or [])) for period in run.periods] for block in outer_blocks]
    axes = new_axes(figure, "period", run.unit)
    few = len(run.periods) <= 60
    axes.pcolormesh(
        [column - 0.5 for column in range(len(run.periods) + 1)],
        [row - 0.5 for row in range(len(names) + 1)],
        cells,
        cmap=ListedColormap([PALE, BLUE]),
        vmin=0,
        vmax=1,
        edgecolors="white" if few else "none",
        linewidth=0.6 if few else 0.0,
        rasterized=not few,  # else the SVG has one shape per cell
    )
    every = max(1, math.ceil(run.num_layers / 12))
    ticks = [row for row in range(len(names)) if row >= run.num_layers or row % every == 0]
    axes.set_yticks(ticks, [names[row] for row in ticks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_visits(run: RunFiles, figure: Figure) -> None:
    """In how many periods each layer trained, and the number expected from its probabilities."""
    axes = new_axes(figure, run.unit, "periods")
    visits = run.visits
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
        legend_above(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def plot_learning_rate(run: RunFiles, figure: Figure) -> None:
    """The learning rate of each logged step."""
    axes = new_axes(figure, "optimizer step", "learning rate")
    axes.plot(*_thin(*run.series("learning_rate")), color=BLUE, linewidth=1.5)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_xlim(0, max(1, run.last_step))
    axes.set_ylim(bottom=0)


def plot_gradient_norm(run: RunFiles, figure: Figure) -> None:
    """The norm of each logged step's gradients, before clipping."""
    axes = new_axes(figure, "optimizer step", "gradient norm")
    _shade_periods(run, axes)
    axes.plot(*_thin(*run.series("grad_norm")), color=BLUE, linewidth=1.2)
    axes.set_xlim(0, max(1, run.last_step))
    axes.set_ylim(bottom=0)


def plot_memory(run: RunFiles, figure: Figure) -> None:
    """The parts of a rank's memory in one step, planned and measured."""
    assert run.memory is not None
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
    legend_above(axes)


def plot_speed(run: RunFiles, figure: Figure) -> None:
    """Tokens per second of all ranks."""
    axes = new_axes(figure, "optimizer step", "tokens / s")
    axes.plot(*_thin(*run.series("tokens_per_second")), color=BLUE, linewidth=1.2)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(0, max(1, run.last_step))
    axes.set_ylim(bottom=0)


def plot_movement(run: RunFiles, figure: Figure) -> None:
    """The distance of each block's weights from their start, relative to their norm there."""
    latest: dict[str, float] = {}
    for line in run.movement:
        latest |= {block: figures["relative"] for block, figures in line["blocks"].items()}
    layers = [latest.get(name, 0.0) for name in run.units]
    outer = {block: latest[block] for block in ("embed", "head", "rest") if block in latest}
    axes = new_axes(figure, run.unit, "distance from start, % of norm")
    axes.bar(range(len(layers)), [100 * value for value in layers], color=BLUE, width=0.8)
    # Bars of the outer blocks are as wide as their names, whatever the number of layers.
    width = max(1.0, (len(layers) + 3) / 8)
    places = [len(layers) + width * (place + 0.5) for place in range(len(outer))]
    axes.bar(places, [100 * value for value in outer.values()], color=ORANGE, width=0.8 * width)
    ticks = list(range(0, len(layers), max(1, math.ceil(len(layers) / 8))))
    axes.set_xticks([*ticks, *places], [*map(str, ticks), *outer])


Plot = Callable[[RunFiles, Figure], None]
OF_LINES = ("loss", "learning_rate", "gradient_norm", "speed")
# Name, title, caption, the plot, and whether a run has data for it.
PLOTS: tuple[tuple[str, str, str, Plot, Callable[[RunFiles], bool]], ...] = (
    (
        "loss",
        "Loss",
        "Bands are periods: the active layers change at each edge.",
        plot_loss,
        lambda run: bool(run.series("loss")[0]),
    ),
    (
        "layers",
        "Layers that trained",
        "One row per decoder layer, the first at the bottom; one column per period.",
        plot_layers,
        lambda run: any(period["layers"] for period in run.periods),
    ),
    (
        "visits",
        "Visits",
        "In how many periods each layer trained.",
        plot_visits,
        lambda run: any(period["layers"] for period in run.periods),
    ),
    (
        "movement",
        "Weight movement",
        "Distance of each block from its initial weights, relative to their norm (L2, on a sample of the weights).",
        plot_movement,
        lambda run: bool(run.movement and run.num_layers),
    ),
    (
        "learning_rate",
        "Learning rate",
        "Switches do not restart the schedule.",
        plot_learning_rate,
        lambda run: bool(run.series("learning_rate")[0]),
    ),
    (
        "gradient_norm",
        "Gradient norm",
        "Of what trains in the period, before clipping.",
        plot_gradient_norm,
        lambda run: bool(run.series("grad_norm")[0]),
    ),
    (
        "memory",
        "Memory",
        "One early step of rank 0, part by part: planned and measured.",
        plot_memory,
        lambda run: run.memory is not None,
    ),
    (
        "speed",
        "Speed",
        "Tokens of all ranks, without padding; time of evaluation and saving is excluded.",
        plot_speed,
        lambda run: bool(run.series("tokens_per_second")[0]),
    ),
)


def draw(plot: Plot, run: RunFiles, narrow: bool = False) -> Figure:
    """A figure of one plot."""
    return with_style(lambda figure: plot(run, figure), narrow)


def with_style(plot: Callable[[Figure], None], narrow: bool = False) -> Figure:
    """A figure in the look of the page."""
    from matplotlib import rc_context

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
    """Labelled axes."""
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    style_axes(axes)
    return axes


def style_axes(axes: Axes) -> None:
    """Apply the common look of all plots."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#4b5563")


def _shade_periods(run: RunFiles, axes: Axes) -> None:
    """Shade every second period; where there are many, groups of periods that are wide enough to be seen."""
    periods_per_band = max(1, math.ceil(len(run.periods) / _MOST_BANDS))
    starts = [period["step"] for period in run.periods[::periods_per_band]] + [run.last_step]
    for left, right in list(pairwise(starts))[1::2]:
        axes.axvspan(left, right, color=PALE, linewidth=0, zorder=0)


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
