"""Which method learns most? Held-out loss of each after as many steps of the same rows, its learning rate tuned.

python -m benchmarks.quality.quality --model stories260k-hf --dataset gsm8k/train.jsonl --held_out gsm8k/test.jsonl

Every arm tries as many learning rates on the first seed, a factor of two apart, and more where its best is the lowest
or the highest of them; the best is taken with the other seeds too. A seed is an order of the rows, the same for every
arm, and what an arm draws: layers, or adapters. Losses are of the answers. What is in the results already is not run
again, so a sweep that was cut goes on.

With --gpu runs are on a GPU in bf16, one after another, as for a model of 3 billion parameters:

python -m benchmarks.quality.quality --gpu --model Qwen/Qwen2.5-3B --dataset gsm8k/train.jsonl \\
    --held_out gsm8k/test.jsonl --rows 16 --steps 400 --rate 1e-5 --results benchmarks/results/quality_gpu.json \\
    --arms full "lora r16" "lisa 2" "lisa 8" "lisa 2, factored" "lisa in lora's memory" \\
    --middle "lora r16=2e-4" "lisa 2=4e-5" "lisa 8=2e-5" "lisa 2, factored=4e-5" "lisa in lora's memory=2e-5"

There the peak of memory and the seconds of a step are of the runs themselves; on CPU pareto.py measures them.

With --seconds arms are compared at equal time: each trains as long as that, in CPU seconds of its process, or of a
clock on a GPU, and the rate falls with the time that is left. Switches count, evaluation does not.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import lisa_dist
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_with_data, positive, print_table, write_results
from benchmarks.quality.arms import ARMS, build, protocol_of, train_by_swift
from benchmarks.quality.examples import Data, evaluate, solved
from benchmarks.quality.training import Batch, held_out_losses, train
from benchmarks.tables.quality import BASELINES, quality_table
from benchmarks.tables.runs import best_rate, losses_by_rate, quality_key, runs_at_best

SETTINGS = ("model", "dataset", "held_out", "steps", "rows", "held_out_rows", "seconds", "gpu")  # of all runs of a file
WARMUP = 10  # steps in which the rate rises
PROBE_ROWS = 64  # that a probe measures on


def run(arguments: argparse.Namespace, arm: str, lr: float, seed: int) -> dict:
    """On a rank: train an arm, and measure what it has learned."""
    data, held_out = read(arguments)
    order = random.Random(seed).sample(range(len(data.rows)), len(data.rows))

    def batch_of(step: int) -> Batch:
        at = range(step * arguments.rows, (step + 1) * arguments.rows)
        return data.batch([order[place % len(order)] for place in at])

    steps = arguments.steps
    batches, rates = map(batch_of, itertools.count()), rates_by_time(lr, arguments.seconds, clock_of(arguments))
    if arguments.seconds is None:
        batches = map(batch_of, range(steps))
        rates = (lr * min(1.0, (step + 1) / WARMUP, 1 - step / steps) for step in range(steps))  # linear, to nothing
    if ARMS[arm][0] == "ms-swift":
        engine, lisa, found = train_by_swift(arguments, arm, seed, list(batches), list(rates))
    else:
        engine, lisa, found = train_here(arguments, arm, lr, seed, batches, rates)
    losses = found.pop("losses")
    exact = contextlib.nullcontext() if lisa is None or lisa.frozen_layers is None else lisa.frozen_layers.exact()
    with exact:  # of the 16-bit model, whatever frozen layers were held in
        held_out_loss, accuracy = evaluate(engine, held_out, arguments.rows)
    found |= {
        "held_out": held_out_loss,
        "token_accuracy": accuracy,
        "solved": solved(engine, data.tokenizer, arguments.held_out or arguments.dataset, arguments.questions),
        "train_last_50": statistics.mean(losses[-50:]),
        "steps": len(losses),
        "visits": None if lisa is None else lisa.visit_counts,
        "layers": None if lisa is None else lisa.config.lisa_activated_layers,
    }
    engine.destroy()
    return found


def read(arguments: argparse.Namespace) -> tuple[Data, Data]:
    """Examples to train on, and those to measure on."""
    # Where some arms take more steps than others, the order is one of all rows, so that it begins alike for all.
    needed = math.inf if arguments.seconds else arguments.rows * arguments.steps
    data = Data.read(arguments.model, arguments.dataset, needed)
    assert len(data.rows) >= min(needed, 1000), "too few rows"
    if arguments.held_out is not None:
        return data, Data.read(arguments.model, arguments.held_out, arguments.held_out_rows)
    # The end of the rows, which are more than are trained on.
    held_out = Data.read(arguments.model, arguments.dataset, -arguments.held_out_rows)
    return Data(data.tokenizer, [row for row in data.rows if row not in held_out.rows]), held_out


def clock_of(arguments: argparse.Namespace) -> Callable[[], float]:
    """What steps are timed by; on a GPU a step's loss is waited for."""
    return time.perf_counter if arguments.gpu else time.process_time


