"""What does a loss cost? Held-out losses of quality.py against the peak of a step's memory and its CPU seconds.

python -m benchmarks.quality.pareto --plot docs/pareto.png \\
    --task "stories260K on GSM8K" stories260k-hf benchmarks/results/quality.json \\
    --task "SmolLM2-135M on GSM8K" .quickstart/model benchmarks/results/quality_smollm2.json \\
    --task "SmolLM2-135M on Alpaca" .quickstart/model benchmarks/results/quality_smollm2_alpaca.json

Costs are measured here, of steps of the longest rows: the most bytes that tensors hold at once in a step, those that
they hold between two steps, and CPU seconds. Arms take turns for some rounds, each in a process of its own and with
other layers in every round; seconds are the median. What is in the results already is not measured again, and tasks
that are not given stay. The front is of the arms that no other is better than in both.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, print_table, write_results
from benchmarks.quality.arms import ARMS, build
from benchmarks.quality.examples import LENGTH
from benchmarks.quality.training import train
from benchmarks.tables.quality import MEASURED, pareto_table
from benchmarks.tables.runs import runs_at_best
from lisa_dist.core.period_log import live_storages, live_tensor_bytes
from lisa_dist.memory.tracker import AllocationTracker

ROUNDS, STEPS = 2, 5  # of steps that are timed in each
SAME_TRAINING = {"full one pass": "full"}  # its losses are the other's
FONT = 7  # points
NAMED = {
    "full": "full",
    "full one pass": "full, one pass",
    "lora r16": "LoRA 16",
    "lora r64": "LoRA 64",
    "galore r16": "GaLore",
    "apollo r16": "APOLLO",
    "lisa 2": "LISA, 2 layers",
    "lisa modules": "LISA, modules",
    "lisa in lora's memory": "LISA in LoRA's memory",
    "lisa in lora's, embed frozen": "the same, embed frozen",
    "lisa at lora's peak, embed frozen": "LISA at LoRA's peak",
}  # what the plot calls some arms; the others have no names there


def cost_of(arguments: argparse.Namespace, arm: str, seed: int) -> dict[str, float]:
    """On a rank: bytes that tensors hold, at most in the third step and between steps, and CPU seconds of steps."""
    engine, lisa = build(arguments, arm, 1e-4, seed, interval=STEPS + 3)  # all in one period
    words = engine.module.get_input_embeddings().weight.shape[0]
    rows = torch.randint(0, words, (arguments.rows, LENGTH))
    batch = {"input_ids": rows, "labels": rows}
    train(engine, lisa, [batch] * 2)
    gc.collect()
    between = live_tensor_bytes()
    tracker = AllocationTracker()
    tracker.add(torch.empty(0, dtype=torch.uint8).set_(storage) for storage in live_storages())
    tracker.begin_phase()
    with tracker:
        train(engine, lisa, [batch])
    of_steps = []
    for _ in range(STEPS):
        started = time.process_time()
        train(engine, lisa, [batch])
        of_steps.append(time.process_time() - started)
    engine.destroy()
    return {"peak": tracker.peak, "between": between, "seconds": statistics.median(of_steps)}


def measure(tasks: dict[str, dict], results: Path, asked: Iterable[str]) -> dict[str, dict]:
    """Costs of the arms that have runs, and their losses; written as they come."""
    figures: dict[str, dict] = {"costs": {}, "tasks": {}}
    if results.is_file():
        figures = json.loads(results.read_text(encoding="utf-8"))["figures"]
    for name, task in tasks.items():
        settings, runs = task["figures"]["settings"], task["figures"]["runs"]
        arguments = argparse.Namespace(model=task["model"], rows=settings["rows"], steps=settings["steps"], gpu=False)
        costs = figures["costs"].setdefault(f"{settings['model']}, rows: {settings['rows']}", {})
        at_best = {arm: runs_at_best(SAME_TRAINING.get(arm, arm), runs) for arm in asked}
        for seed in range(ROUNDS):
            for arm in (arm for arm in at_best if at_best[arm]):
                rounds = costs.setdefault(arm, {"rounds": []})["rounds"]
                if len(rounds) > seed:
                    continue
                with RankGroup(1, Caller) as rank:  # its own, since DeepSpeed holds tensors of an engine that ended
                    (found,) = rank.call("run", cost_of, arguments, arm, seed)
                rounds.append(found)
                costs[arm] = {size: max(one[size] for one in rounds) for size in ("peak", "between")}
                costs[arm] |= {"seconds": statistics.median(one["seconds"] for one in rounds), "rounds": rounds}
                print(name, arm, f"{found['peak'] / 1e6:.1f} MB, {found['seconds']:.3f} s", flush=True)
                write_results(results, figures, quiet=True)
        losses = {arm: [run["held_out"] for run in found] for arm, found in at_best.items() if found}
        figures["tasks"][name] = {
            "settings": settings,
            "arms": {
                arm: {size: costs[arm][size] for size in ("peak", "between", "seconds")}
                | {"loss": statistics.mean(of_arm), "losses": of_arm}
                for arm, of_arm in losses.items()
            },
        }
    return figures


def plot(figures: dict, path: Path) -> None:
    """A row a task: loss against memory and against time, a point an arm with its seeds, and the front."""
    from matplotlib.figure import Figure

    tasks, named = figures["tasks"], []
    figure = Figure(figsize=(12, 4 * len(tasks)), layout="constrained")
    for (name, task), row in zip(
        tasks.items(), figure.subplots(len(tasks), 2, sharey="row", squeeze=False), strict=True
    ):
        for axes, cost, scale in zip(row, ("peak", "seconds"), (1e6, 1), strict=True):
            points = {arm: (one[cost] / scale, one["loss"]) for arm, one in task["arms"].items()}
            front = sorted(front_of(list(points.values())))
            axes.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1)
            for arm, (at, loss) in points.items():
                color = "C3" if arm == "full" else "C1" if ARMS[arm][0] != "lisa" else "C0"
                losses = task["arms"][arm]["losses"]
                axes.plot([at] * len(losses), losses, "o", color=color, alpha=0.25, markersize=3)
                axes.plot(at, loss, "o", color=color)
                axes.margins(x=0.15)
            axes.grid(alpha=0.3)
            named.append((axes, {NAMED[arm]: at for arm, at in points.items() if arm in NAMED}))
        row[0].set(ylabel=f"{name}\nheld-out loss", xlabel="peak of a step, MB")
        row[1].set(xlabel="CPU s a step")
    figure.draw_without_rendering()  # by which axes have their sizes
    for axes, of_axes in named:
        name_points(axes, of_axes)
    figure.savefig(path, dpi=110)


def name_points(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Names beside their points, on the side where there is room, and above names that they would cover."""
    points_of_pixel = 72 / axes.figure.dpi
    middle = sum(axes.get_xlim()) / 2
    taken: list[tuple[float, float, float]] = []  # left and right end of a name and its height, in points
    for name, at in sorted(points.items(), key=lambda point: point[1][1]):
        x, y = axes.transData.transform(at) * points_of_pixel
        side = -1 if at[0] > middle else 1
        left, right = sorted((x + 5 * side, x + (5 + FONT * 0.62 * len(name)) * side))
        height = y - FONT / 3
        while any(left < other[1] and other[0] < right and abs(height - other[2]) < FONT for other in taken):
            height += 1
        taken.append((left, right, height))
        place = {"xytext": (5 * side, height - y), "ha": "right" if side < 0 else "left"}
        axes.annotate(name, at, textcoords="offset points", fontsize=FONT, **place)


def front_of(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is below and left of."""
    return [one for one in points if not any(x <= one[0] and y <= one[1] and (x, y) != one for x, y in points)]


def main() -> None:
    """Measure the costs of every arm that has been run, print a table of each task, draw the plot."""
    run_on_cpu()
    parser = parser_of(__doc__, "pareto")
    parser.add_argument(
        "--task",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "MODEL", "RESULTS"),
        help="a name for the plot, the model (folder or hub id), and results of quality.py; may be given several times",
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=MEASURED, metavar="ARM", help="of those with runs")
    parser.add_argument("--plot", type=Path, help="draw it to this .png")
    arguments = parser.parse_args()
    tasks = {
        name: {"model": model, "figures": json.loads(Path(path).read_text(encoding="utf-8"))["figures"]}
        for name, model, path in arguments.task
    }
    figures = measure(tasks, arguments.results, arguments.arms)
    write_results(arguments.results, figures)
    for name, task in figures["tasks"].items():
        header, *lines = pareto_table(task)
        print(name)
        print_table(header, lines)
    if arguments.plot:
        plot(figures, arguments.plot)


if __name__ == "__main__":
    main()
