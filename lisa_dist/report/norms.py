"""The layerwise norms of runs side by side, as a table, one CSV and the paper's figure.

Reads the lisa_norms.csv that the callback `LayerNorms` writes to the output folder of a run.
"""

import csv
import itertools
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_dist.errors import UserError
from lisa_dist.files import replacing
from lisa_dist.run_folder import NORMS, NORMS_NAME, PRODUCT, RUN_NAME
from lisa_dist.text import format_columns

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


def read_runs(named: Sequence[str]) -> list[RunNorms]:
    """The runs named on the command line: each an output folder or a CSV file, or label=PATH.

    Raises ValueError for a run without norms, for a bad label, and for models with different layers.
    """
    runs: list[RunNorms] = []
    for word in named:
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
        if not label:
            method = _method_of(folder)
            numbered = (f"{method}_{number}" for number in itertools.count(2))
            label = next(name for name in itertools.chain([method], numbered) if name not in taken)
        runs.append(RunNorms(label, path, read_norms(path)))
        if runs[-1].layers != runs[0].layers:
            raise UserError(
                f"{path}: {len(runs[-1].layers)} decoder layers, but {len(runs[0].layers)} in {runs[0].path}; "
                "compare runs of one model."
            )
    return runs


def _method_of(folder: Path) -> str:
    """The default label of a run: its method, or its folder's name where no method is recorded."""
    about = folder / RUN_NAME
    if not about.is_file():
        return re.sub(r"[^\w-]", "_", folder.stem) or "run"
    try:
        return str(json.loads(about.read_text(encoding="utf-8"))["method"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{about}: cannot be read ({error}); give a label, as name={folder}.") from error


def _all_blocks(runs: Sequence[RunNorms]) -> list[str]:
    """The blocks of all runs, in model order; some runs of a model may lack an untied head."""
    found = {block for run in runs for block in run.blocks}
    return [block for block in ("embed", *runs[0].layers, "head", "rest") if block in found]


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
        for run in (run for run in runs if quantity in run.quantities):
            layer = statistics.median(run.blocks[block][quantity] for block in run.layers)
            ends = [run.blocks.get(block, {}).get(quantity) for block in ("embed", "head")]
            shown = ["-" if value is None else f"{value:.4g}" for value in (ends[0], layer, ends[1])]
            skews = ["-" if value is None or not layer else f"{value / layer:.3g}" for value in ends]
            lines.append([title, run.label, *shown, *skews])
    return format_columns(lines)


def plot_norms(runs: Sequence[RunNorms], path: Path) -> None:
    """Draw the paper's figure: a panel per quantity, a line per run, from the embedding to the head."""
    from matplotlib import rc_context  # a slow import, that an error in the flags need not wait for
    from matplotlib.figure import Figure

    from lisa_dist.report.plots import STYLE, style_axes

    quantities = [name for name in QUANTITIES if any(name in run.quantities for run in runs)]
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 6.4), layout="constrained")
        for number, quantity in enumerate(quantities, 1):
            axes = figure.add_subplot(2, 2, number)
            style_axes(axes)
            axes.set_title(QUANTITIES[quantity])
            _draw(axes, runs, quantity)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(runs), frameon=False)
        with replacing(path) as new:
            figure.savefig(new, dpi=150, format="png")


def _draw(axes: Any, runs: Sequence[RunNorms], quantity: str) -> None:
    """Draw one panel. "rest" is not adjacent to the head in the model, so it is a separate point."""
    blocks, layers = _all_blocks(runs), runs[0].layers
    values = [[run.blocks.get(block, {}).get(quantity, math.nan) for block in blocks] for run in runs]
    positive = [value for of_run in values for value in of_run if value > 0]
    # Layers are 1 apart; the other blocks are as far apart as their names are wide.
    width = max(1.0, len(layers) / 10)
    places = {"embed": -width, "head": len(layers) - 1 + width, "rest": len(layers) - 1 + 2 * width}
    places |= {layer: number for number, layer in enumerate(layers)}
    line = slice(None, -1 if "rest" in blocks else None)
    for number, (run, of_run) in enumerate(zip(runs, values, strict=True)):
        style: Any = {"color": f"C{number}", "marker": "o", "markersize": 3.5}
        at = [places[block] for block in blocks]
        axes.plot(at[line], of_run[line], linewidth=1.4, label=run.label, **style)
        axes.plot(at[-1:], of_run[-1:], linestyle="none", **style)
    if positive and max(positive) > _LOG_FROM * min(positive):
        axes.set_yscale("log", nonpositive="mask")
        if any(value == 0 for of_run in values for value in of_run):
            axes.set_xlabel("what is 0 is not drawn", fontsize=7)
    else:
        axes.set_ylim(bottom=0)
    ticks = [*layers[:: max(1, math.ceil(len(layers) / 8))], *(block for block in blocks if block not in layers)]
    axes.set_xticks([places[block] for block in ticks], [block.removeprefix("layers.") for block in ticks])
