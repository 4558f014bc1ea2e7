"""Does a measure of layers find those that pay? Runs that train a fixed set of layers, ranked by loss, against it.

python -m benchmarks.quality.importance --model stories260k-hf --dataset gsm8k/train.jsonl --held_out gsm8k/test.jsonl

A set is every pair of layers, or with --sets stretches the layers that a probe tries. Each set trains alone, besides
embed, head and norms, for all steps, once for each seed, which is an order of the rows. The measures, each of the
first seed's first rows: the loss that a probe of --lisa_probe_steps 5, 10 and 20 leaves behind, the norms of gradients
and of updates over 10 steps of all layers, as the adaptive sampler has them, and depth. A set's is the mean of its
layers'. Printed is Spearman's rank correlation with the sets' losses, means over seeds, their signs turned.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lisa_dist
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_with_data, positive, print_table, write_results
from benchmarks.quality.examples import Data, evaluate
from benchmarks.quality.quality import PROBE_ROWS, WARMUP, probe
from benchmarks.quality.training import Batch, train
from benchmarks.tables.quality import importance_table
from lisa_dist.core.blocks import number_of_decoder_layers
from lisa_dist.core.probe import stretches

PROBES, MEASURED = (5, 10, 20), 10  # steps
SETTINGS = ("model", "dataset", "held_out", "steps", "rows", "held_out_rows", "rate", "sets")


def build(arguments: argparse.Namespace, **settings):
    """An engine and its controller."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = lisa_dist.LisaConfig(**settings)
    options = {"lr": arguments.rate, "micro_batch_size": arguments.rows, "optim": "lisa_adamw"}
    return lisa_dist.initialize(model, "zero2", config, **options)


def batches_of(arguments: argparse.Namespace, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Those of a run, and others that it does not see."""
    needed = arguments.steps * arguments.rows
    data = Data.read(arguments.model, arguments.dataset, needed + PROBE_ROWS)
    order = random.Random(seed).sample(range(len(data.rows)), len(data.rows))
    cut = [order[start : start + arguments.rows] for start in range(0, len(order), arguments.rows)]
    batches = list(map(data.batch, cut))
    return batches[: arguments.steps], batches[arguments.steps :]


def train_set(arguments: argparse.Namespace, layers: tuple[int, ...], seed: int) -> float:
    """On a rank: the held-out loss after all steps with these layers."""
    num_layers = number_of_layers(arguments)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as weights:
        json.dump([int(layer in layers) for layer in range(num_layers)], weights)
        weights.flush()
        named = {"lisa_sampler": "weighted", "lisa_weights_file": weights.name, "lisa_activated_layers": len(layers)}
        engine, lisa = build(arguments, **named)
    assert lisa.active_layers == layers
    batches, _ = batches_of(arguments, seed)
    steps = arguments.steps
    rates = [arguments.rate * min(1.0, (step + 1) / WARMUP, 1 - step / steps) for step in range(steps)]
    train(engine, lisa, batches, rates)
    lisa.close()
    found, _ = evaluate(engine, Data.read(arguments.model, arguments.held_out, arguments.held_out_rows), arguments.rows)
    engine.destroy()
    return found


def measure(arguments: argparse.Namespace, name: str) -> list[float]:
    """On a rank: a measure of every layer; the higher, the more it should pay."""
    num_layers = number_of_layers(arguments)
    batches, others = batches_of(arguments, seed=0)
    kind, _, steps = name.partition(" ")
    if kind == "depth":
        return [float(layer) for layer in range(num_layers)]
    if kind == "probe":
        engine, lisa = build(arguments, lisa_sampler="balanced", lisa_probe_steps=int(steps))
        losses = probe(engine, lisa, batches, others, arguments.rate)
        cut = stretches(num_layers, lisa.config.lisa_activated_layers)
        found = [-loss for stretch, loss in zip(cut, losses, strict=True) for _ in stretch.layers]
    else:
        named = {"lisa_importance": kind, "lisa_activated_layers": num_layers, "lisa_interval_steps": MEASURED}
        engine, lisa = build(arguments, lisa_sampler="adaptive", **named)
        train(engine, lisa, batches[: MEASURED + 1])
        found = lisa.selection.importance.averages
    lisa.close()
    engine.destroy()
    return found


def number_of_layers(arguments: argparse.Namespace) -> int:
    return number_of_decoder_layers(AutoConfig.from_pretrained(arguments.model))


def main() -> None:
    """Train every set, take every measure, print correlations and write what came of it."""
    run_on_cpu()
    parser = parser_with_data(__doc__, "importance")
    parser.add_argument("--held_out", required=True, help="examples to measure on")
    parser.add_argument("--held_out_rows", type=positive, default=256)
    parser.add_argument("--sets", choices=("pairs", "stretches"), default="pairs")
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--rows", type=positive, default=8, help="of a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seeds", type=positive, default=2)
    parser.add_argument("--jobs", type=positive, default=1, help="processes at a time")
    arguments = parser.parse_args()
    num_layers = number_of_layers(arguments)
    sets = list(itertools.combinations(range(num_layers), 2))
    if arguments.sets == "stretches":
        sets = [tuple(stretch.tried) for stretch in stretches(num_layers, num_active=2)]
    figures: dict = {"settings": {name: Path(str(getattr(arguments, name))).name for name in SETTINGS}}
    if arguments.results.is_file():  # what is there already is not run again
        held = json.loads(arguments.results.read_text(encoding="utf-8"))["figures"]
        if other := [name for name in SETTINGS if held["settings"].get(name) != figures["settings"][name]]:
            sys.exit(f"{arguments.results} was made with other {', '.join(other)}: give other --results.")
        figures = held
    measures = [*(f"probe {steps}" for steps in PROBES), "gradient", "update", "depth"]
    work = [("measures", name, (measure, arguments, name)) for name in measures]
    for seed, layers in itertools.product(range(arguments.seeds), sets):
        work.append(("fixed", f"{','.join(map(str, layers))}, seed {seed}", (train_set, arguments, layers, seed)))
    work = [one for one in work if one[1] not in figures.setdefault(one[0], {})]
    writing = threading.Lock()

    def do(mine: list) -> None:
        with RankGroup(1, Caller) as rank:
            for kind, name, call in mine:
                (found,) = rank.call("run", *call)
                with writing:
                    figures[kind][name] = found
                    write_results(arguments.results, figures, quiet=True)
                print(name, found, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(do, filter(None, (work[job :: arguments.jobs] for job in range(arguments.jobs)))))
    header, *rows = importance_table(figures)
    print_table(header, rows)


if __name__ == "__main__":
    main()