def rates_by_time(lr: float, seconds: float, clock: Callable[[], float]) -> Iterator[float]:
    """A learning rate for every step that begins within `seconds` of the first: linear in time, to nothing."""
    began, step = clock(), 0
    while (gone := (clock() - began) / seconds) < 1.0:
        step += 1
        yield lr * min(1.0, step / WARMUP, 1 - gone)


def train_here(
    arguments: argparse.Namespace, arm: str, lr: float, seed: int, batches: Iterable[Batch], rates: Iterable[float]
) -> tuple:
    """An arm's engine and its controller, if it has one, trained; losses, and on a GPU seconds and bytes."""
    gc.collect()
    if arguments.gpu:
        torch.cuda.reset_peak_memory_stats()
        of_others = torch.cuda.memory_allocated()
    engine, lisa = build(arguments, arm, lr, seed)
    if lisa is not None:
        factor = lisa.config.rate_factor(len(lisa.blocks.layers))
        rates = (factor * rate for rate in rates)
        if lisa.config.lisa_probe_steps:
            batches = list(batches)
            probe(engine, lisa, batches, unseen(arguments), lr)
    clock = clock_of(arguments)
    started = clock()
    found: dict = {"losses": train(engine, lisa, batches, rates)}
    if arguments.gpu:
        found["seconds_per_step"] = (clock() - started) / len(found["losses"])
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - of_others
    if lisa is not None:
        lisa.close()
    return engine, lisa, found


def unseen(arguments: argparse.Namespace) -> list[Batch]:
    """Rows behind those that are trained on, and not those that are measured on, for a probe."""
    data, held_out = read(arguments)
    more = Data.read(arguments.model, arguments.dataset, len(data.rows) + len(held_out.rows) + PROBE_ROWS)
    rows = [row for row in more.rows[len(data.rows) :] if row not in held_out.rows and row not in data.rows]
    assert len(rows) >= PROBE_ROWS, "a probe needs rows that are not trained on"
    others = Data(data.tokenizer, rows[:PROBE_ROWS])
    starts = range(0, PROBE_ROWS, arguments.rows)
    return [others.batch(range(start, min(start + arguments.rows, PROBE_ROWS))) for start in starts]


def probe(engine, lisa: lisa_dist.LisaController, batches: list[Batch], held_out: list[Batch], lr: float) -> list:
    """Try layers on the first batches of a run, at rates that rise to its own; held-out losses of each stretch."""
    steps = lisa.config.lisa_probe_steps

    def train_step(step: int) -> None:
        train(engine, None, [batches[step]], [lr * (step + 1) / steps])

    return lisa_dist.probe_layers(lisa, train_step, lambda: held_out_losses(engine, held_out))


