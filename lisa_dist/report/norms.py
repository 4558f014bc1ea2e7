"""The layerwise norms of runs side by side, as a table, one CSV and the paper's figure.

Reads what `LayerNorms` (analysis.py) has left in the output folders of runs.
"""

import csv
import json
import math
import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lisa_dist.config import UserError
from lisa_dist.files import replacing
from lisa_dist.run_folder import NORMS, NORMS_NAME, PRODUCT, RUN_NAME
from lisa_dist.text import format_columns

# Of each quantity what the table and the panels of the figure say.
QUANTITIES = {
    "weight_norm": "weight norm w(l)",
    "update_norm": "update of a step",
    "moved_norm": "moved since the start",
    PRODUCT: "adapter product",
}
_LOG_FROM = 20  # times that the largest value is the smallest, from which on an axis is logarithmic


@dataclass
class RunNorms:
    """The norms of one run: for each block, in the order of the model, its values by quantity."""

    label: str
    path: Path
    blocks: dict[str, dict[str, float]]

    @property
    def layers(self) -> list[str]:
        """The decoder layers."""
        return [block for block in self.blocks if block.startswith("layers.")]

    @property
    def quantities(self) -> list[str]:
        """What was taken of each block."""
        return list(next(iter(self.blocks.values())))


def read_norms(path: Path) -> dict[str, dict[str, float]]:
    """The values of each block in a lisa_norms.csv. Raises ValueError naming the file and what is wrong with it."""
    try:
        read = csv.reader(path.read_text(encoding="utf-8").splitlines())
        lines = [(number, line) for number, line in enumerate(read, 1) if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    remedy = f"give the {NORMS_NAME} of a run that was trained with --layer_norms 1."
    if not lines:
        raise UserError(f"{path}: is empty; {remedy}")
    header = lines[0][1]
    if header not in (["block", *NORMS], ["block", *NORMS, PRODUCT]):
        raise UserError(f"{path}: begins with {','.join(header)!r}, not with block,{','.join(NORMS)}; {remedy}")
    blocks: dict[str, dict[str, float]] = {}
    for number, (block, *values) in lines[1:]:
        if block in blocks or not re.fullmatch(r"embed|head|rest|layers\.\d+", block):
            raise UserError(f"{path}: line {number} begins with {block!r}, which is no block or is there already.")
        try:
            blocks[block] = dict(zip(header[1:], map(float, values), strict=True))
        except ValueError as error:
            raise UserError(f"{path}: line {number} has not {len(header) - 1} numbers ({error}).") from error
        if not all(math.isfinite(value) and value >= 0 for value in blocks[block].values()):
            raise UserError(f"{path}: line {number} has a norm that is negative or not finite.")
    if not any(block.startswith("layers.") for block in blocks):
        raise UserError(f"{path}: has no decoder layer in it; {remedy}")
    return blocks


def read_runs(words: Sequence[str]) -> list[RunNorms]:
    """Runs by the words of the command line: an output folder or a CSV, or label=one.

    Raises ValueError where there are no norms, a label cannot be one, or models differ in their layers.
    """
    runs: list[RunNorms] = []
    for word in words:
        label, equals, place = ("", "", word) if Path(word).exists() else word.rpartition("=")
        path = Path(place)
        folder = path.parent if path.name == NORMS_NAME else path
        if path.suffix != ".csv":
            path = path / NORMS_NAME
        if not path.is_file():
            raise UserError(f"{place}: there is no {path.name} in {path.parent}: train the run with --layer_norms 1.")
        if equals and not re.fullmatch(r"[\w-]+", label):
            raise UserError(f"{word}: a label has letters, digits, _ and - alone.")
        taken = [run.label for run in runs]
        if label in taken:
            raise UserError(f"{word}: the label {label} is given twice.")
        label = label or _unlike(_method_of(folder), taken)
        runs.append(RunNorms(label, path, read_norms(path)))
        if runs[-1].layers != runs[0].layers:
            raise UserError(
                f"{path}: {len(runs[-1].layers)} decoder layers, and {len(runs[0].layers)} in {runs[0].path}; runs of "
                "one model can be compared."
            )
    return runs


def write_csv(runs: Sequence[RunNorms], path: Path) -> None:
    """All runs in one table: a row for each block, and of each run its columns; nothing where a run has no such block.

    `--lisa_weights_file` reads it.
    """
    with replacing(path) as new, new.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["block", *(f"{run.label}.{name}" for run in runs for name in run.quantities)])
        for block in _all_blocks(runs):
            values = [run.blocks.get(block, {}).get(name, "") for run in runs for name in run.quantities]
            lines.writerow([block, *values])


