"""Which method learns most? Held-out loss of each after as many steps of the same rows, its learning rate tuned.

python -m benchmarks.quality.quality --model stories260k-hf --dataset gsm8k/train.jsonl --held_out gsm8k/test.jsonl

Every method tries as many learning rates on the first seed, a factor of two apart, and more where its best is the
lowest or the highest of them; the best is taken with the other seeds too. A seed is an order of the rows, the same for
every method, and what a method samples. Losses are of the answers. What is in the results already is not run again.
With --gpu runs are on a GPU in bf16, one after another (cost/GPU.md), and their peaks and seconds in the results. With
--seconds methods are compared at equal time, in CPU seconds of a process, or of a clock on a GPU: the rate falls with
the time that is left; switches count, evaluation does not.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.methods import METHODS
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, positive, write_results
from benchmarks.quality.engines import build
from benchmarks.quality.training import Batch, Data, evaluate, train
from benchmarks.tables.outcomes import best_rate, losses_by_rate, quality_key
from benchmarks.tables.render import Table, print_table
from benchmarks.tables.rows import best_first

SETTINGS = ("model", "dataset", "held_out", "steps", "rows", "held_out_rows", "seconds", "gpu")  # of all runs of a file
BASELINES = Table(
    ["quality"],
    best_first,
    "method | layers | best rate | held-out loss | spread of seeds | next tokens right",
    "{0[method]} | {0[layers]} | {0[rate]:rate} | {0[loss]:.4f} | {0[seeds]} | {0[right]:.1%}",
    [
        *("full", "lora r8", "lora r32", "lisa 1", "lisa 1 reshuffle", "lisa 1 adaptive", "lisa 2", "lisa 2 reshuffle"),
        *("lisa 2 adaptive", "fixed 2", "embed and head", "one block"),
    ],
)
CHOICES = [name for name, method in METHODS.items() if method.kind in ("full", "lora", "lisa")]
WARMUP = 10  # steps in which the rate rises


def run(arguments: argparse.Namespace, method: str, lr: float, seed: int) -> dict:
    """On a rank: train a method, and measure what it has learned."""
    data, held_out = read(arguments)
    order = random.Random(seed).sample(range(len(data.rows)), len(data.rows))

    def batch_of(step: int) -> Batch:
        at = range(step * arguments.rows, (step + 1) * arguments.rows)
        return data.batch([order[place % len(order)] for place in at])

    steps, clock = arguments.steps, time.perf_counter if arguments.gpu else time.process_time
    batches, rates = map(batch_of, itertools.count()), rates_by_time(lr, arguments.seconds, clock)
    if arguments.seconds is None:
        batches = map(batch_of, range(steps))
        rates = (lr * min(1.0, (step + 1) / WARMUP, 1 - step / steps) for step in range(steps))  # linear, to nothing
    gc.collect()
    of_others = torch.cuda.memory_allocated() if arguments.gpu else 0
    if arguments.gpu:
        torch.cuda.reset_peak_memory_stats()
    engine, lisa = build(arguments, method, lr, seed)
    started = clock()
    losses = train(engine, lisa, batches, rates)
    found = {}
    if arguments.gpu:
        found["seconds_per_step"] = (clock() - started) / len(losses)
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - of_others
    if lisa is not None:
        lisa.close()
    exact = contextlib.nullcontext() if lisa is None or lisa.frozen_layers is None else lisa.frozen_layers.exact()
    with exact:  # of the 16-bit model, whatever frozen layers were held in
        held_out_loss, accuracy = evaluate(engine, held_out, arguments.rows)
    found |= {
        "held_out": held_out_loss,
        "token_accuracy": accuracy,
        "steps": len(losses),
        "layers": None if lisa is None else lisa.config.lisa_activated_layers,
    }
    engine.destroy()
    return found


def read(arguments: argparse.Namespace) -> tuple[Data, Data]:
    """Examples to train on, and those to measure on."""
    # Where some methods take more steps than others, the order is one of all rows, so that it begins alike for all.
    needed = math.inf if arguments.seconds else arguments.rows * arguments.steps
    data = Data.read(arguments.model, arguments.dataset, needed)
    assert len(data.rows) >= min(needed, 1000), "too few rows"
    if arguments.held_out is not None:
        return data, Data.read(arguments.model, arguments.held_out, arguments.held_out_rows)
    # The end of the rows, which are more than are trained on.
    held_out = Data.read(arguments.model, arguments.dataset, -arguments.held_out_rows)
    return Data(data.tokenizer, [row for row in data.rows if row not in held_out.rows]), held_out


def rates_by_time(lr: float, seconds: float, clock: Callable[[], float]) -> Iterator[float]:
    """A learning rate for every step that begins within `seconds` of the first: linear in time, to nothing."""
    began, step = clock(), 0
    while (gone := (clock() - began) / seconds) < 1.0:
        step += 1
        yield lr * min(1.0, step / WARMUP, 1 - gone)


def window_of(method: str, arguments: argparse.Namespace) -> list[float]:
    """As many rates for every method, a factor of two apart around its own middle."""
    given = dict(words.rsplit("=", 1) for words in arguments.middle)
    middle, count = float(given.get(method, arguments.rate * METHODS[method].rate)), arguments.num_rates
    return [middle * 2.0 ** (place - (count - 1) // 2) for place in range(count)]


def beyond(method: str, figures: dict) -> float | None:
    """The rate to try next, where the best one so far has others on one side alone."""
    rates, best = list(losses_by_rate(method, figures)), best_rate(method, figures)
    return best / 2 if best == rates[0] else best * 2 if best == rates[-1] else None


def run_all(runs: list, arguments: argparse.Namespace, figures: dict) -> None:
    """Those of `runs` that have no figures yet, on as many processes as `--jobs`; figures are filled in."""
    writing = threading.Lock()

    def work(one: tuple) -> None:
        with RankGroup(1, Caller) as rank:
            (found,) = rank.call("run", run, arguments, *one)
        with writing:
            figures[quality_key(*one)] = found
            write_results(arguments.results, {"settings": settings_of(arguments), "runs": figures}, quiet=True)
        print(*one, found["held_out"], flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(work, (one for one in runs if quality_key(*one) not in figures)))


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


def main() -> None:
    """Tune, run the other seeds, print the table and write what came of it."""
    parser = parser_of(__doc__, "quality", with_data=True)
    add = parser.add_argument
    add("--held_out", help="examples to measure on; by default the last of --dataset")
    add("--held_out_rows", type=positive, default=256)
    about = f"of {', '.join(CHOICES)}"
    add("--methods", "--arms", nargs="+", choices=CHOICES, default=BASELINES.of, metavar="METHOD", help=about)
    add("--steps", type=positive, default=400)
    add("--rows", type=positive, default=8, help="of a step")
    add("--rate", type=float, default=4e-3, help="the middle of full training's learning rates")
    add("--middle", nargs="+", default=[], metavar="METHOD=RATE", help="the middle of a method's own rates")
    add("--num_rates", type=positive, default=3)
    add("--more_rates", type=int, default=2, help="that a method may try where its best is at an end")
    add("--seeds", type=positive, default=3)
    add("--seconds", type=float, help="train as long as that, in the place of --steps")
    add("--jobs", type=positive, default=1, help="processes at a time")
    add("--gpu", action="store_const", const=True, help="on the first GPU, in bf16")
    arguments = parser.parse_args()
    names = arguments.methods
    if not arguments.gpu:
        run_on_cpu()
    figures = read_figures(arguments)
    run_all([(name, lr, 0) for name in names for lr in window_of(name, arguments)], arguments, figures)
    for _ in range(arguments.more_rates):
        further = [(name, lr, 0) for name in names if (lr := beyond(name, figures)) is not None]
        run_all(further, arguments, figures)
    best = {name: best_rate(name, figures) for name in names}
    run_all([(name, best[name], seed) for name in names for seed in range(1, arguments.seeds)], arguments, figures)
    header = BASELINES.header + " | steps | s a step | GiB at the peak"
    cells = BASELINES.cells + " | {0[steps]:.0f} | {0[seconds]:.3f} | {0[peak]:gib}"
    table = replace(BASELINES, of=names, header=header, cells=cells)
    print_table(*table.make({"settings": settings_of(arguments), "runs": figures}))


if __name__ == "__main__":
    main()