def window_of(arm: str, arguments: argparse.Namespace) -> list[float]:
    """As many rates for every arm, a factor of two apart around its own middle."""
    given = dict(words.rsplit("=", 1) for words in arguments.middle)
    middle, count = float(given.get(arm, arguments.rate * ARMS[arm][2])), arguments.num_rates
    return [middle * 2.0 ** (place - (count - 1) // 2) for place in range(count)]


def beyond(arm: str, figures: dict) -> float | None:
    """The rate to try next, where the best one so far has others on one side alone."""
    rates, best = list(losses_by_rate(arm, figures)), best_rate(arm, figures)
    return best / 2 if best == rates[0] else best * 2 if best == rates[-1] else None


def run_all(runs: list, arguments: argparse.Namespace, figures: dict) -> None:
    """Those of `runs` that have no figures yet, on as many processes as `--jobs`; figures are filled in."""
    missing = [one for one in runs if quality_key(*one) not in figures]
    # Each takes the next as it ends one, since a run with a probe takes several times as long as others.
    jobs, waiting, writing = min(arguments.jobs, len(missing)), iter(missing), threading.Lock()

    def work(_: int) -> None:
        with RankGroup(1, Caller) as rank:
            while True:
                with writing:
                    one = next(waiting, None)
                if one is None:
                    return
                arm, lr, seed = one
                (found,) = rank.call("run", run, arguments, arm, lr, seed)
                with writing:
                    figures[quality_key(arm, lr, seed)] = found
                    write_results(arguments.results, {"settings": settings_of(arguments), "runs": figures}, quiet=True)
                print(arm, lr, seed, found["held_out"], flush=True)

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        list(pool.map(work, range(jobs)))


def settings_of(arguments: argparse.Namespace) -> dict:
    """What all runs of a file have in common; of files their names, wherever they lie."""
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings["steps"] = arguments.steps if arguments.seconds is None else None
    paths = ("model", "dataset", "held_out")
    return settings | {name: Path(settings[name]).name for name in paths if settings[name] is not None}


def read_figures(arguments: argparse.Namespace) -> dict:
    """The runs that are in the results already; they must be of the same settings."""
    if not arguments.results.is_file():
        return {}
    held = json.loads(arguments.results.read_text())["figures"]
    asked = settings_of(arguments)
    other = [f"{name} {held['settings'].get(name)}" for name in SETTINGS if held["settings"].get(name) != asked[name]]
    if other:
        sys.exit(f"{arguments.results} has runs with {', '.join(other)}: give other --results.")
    return held["runs"]


def check_arms(arguments: argparse.Namespace) -> None:
    """Whether every arm can run as asked."""
    for arm in arguments.arms:
        method, settings, _ = ARMS[arm]
        if arguments.seconds is not None and (method == "ms-swift" or "lisa_probe_steps" in settings):
            reason = "its time is not measured" if method == "ms-swift" else "its probe would not be in the time"
            sys.exit(f"--seconds with {arm}: {reason}; leave the arm out.")
        if arguments.gpu and method in ("ms-swift", "galore", "apollo"):
            sys.exit(f"--gpu with {arm}: it has no fp32 masters, which other arms have; leave the arm out.")


def plot(arms: list[str], figures: dict, path: Path) -> None:
    """Held-out loss against the learning rate of the first seed, and the best of each arm with all seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_rate, by_arm = figure.subplots(1, 2)
    at_best = {arm: [run["held_out"] for run in runs_at_best(arm, figures)] for arm in arms}
    ranked = sorted(arms, key=lambda arm: -statistics.mean(at_best[arm]))
    for place, arm in enumerate(ranked):
        losses, color = losses_by_rate(arm, figures), f"C{place % 10}"
        dashes = "o-" if place < 10 else "s--"
        by_rate.plot(losses.keys(), losses.values(), dashes, color=color, label=arm)
        by_arm.plot(at_best[arm], [place] * len(at_best[arm]), "o", color=color, alpha=0.5)
        by_arm.plot(statistics.mean(at_best[arm]), place, "|", color=color, markersize=18, markeredgewidth=2)
    rates = sorted({lr for arm in ranked for lr in losses_by_rate(arm, figures)})
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, first seed")
    by_arm.set(xlabel="held-out loss at the best rate: every seed, and their mean", yticks=range(len(ranked)))
    by_arm.set_yticklabels(ranked)
    by_rate.set_xticks(rates, [f"{lr:g}" for lr in rates], rotation=45)
    by_rate.minorticks_off()
    by_rate.legend(fontsize=7, ncols=2, reverse=True)
    for axes in (by_arm, by_rate):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Tune, run the other seeds, print the table and write what came of it."""
    parser = parser_with_data(__doc__, "quality")
    parser.add_argument("--held_out", help="examples to measure on; by default the last of --dataset")
    parser.add_argument("--held_out_rows", type=positive, default=256)
    parser.add_argument("--questions", type=int, default=0, help="held-out questions to answer, for exact accuracy")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=BASELINES, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--protocol", action="store_true", help="the arms of the comparison of every method")
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--rows", type=positive, default=8, help="of a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="the middle of full training's learning rates")
    parser.add_argument("--middle", nargs="+", default=[], metavar="ARM=RATE", help="the middle of an arm's own rates")
    parser.add_argument("--num_rates", type=positive, default=3)
    parser.add_argument("--more_rates", type=int, default=2, help="that an arm may try where its best is at an end")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--seconds", type=float, help="train as long as that, in the place of --steps")
    parser.add_argument("--jobs", type=positive, default=1, help="processes at a time")
    parser.add_argument("--plot", type=Path, help="draw losses to this .png")
    parser.add_argument("--gpu", action="store_const", const=True, help="on the first GPU, in bf16")
    arguments = parser.parse_args()
    arguments.arms = protocol_of(arguments.model) if arguments.protocol else arguments.arms
    check_arms(arguments)
    if not arguments.gpu:
        run_on_cpu()
    figures = read_figures(arguments)
    run_all([(arm, lr, 0) for arm in arguments.arms for lr in window_of(arm, arguments)], arguments, figures)
    for _ in range(arguments.more_rates):
        further = [(arm, lr, 0) for arm in arguments.arms if (lr := beyond(arm, figures)) is not None]
        run_all(further, arguments, figures)
    best = {arm: best_rate(arm, figures) for arm in arguments.arms}
    run_all([(arm, best[arm], s) for arm in arguments.arms for s in range(1, arguments.seeds)], arguments, figures)
    header, *rows = quality_table({"settings": settings_of(arguments), "runs": figures}, arguments.arms)
    print_table(header, rows)
    if arguments.plot:
        plot(arguments.arms, figures, arguments.plot)


if __name__ == "__main__":
    main()
