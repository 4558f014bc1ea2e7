"""The layerwise norms of runs side by side, as a table, one CSV and the paper's figure.

Reads the lisa_norms.csv that the callback `LayerNorms` writes to the output folder of a run.
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
from typing import TYPE_CHECKING, Any

from lisa_dist.errors import UserError
from lisa_dist.files import replacing
from lisa_dist.run_folder import NORMS, NORMS_NAME, PRODUCT, RUN_NAME
from lisa_dist.text import format_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The title of each quantity in the table and in the figure.
QUANTITIES = {
    "weight_norm": "weight norm w(l)",
    "update_norm": "update of a step",
    "moved_norm": "moved since the start",
    PRODUCT: "adapter product",
}
_LOG_FROM = 20  # largest / smallest value from which on an axis is logarithmic


@dataclass
class RunNorms:
    """The norms of one run: for each block, in model order, its value of each quantity."""

    label: str
    path: Path
    blocks: dict[str, dict[str, float]]

    @property
    def layers(self) -> list[str]:
        """The decoder layers."""
        return [block for block in self.blocks if block.startswith("layers.")]

    @property
    def quantities(self) -> list[str]:
        """The measured quantities."""
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
            raise UserError(f"{path}: line {number} begins with {block!r}, which is not a block, or is repeated.")
        try:
            blocks[block] = dict(zip(header[1:], map(float, values), strict=True))
        except ValueError as error:
            raise UserError(f"{path}: line {number} does not have {len(header) - 1} numbers ({error}).") from error
        if not all(math.isfinite(value) and value >= 0 for value in blocks[block].values()):
            raise UserError(f"{path}: line {number} has a norm that is negative or not finite.")
    if not any(block.startswith("layers.") for block in blocks):
        raise UserError(f"{path}: has no decoder layer; {remedy}")
    return blocks


def read_runs(words: Sequence[str]) -> list[RunNorms]:
    """The runs named on the command line: each an output folder or a CSV file, or label=PATH.

    Raises ValueError for a run without norms, for a bad label, and for models with different layers.
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
            raise UserError(f"{word}: a label may contain letters, digits, _ and - only.")
        taken = [run.label for run in runs]
        if label in taken:
            raise UserError(f"{word}: the label {label} is given twice.")
        label = label or _unlike(_method_of(folder), taken)
        runs.append(RunNorms(label, path, read_norms(path)))
        if runs[-1].layers != runs[0].layers:
            raise UserError(
                f"{path}: {len(runs[-1].layers)} decoder layers, but {len(runs[0].layers)} in {runs[0].path}; "
                "compare runs of one model."
            )
    return runs


def write_csv(runs: Sequence[RunNorms], path: Path) -> None:
    """Write one table of all runs: a line per block, columns per run; empty where a run lacks the block.

    `--lisa_weights_file` reads this file.
    """
    with replacing(path) as new, new.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["block", *(f"{run.label}.{name}" for run in runs for name in run.quantities)])
        for block in _all_blocks(runs):
            values = [run.blocks.get(block, {}).get(name, "") for run in runs for name in run.quantities]
            lines.writerow([block, *values])


def format_skew(runs: Sequence[RunNorms]) -> str:
    """A table of the embedding, the median layer and the head, and their ratios to that layer, by quantity and run."""
    lines = [["norm", "run", "embed", "median layer", "head", "embed / layer", "head / layer"]]
    for quantity, title in QUANTITIES.items():
        for run in runs:
            if quantity not in run.quantities:
                continue
            layer = statistics.median(run.blocks[block][quantity] for block in run.layers)
            ends = [run.blocks.get(block, {}).get(quantity) for block in ("embed", "head")]
            shown = [_show(value) for value in (ends[0], layer, ends[1])]
            skews = ["-" if value is None or not layer else f"{value / layer:.3g}" for value in ends]
            lines.append([title, run.label, *shown, *skews])
    return format_columns(lines)


def plot_norms(runs: Sequence[RunNorms], path: Path) -> None:
    """Draw the paper's figure: a panel per quantity, a line per run, from the embedding to the head."""
    from matplotlib import rc_context  # a slow import, that an error in the flags need not wait for
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


def _draw(axes: "Axes", runs: Sequence[RunNorms], blocks: Sequence[str], quantity: str) -> None:
    """Draw one panel. "rest" is not adjacent to the head in the model, so it is a separate point."""
    values = {run.label: [run.blocks.get(block, {}).get(quantity, math.nan) for block in blocks] for run in runs}
    positive = [value for run_values in values.values() for value in run_values if value > 0]
    logarithmic = bool(positive) and max(positive) > _LOG_FROM * min(positive)
    layers = [block for block in blocks if block.startswith("layers.")]
    # Layers are 1 apart; the other blocks are as far apart as their names are wide.
    width = max(1.0, len(layers) / 10)
    outer = {"embed": -width, "head": len(layers) - 1 + width, "rest": len(layers) - 1 + 2 * width}
    places = {block: outer.get(block, number - blocks.index(layers[0])) for number, block in enumerate(blocks)}
    line = [block for block in blocks if block != "rest"]
    for number, (label, run_values) in enumerate(values.items()):
        shown = dict(zip(blocks, run_values, strict=True))
        if logarithmic:
            shown = {block: value or math.nan for block, value in shown.items()}
        style: Any = {"color": f"C{number}", "marker": "o", "markersize": 3.5}
        axes.plot([places[name] for name in line], [shown[name] for name in line], linewidth=1.4, label=label, **style)
        if "rest" in shown:
            axes.plot([places["rest"]], [shown["rest"]], linestyle="none", **style)
    if logarithmic:
        axes.set_yscale("log")
        zeros = "; ".join(f"{label} {_list_zeros(blocks, found)}" for label, found in values.items() if 0.0 in found)
        if zeros:
            axes.set_xlabel(textwrap.fill(f"not drawn, as they are 0: {zeros}", 84), fontsize=7)
    else:
        axes.set_ylim(bottom=0)
    ticks = [*layers[:: max(1, math.ceil(len(layers) / 8))], *(block for block in blocks if block in outer)]
    axes.set_xticks([places[block] for block in ticks], [block.removeprefix("layers.") for block in ticks])


def _list_zeros(blocks: Sequence[str], values: Sequence[float]) -> str:
    """The blocks whose value is 0; more than four layers as their number."""
    zero = [block for block, value in zip(blocks, values, strict=True) if value == 0]
    layers = [block for block in zero if block.startswith("layers.")]
    shown = [block for block in zero if block not in layers] if len(layers) > 4 else zero
    return ", ".join([*shown, *([f"{len(layers)} layers"] if len(layers) > 4 else [])])


def _all_blocks(runs: Sequence[RunNorms]) -> list[str]:
    """The blocks of all runs, in model order; some runs of a model may lack an untied head."""
    found = {block for run in runs for block in run.blocks}
    return [block for block in ("embed", *runs[0].layers, "head", "rest") if block in found]


def _method_of(folder: Path) -> str:
    """The default label of a run: its method, or its folder's name where no method is recorded."""
    about = folder / RUN_NAME
    if not about.is_file():
        return re.sub(r"[^\w-]", "_", folder.stem) or "run"
    try:
        return str(json.loads(about.read_text(encoding="utf-8"))["method"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{about}: cannot be read ({error}); give a label, as name={folder}.") from error


def _unlike(label: str, taken: Sequence[str]) -> str:
    """The label, with a number if it is taken."""
    number = 1
    while (numbered := label if number == 1 else f"{label}_{number}") in taken:
        number += 1
    return numbered


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
