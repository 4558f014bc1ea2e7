"""Draw the pictures of README and benchmarks/REPORT.md from benchmarks/results, into docs.

python -m benchmarks.tables.pictures
"""

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.tables.outcomes import losses_on_test_rows
from benchmarks.tables.render import Benchmarks
from lisa_dist.text import GIB

ROOT = Path(__file__).parents[2]
# Tasks of the grid by the names in the pictures.
TASKS = {"stories_gsm8k": "Llama of 260K on GSM8K", "stories_alpaca": "Llama of 260K on Alpaca"}
TASKS |= {"smollm2_gsm8k": "SmolLM2-135M on GSM8K", "smollm2_alpaca": "SmolLM2-135M on Alpaca"}
MARKERS = "os^vD*XP<>"
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
    """Draw test loss against planned memory at 8B: a panel per task, a point per method and seed, and the front."""
    methods = figures["methods"]
    tasks = [task for task in TASKS if any(task in one["tasks"] for one in methods.values())]
    figure = Figure(figsize=(5.5 * len(tasks), 5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        ran = {name: one for name, one in methods.items() if task in one["tasks"]}
        points = {name: (one["peak"] / GIB, statistics.mean(one["tasks"][task]["losses"])) for name, one in ran.items()}
        front = sorted(front_of(list(points.values())))
        axes.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1)
        for number, (name, at) in enumerate(sorted(points.items())):
            (line,) = axes.plot(*at, MARKERS[number % len(MARKERS)], label=name)
            losses = ran[name]["tasks"][task]["losses"]
            axes.plot([at[0]] * len(losses), losses, ".", color=line.get_color(), alpha=0.3)
        axes.set(xscale="log", xlabel="GiB of one GPU at 8B, planned", ylabel="test loss", title=TASKS[task])
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xticks([16, 20, 25, 40, 80, 160])
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def front_of(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point is both below and left of."""
    return [one for one in points if not any(x <= one[0] and y <= one[1] and (x, y) != one for x, y in points)]


def draw_lengths(*tasks: dict, path: Path = ROOT / "docs" / "lengths.png") -> None:
    """Draw test loss against the number of steps: a panel per model, a line per method that has several lengths."""
    by_model: dict[str, dict[int, dict]] = {}
    for task in tasks:
        by_model.setdefault(task["settings"]["task"], {})[task["settings"]["steps"]] = task["runs"]
    figure = Figure(figsize=(5.5 * len(by_model), 4.5), layout="constrained")
    for axes, (task, by_steps) in zip(
        figure.subplots(1, len(by_model), squeeze=False)[0], by_model.items(), strict=True
    ):
        lengths = sorted(by_steps)
        names = sorted({key.split("; ")[0] for runs in by_steps.values() for key in runs})
        for number, name in enumerate(names):
            found = {steps: losses_on_test_rows(name, by_steps[steps]) for steps in lengths}
            points = [(steps, statistics.mean(losses.values())) for steps, losses in found.items() if losses]
            if len(points) > 1:
                axes.plot(*zip(*points, strict=True), f"{MARKERS[number % len(MARKERS)]}-", label=name)
        axes.set(xscale="log", xlabel="optimizer steps", ylabel="test loss", title=TASKS[task])
        axes.set_xticks(lengths, [f"{steps:,}" for steps in lengths])
        axes.xaxis.set_minor_formatter("")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


LENGTHS = ["grid_stories_gsm8k", "grid_stories_gsm8k_1600"]
PICTURES = {
    "memory.png": (["policies"], draw_memory),
    "pareto.png": (["decision"], draw_pareto),
}


def main() -> None:
    """Draw every picture."""
    benchmarks = Benchmarks(ROOT / "benchmarks")
    for results, draw in PICTURES.values():
        draw(*(benchmarks.results(name)["figures"] for name in results))


if __name__ == "__main__":
    main()
