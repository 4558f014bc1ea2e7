"""What does a loss cost? Held-out losses of quality.py against the peak of a step's memory and its CPU seconds.

python -m benchmarks.quality.pareto \\
    --task "stories260K on GSM8K" stories260k-hf benchmarks/results/quality.json \\
    --task "SmolLM2-135M on GSM8K" .quickstart/model benchmarks/results/quality_smollm2.json \\
    --task "SmolLM2-135M on Alpaca" .quickstart/model benchmarks/results/quality_smollm2_alpaca.json

Costs are of steps of the longest rows: the most bytes that tensors take in a step, those between two steps, and CPU
seconds. Methods take turns, each in a process of its own and with other layers in every round; seconds are the median.
What is in the results already is not measured again, and tasks that are not given stay.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.methods import METHODS
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, write_results
from benchmarks.common.runs import peak_within
from benchmarks.quality.engines import build
from benchmarks.quality.training import LENGTH, train
from benchmarks.tables.outcomes import runs_at_best
from benchmarks.tables.render import print_table
from benchmarks.tables.rows import TABLES
from lisa_dist.core.live_bytes import live_tensor_bytes

ROUNDS, STEPS = 2, 5  # of steps that are timed in each
SAME_TRAINING = {"full one pass": "full"}  # its losses are the other's
MEASURED = ("full", "full one pass", "lora r16", "lora r64", "lisa 2", "lisa 2 one pass",
            "lisa 2, factored", "lisa 2, 8 bits", "lisa 2 bf16", "lisa 2, frozen 8 bits", "lisa 2, frozen 4 bits",
            "lisa auto", "lisa modules", "lisa in lora's memory", "lisa in lora's, embed frozen",
            "lisa at lora's peak, embed frozen", "lisa 14, embed frozen", "lisa 8", "lisa 8, embed frozen")  # fmt: skip


def cost_of(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, float]:
    """On a rank: bytes that tensors take, at most in the third step and between steps, and CPU seconds of steps."""
    engine, lisa = build(arguments, method, 1e-4, seed, interval=STEPS + 3)  # all in one period
    words = engine.module.get_input_embeddings().weight.shape[0]
    rows = torch.randint(0, words, (arguments.rows, LENGTH))
    batch = {"input_ids": rows, "labels": rows}
    train(engine, lisa, [batch] * 2)
    gc.collect()
    between, peak = live_tensor_bytes(), peak_within(lambda: train(engine, lisa, [batch]))
    of_steps = []
    for _ in range(STEPS):
        started = time.process_time()
        train(engine, lisa, [batch])
        of_steps.append(time.process_time() - started)
    engine.destroy()
    return {"peak": peak, "between": between, "seconds": statistics.median(of_steps)}


def measure(tasks: dict[str, dict], results: Path, asked: Iterable[str]) -> dict[str, dict]:
    """Costs of the methods that have runs, and their losses; written as they come."""
    figures: dict[str, dict] = {"costs": {}, "tasks": {}}
    if results.is_file():
        figures = json.loads(results.read_text(encoding="utf-8"))["figures"]
    for name, task in tasks.items():
        settings, runs = task["figures"]["settings"], task["figures"]["runs"]
        arguments = argparse.Namespace(model=task["model"], rows=settings["rows"], steps=settings["steps"], gpu=False)
        costs = figures["costs"].setdefault(f"{settings['model']}, rows: {settings['rows']}", {})
        at_best = {method: runs_at_best(SAME_TRAINING.get(method, method), runs) for method in asked}
        for seed in range(ROUNDS):
            for method in (method for method in at_best if at_best[method]):
                rounds = costs.setdefault(method, {"rounds": []})["rounds"]
                if len(rounds) > seed:
                    continue
                with RankGroup(1, Caller) as rank:  # its own, since DeepSpeed holds tensors of an engine that ended
                    (found,) = rank.call("run", cost_of, arguments, method, seed)
                rounds.append(found)
                costs[method] = {size: max(one[size] for one in rounds) for size in ("peak", "between")}
                costs[method] |= {"seconds": statistics.median(one["seconds"] for one in rounds), "rounds": rounds}
                print(name, method, f"{found['peak'] / 1e6:.1f} MB, {found['seconds']:.3f} s", flush=True)
                write_results(results, figures, quiet=True)
        # Methods that were measured once, and that the registry has no more, stay.
        of_task = figures["tasks"].setdefault(name, {"arms": {}}) | {"settings": settings}
        for method, found in at_best.items():
            if losses := [run["held_out"] for run in found]:
                sizes = {size: costs[method][size] for size in ("peak", "between", "seconds")}
                of_task["arms"][method] = sizes | {"loss": statistics.mean(losses), "losses": losses}
        figures["tasks"][name] = of_task
    return figures


def main() -> None:
    """Measure the costs of every method that has been run, print a table of each task."""
    run_on_cpu()
    parser = parser_of(__doc__, "pareto")
    about = "a name, the model (folder or hub id), and results of quality.py; may be given several times"
    names = ("NAME", "MODEL", "RESULTS")
    parser.add_argument("--task", nargs=3, action="append", required=True, metavar=names, help=about)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=MEASURED, help="of those with runs")
    arguments = parser.parse_args()
    tasks = {
        name: {"model": model, "figures": json.loads(Path(path).read_text(encoding="utf-8"))["figures"]}
        for name, model, path in arguments.task
    }
    figures = measure(tasks, arguments.results, arguments.methods)
    write_results(arguments.results, figures)
    for name, task in tasks.items():
        print(name)
        print_table(*replace(TABLES["comparing_pareto_stories"], of=name).make(figures, task["figures"]))


if __name__ == "__main__":
    main()
