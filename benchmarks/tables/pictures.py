"""Draw the pictures of README and benchmarks/REPORT.md from benchmarks/results, into docs.

python -m benchmarks.tables.pictures
"""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.tables.render import Benchmarks
from lisa_dist.text import GIB

ROOT = Path(__file__).parents[2]
# Rows of policies.json in the picture, by how they begin.
POLICIES = {"full": "full training", "LoRA r16": "LoRA, rank 16", "QLoRA r16": "QLoRA"}
POLICIES |= {"LoRA r16, embed and head": "LoRA, embed", "adapters r16, small embed and head": "adapters, rank 16"}
POLICIES |= {"LISA as published": "LISA as"}
POLICIES |= {"LISA, moments in 8 bits, no masters": "always trained, no masters", "LISA, factored": "the same, embed"}
POLICIES |= {f"LISA, factored, frozen {bits} bits": f"the same, frozen layers in {bits}" for bits in (8, 4)}
POLICIES |= {"LISA, sampled, 8 bits": "embed and head sampled, no", "LISA, states on host": "all states on the host"}


def draw_memory(figures: dict, path: Path = ROOT / "docs" / "memory.png") -> None:
    """Bars of a GPU's peak in rows of 1024 tokens without checkpointing, for each model; full training is cut off."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    baselines = sum(not name.startswith(("LISA", "adapters")) for name in POLICIES)
    colors = ["#9ca3af", *["#d9580d"] * (baselines - 1), *["#2563eb"] * (len(POLICIES) - baselines)]
    both = zip(figure.subplots(1, 2, sharey=True), {"llama2-7b": 1, "llama3.1-8b": 5}.items(), strict=True)
    for axes, (model, column) in both:
        rows = [next(row for row in figures["rows"] if row[0].startswith(words)) for words in POLICIES.values()]
        peaks = [row[column] / GIB for row in rows]
        limit = 1.25 * max(peaks[1:])
        bars = axes.barh(list(POLICIES), [min(peak, limit) for peak in peaks], color=colors)
        inside, *outside = (f"{peak:.1f}" for peak in peaks)
        axes.bar_label(bars, ["", *outside], padding=2, color="#374151")
        axes.text(limit * 0.98, 0, inside, va="center", ha="right", color="white")
        axes.set(title=model, xlabel="GiB on one GPU, planned", xlim=(0, limit))
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)


def draw_pareto(figures: dict, path: Path = ROOT / "docs" / "pareto.png") -> None:
    """A row a task: loss against memory and against time, a point a method with its seeds, and the front."""
    figure = Figure(figsize=(12, 4 * len(figures["tasks"])), layout="constrained")
    rows = figure.subplots(len(figures["tasks"]), 2, sharey="row", squeeze=False)
    for (name, task), row in zip(figures["tasks"].items(), rows, strict=True):
        costs = ("peak", 1e6, "peak of a step, MB"), ("seconds", 1, "CPU s a step")
        for axes, (cost, scale, label) in zip(row, costs, strict=True):
            points = {method: (one[cost] / scale, one["loss"]) for method, one in task["arms"].items()}
            front = sorted(front_of(list(points.values())))
            axes.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1)
            for method, at in points.items():
                (line,) = axes.plot(*at, "o" if method.startswith("lisa") else "s", label=method)
                losses = task["arms"][method]["losses"]
                axes.plot([at[0]] * len(losses), losses, ".", color=line.get_color(), alpha=0.3)
            axes.set(xlabel=label, ylabel=f"{name}\nheld-out loss")
        row[1].legend(fontsize=6, bbox_to_anchor=(1, 1), loc="upper left")
    figure.savefig(path, dpi=110)


def front_of(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is below and left of."""
    return [one for one in points if not any(x <= one[0] and y <= one[1] and (x, y) != one for x, y in points)]


PICTURES = {"memory.png": ("policies", draw_memory), "pareto.png": ("pareto", draw_pareto)}

if __name__ == "__main__":
    for picture, (results, draw) in PICTURES.items():
        draw(Benchmarks(ROOT / "benchmarks").results(results)["figures"], ROOT / "docs" / picture)
