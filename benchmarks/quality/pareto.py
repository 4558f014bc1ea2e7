"""What does a loss cost? Held-out losses of quality.py against the peak of a step's memory and its CPU seconds.

python -m benchmarks.quality.pareto --model stories260k-hf --of benchmarks/results/quality.json --plot pareto.png

Both are measured here, of steps of the longest rows in one process, arm after arm: the peak of all tensors that live at
once in the third step, and the seconds of steps without a switch in several periods, since what a step takes may depend
on the layers. The front is of the arms that no other is better than in both. Arms of other programs are left out.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, print_table, write_results
from benchmarks.quality.arms import ARMS, build
from benchmarks.quality.examples import LENGTH
from benchmarks.quality.training import train
from benchmarks.tables.rows import method_name, pareto_table
from benchmarks.tables.runs import best_rate, runs_at_best
from lisa_dist.core.live_bytes import live_storages, live_tensor_bytes
from lisa_dist.memory.tracker import AllocationTracker

PERIODS, STEPS = 4, 3  # that are timed, and of each


def cost_of(arguments: argparse.Namespace, arm: str) -> tuple[int, float]:
    """On a rank: the most bytes that tensors hold at once in the third step, and the CPU seconds of a step."""
    gc.collect()
    of_others = live_tensor_bytes()
    engine, lisa = build(arguments, arm, 1e-4, seed=0, interval=STEPS)
    words = engine.module.get_input_embeddings().weight.shape[0]
    rows = torch.randint(0, words, (arguments.rows, LENGTH))
    batch = {"input_ids": rows, "labels": rows}
    train(engine, lisa, [batch] * 2)
    gc.collect()
    tracker = AllocationTracker()
    tracker.add(torch.empty(0, dtype=torch.uint8).set_(storage) for storage in live_storages())
    tracker.begin_phase()
    with tracker:
        train(engine, lisa, [batch])
    of_periods = []
    for _ in range(PERIODS):
        of_steps = []
        for _ in range(STEPS):
            started = time.process_time()
            train(engine, lisa, [batch])
            of_steps.append(time.process_time() - started)
        of_periods.append(statistics.median(of_steps))
    engine.destroy()
    return tracker.peak - of_others, statistics.mean(of_periods)


def plot(figures: dict, path: Path) -> None:
    """Loss against memory and against time, a point an arm with its seeds, and the front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    found = list(figures["arms"].items())
    for axes, cost, label in zip(
        figure.subplots(1, 2, sharey=True), ("peak", "seconds"), ("peak of a step, MB", "CPU s a step"), strict=True
    ):
        scale = 1e6 if cost == "peak" else 1
        front = sorted(front_of([(one[cost] / scale, one["loss"]) for _, one in found]))
        axes.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1)
        for place, (arm, one) in enumerate(found):
            color = "C1" if arm.startswith(("lora", "galore", "apollo")) else "C3" if arm == "full" else "C0"
            at = one[cost] / scale
            axes.plot([at] * len(one["losses"]), one["losses"], "o", color=color, alpha=0.25, markersize=4)
            axes.plot(at, one["loss"], "o", color=color)
            above = (5, 4 if place % 2 else -10)
            axes.annotate(method_name(arm), (at, one["loss"]), xytext=above, textcoords="offset points", fontsize=7)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="held-out loss")
    figure.savefig(path, dpi=120)


def front_of(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is below and left of."""
    return [one for one in points if not any(x <= one[0] and y <= one[1] and (x, y) != one for x, y in points)]


def main() -> None:
    """Measure the peak of every arm that has been run, print the table, draw the plot."""
    run_on_cpu()
    parser = parser_of(__doc__, "pareto")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--of", type=Path, required=True, help="results of quality.py")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="by default those with most seeds")
    parser.add_argument("--plot", type=Path, help="draw it to this .png")
    arguments = parser.parse_args()
    of_quality = json.loads(arguments.of.read_text(encoding="utf-8"))["figures"]
    runs, arguments.gpu = of_quality["runs"], False
    arguments.rows, arguments.steps = of_quality["settings"]["rows"], of_quality["settings"]["steps"]
    at_best = {arm: runs_at_best(arm, runs) for arm in ARMS}
    most = max(map(len, at_best.values()))
    ours = [arm for arm in ARMS if ARMS[arm][0] != "ms-swift"]
    arms = arguments.arms or [arm for arm in ours if len(at_best[arm]) == most]
    measured = {}
    with RankGroup(1, Caller) as rank:
        for arm in arms:
            ((peak, seconds),) = rank.call("run", cost_of, arguments, arm)
            losses = [run["held_out"] for run in at_best[arm]]
            measured[arm] = {"peak": peak, "seconds": seconds, "loss": statistics.mean(losses), "losses": losses}
            measured[arm] |= {"rate": best_rate(arm, runs), "layers": at_best[arm][0]["layers"]}
            print(arm, f"{peak / 1e6:.1f} MB, {seconds:.3f} s", flush=True)
    figures = {"settings": of_quality["settings"], "arms": measured}
    write_results(arguments.results, figures)
    header, *lines = pareto_table(figures)
    print_table(header, lines)
    if arguments.plot:
        plot(figures, arguments.plot)


if __name__ == "__main__":
    main()