def format_skew(runs: Sequence[RunNorms]) -> str:
    """Of each run and quantity embed, the median layer and head, and how many times that layer embed and head are."""
    lines = [["norm", "run", "embed", "median layer", "head", "embed / layer", "head / layer"]]
    for quantity, said in QUANTITIES.items():
        for run in runs:
            if quantity not in run.quantities:
                continue
            layer = statistics.median(run.blocks[block][quantity] for block in run.layers)
            ends = [run.blocks.get(block, {}).get(quantity) for block in ("embed", "head")]
            shown = [_show(value) for value in (ends[0], layer, ends[1])]
            skews = ["-" if value is None or not layer else f"{value / layer:.3g}" for value in ends]
            lines.append([said, run.label, *shown, *skews])
    return format_columns(lines)


def plot_norms(runs: Sequence[RunNorms], path: Path) -> None:
    """The paper's figure: a panel for each quantity, a line for each run, from the embedding to the head."""
    from matplotlib import rc_context  # which takes long to import, for a flag that is wrong
    from matplotlib.figure import Figure

    from lisa_dist.report.plots import STYLE, style_axes

    blocks = _all_blocks(runs)
    quantities = [name for name in QUANTITIES if any(name in run.quantities for run in runs)]
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 6.4), layout="constrained")
        for axes, quantity in zip(figure.subplots(2, 2).flat, quantities, strict=False):
            style_axes(axes)
            axes.set_title(QUANTITIES[quantity])
            _draw(axes, runs, blocks, quantity)
        for axes in figure.axes[len(quantities) :]:
            axes.set_visible(False)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(runs), frameon=False)
        with replacing(path) as new:
            figure.savefig(new, dpi=150, format="png")


def _draw(axes, runs: Sequence[RunNorms], blocks: Sequence[str], quantity: str) -> None:
    """One panel. The rest is no neighbour of the head: a point beside the line."""
    values = {run.label: [run.blocks.get(block, {}).get(quantity, math.nan) for block in blocks] for run in runs}
    drawn = [value for of_run in values.values() for value in of_run if value > 0]
    logarithmic = bool(drawn) and max(drawn) > _LOG_FROM * min(drawn)
    layers = [block for block in blocks if block.startswith("layers.")]
    # Layers are 1 apart, and the blocks around them as far as their names need.
    width = max(1.0, len(layers) / 10)
    outer = {"embed": -width, "head": len(layers) - 1 + width, "rest": len(layers) - 1 + 2 * width}
    places = {block: outer.get(block, number - blocks.index(layers[0])) for number, block in enumerate(blocks)}
    line = [block for block in blocks if block != "rest"]
    for number, (label, of_run) in enumerate(values.items()):
        shown = dict(zip(blocks, of_run, strict=True))
        if logarithmic:
            shown = {block: value or math.nan for block, value in shown.items()}
        look = {"color": f"C{number}", "marker": "o", "markersize": 3.5}
        axes.plot([places[one] for one in line], [shown[one] for one in line], linewidth=1.4, label=label, **look)
        if "rest" in shown:
            axes.plot([places["rest"]], [shown["rest"]], linestyle="none", **look)
    if logarithmic:
        axes.set_yscale("log")
        zeros = "; ".join(f"{label} {_listed(blocks, of_run)}" for label, of_run in values.items() if 0.0 in of_run)
        if zeros:
            axes.set_xlabel(textwrap.fill(f"not drawn, being 0: {zeros}", 84), fontsize=7)
    else:
        axes.set_ylim(bottom=0)
    ticks = [*layers[:: max(1, math.ceil(len(layers) / 8))], *(block for block in blocks if block in outer)]
    axes.set_xticks([places[block] for block in ticks], [block.removeprefix("layers.") for block in ticks])


def _listed(blocks: Sequence[str], values: Sequence[float]) -> str:
    """The blocks whose value is 0."""
    zero = [block for block, value in zip(blocks, values, strict=True) if value == 0]
    layers = [block for block in zero if block.startswith("layers.")]
    shown = [block for block in zero if block not in layers] if len(layers) > 4 else zero
    return ", ".join([*shown, *([f"{len(layers)} layers"] if len(layers) > 4 else [])])


def _all_blocks(runs: Sequence[RunNorms]) -> list[str]:
    """The blocks that any run has, from the embedding on; an untied head is in some runs of a model only."""
    found = {block for run in runs for block in run.blocks}
    return [block for block in ("embed", *runs[0].layers, "head", "rest") if block in found]


def _method_of(folder: Path) -> str:
    """What a run is called if nothing else is said: its method, or its folder's name where no file tells that."""
    about = folder / RUN_NAME
    if not about.is_file():
        return re.sub(r"[^\w-]", "_", folder.stem) or "run"
    try:
        return str(json.loads(about.read_text(encoding="utf-8"))["method"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{about}: cannot be read ({error}); give a label, as name={folder}.") from error


def _unlike(label: str, taken: Sequence[str]) -> str:
    """The label, with a number where others have it."""
    number = 1
    while (numbered := label if number == 1 else f"{label}_{number}") in taken:
        number += 1
    return numbered


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
