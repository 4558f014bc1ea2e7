"""What does each part of a method contribute? Test losses of layers, adapters, embedding and head in every combination.

python -m benchmarks.quality.grid --task stories_gsm8k --jobs 2
python -m benchmarks.quality.grid --task smollm2_gsm8k --methods "lora 16" "lora 16, ends" "sampled 1/6, ends"
python -m benchmarks.quality.grid --task stories_gsm8k --steps 1600 --seeds 1 --rungs -1 0

RULE.md has the protocol. A method is a list of parts, separated by commas:

    full              plain full training with 32-bit states
    none, all         no decoder layer trains, or every one
    lora R            LoRA adapters of rank R on all decoder layers (peft's own if nothing else trains)
    sampled F         LISA with the fraction F of the decoder layers in each period
    fixed F           the same with one set of layers for the whole run
    adapters R        LoRA adapters in addition to sampled layers
    ends, ends 1/N    embedding and head train too, at 1/N of the learning rate of everything else
    K N               N steps per period instead of 20
    keep, reset_all   the treatment of optimizer states at a switch
    warmup N          after each switch the learning rate rises over N steps
    frozen 8          frozen decoder layers have 8 bits (in a task in bf16)

Rates are chosen by the validation loss of the first seed. Runs that the results file has are not repeated.
"""

import argparse
import gc
import itertools
import os
import random
import statistics
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lisa_dist
from benchmarks.common.methods import lora
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import RESULTS, positive, write_results
from benchmarks.common.runs import adapted, plain_engine
from benchmarks.quality.training import LENGTH, Data, evaluate, train
from benchmarks.tables.outcomes import (
    FIRST_RATE,
    best_rung,
    key_of,
    losses_by_rung,
    losses_on_test_rows,
    paired_difference,
    read_runs,
)

WARMUP_STEPS = 10  # steps over which the learning rate rises


@dataclass(frozen=True)
class Task:
    """A model, its data, and the length of a run. Paths are relative to the folder with the data."""

    model: str
    train_file: str  # of questions and answers, a text, or STANDARD_LIBRARY
    test_file: str | None = None  # None: the last rows of train_file
    steps: int = 400
    rows: int = 8  # examples of a step
    bf16: bool = False


STORIES, SMOLLM2 = "models/stories260k-hf", ".quickstart/model"
STANDARD_LIBRARY = "the source code of Python's standard library"
DATASETS: dict[str, tuple[str, str | None]] = {
    "gsm8k": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
    "alpaca": ("alpaca/mix_train.json", None),
    "wiki": ("text/wiki_demo.txt", None),
    "code": (STANDARD_LIBRARY, None),
}
TASKS = {
    f"{name}_{data}": Task(model, *files, **settings)
    for name, model, settings in (
        ("stories", STORIES, {}),
        ("smollm2", SMOLLM2, {"steps": 200, "rows": 1, "bf16": True}),
    )
    for data, files in DATASETS.items()
}
VALIDATION_ROWS, TEST_ROWS = 96, 192
CHARACTERS = 1_000_000  # of the source code that is read

LAYERS = (
    *("none", "lora 16", "lora 64", "lora 128", "sampled 1/6", "sampled 1/3", "sampled 1/2"),
    *("fixed 1/6", "fixed 1/3", "all"),
)
ENDS = ("ends", "ends 1/4", "ends 1/10", "ends 1/20")
BESIDE = ("sampled 1/15, adapters 32, ends", "sampled 1/6, adapters 32, ends", "lora 32, ends")
GRID = ("full", *LAYERS[1:], *(f"{layers}, {ends}" for layers in LAYERS for ends in ENDS), *BESIDE)

# The rung where the ladder of a method begins, by the model and the kind of its layers.
FIRST_RUNG = {
    STORIES: {"full": 2, "all": 2, "lora": 3, "none": 4, "sampled": 2, "fixed": 2, "adapters": 3},
    SMOLLM2: {"full": -4, "all": -4, "lora": 0, "none": 0, "sampled": -2, "fixed": -2, "adapters": 0},
}


@dataclass(frozen=True)
class Parts:
    """The parts of a method's name."""

    layers: str  # full | none | all | lora | sampled | fixed
    share: Fraction | None = None  # of the decoder layers
    rank: int | None = None  # of adapters
    ends: Fraction | None = None  # rate of embedding and head relative to everything else; None: frozen
    interval: int = 20
    state: str = "reset"
    warmup: int = 0  # steps after a switch
    frozen_bits: int = 16

    @classmethod
    def parse(cls, name: str) -> "Parts":
        """Parse a method's name. Raises ValueError for unknown parts and for methods in which nothing trains."""
        first, *more = (part.split() for part in name.split(","))
        found: dict[str, Any] = {"layers": first[0]}
        match first:
            case ["full"] | ["none"] | ["all"]:
                pass
            case ["lora", rank]:
                found["rank"] = int(rank)
            case ["sampled" | "fixed", share]:
                found["share"] = Fraction(share)
            case _:
                raise ValueError(f"unknown method {name!r}: it begins with full, none, all, lora, sampled or fixed")
        for part in more:
            match part:
                case ["adapters", rank]:
                    found["rank"] = int(rank)
                case ["ends"]:
                    found["ends"] = Fraction(1)
                case ["ends", scale]:
                    found["ends"] = Fraction(scale)
                case ["K", interval]:
                    found["interval"] = int(interval)
                case ["keep"] | ["reset_all"]:
                    found["state"] = part[0]
                case ["warmup", steps]:
                    found["warmup"] = int(steps)
                case ["frozen", "8"]:
                    found["frozen_bits"] = 8
                case _:
                    raise ValueError(f"unknown part {' '.join(part)!r} in method {name!r}")
        parts = cls(**found)
        if parts.layers == "none" and parts.ends is None and parts.rank is None:
            raise ValueError(f"nothing trains in method {name!r}")
        return parts

    def number_of_layers(self, num_layers: int) -> int:
        """Return how many decoder layers train at a time; halves are rounded up, and a share is at least one layer."""
        if self.share is not None:
            return max(1, int(self.share * num_layers + Fraction(1, 2)))
        return num_layers if self.layers in ("all", "full") else 0

    def rates(self, lr: float, steps: int) -> list[float]:
        """Return the learning rate of each step: a linear decay with a warm-up, and one after each switch if asked."""
        return [
            lr
            * min(1.0, (step + 1) / WARMUP_STEPS, 1 - step / steps)
            * min(1.0, (step % self.interval + 1) / (self.warmup + 1))
            for step in range(steps)
        ]

    def settings(self, num_layers: int, seed: int) -> dict[str, Any]:
        """Return the settings of LisaConfig. Embedding and head have factored moments, layers have 8-bit moments."""
        scale = f"{float(self.ends or 1):g}"
        settings: dict[str, Any] = {
            "lisa_activated_layers": self.number_of_layers(num_layers),
            "lisa_interval_steps": self.interval,
            "lisa_state": self.state,
            "lisa_sampler": "fixed" if self.layers in ("fixed", "all", "none", "lora") else "uniform",
            "lisa_seed": seed,
            "lisa_frozen_bits": self.frozen_bits,
        }
        bits = ["layers=8"] if settings["lisa_activated_layers"] else []
        if self.ends is None:
            settings |= {"lisa_always_on": "", "lisa_frozen": "embed,head,rest"}
        else:
            bits += ["embed=factored", "head=factored"]
            settings["lisa_lr_scale"] = f"embed={scale},head={scale}"
        if self.rank is not None:
            settings["lisa_adapters"] = self.rank
            # Adapters set the rate. Sampled layers train at the sixteenth of it that earlier runs found best.
            layers = ",layers=0.0625" if settings["lisa_activated_layers"] else ""
            ends = f"embed={scale},head={scale}," if self.ends is not None else ""
            settings["lisa_lr_scale"] = f"{ends}adapters=1{layers}"
        return settings | ({"lisa_state_bits": ",".join(bits)} if bits else {})


def build(task: Task, model_path: str, name: str, lr: float, seed: int) -> tuple[Any, Any]:
    """Return the engine of a method, and its LISA controller or None."""
    parts, dtype = Parts.parse(name), torch.bfloat16 if task.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    torch.manual_seed(seed)
    ds_config = lisa_dist.load_ds_config("zero2", model=model, micro_batch_size=task.rows)
    ds_config["bf16"] = {"enabled": task.bf16}
    if parts.layers == "full" or (parts.layers == "lora" and parts.ends is None):
        model = model if parts.layers == "full" else adapted(model, lora(parts.rank or 0))
        return plain_engine(model, ds_config, optim="adamw_torch", lr=lr, weight_decay=0.0, rows=task.rows), None
    config = lisa_dist.LisaConfig(**parts.settings(model.config.num_hidden_layers, seed))
    return lisa_dist.initialize(model, ds_config, config, lr=lr, micro_batch_size=task.rows, optim="lisa_adamw")


def source_code() -> str:
    """Return modules of Python's standard library one after another, in a fixed random order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in random.Random(0).sample(files, len(files)))
    return text[:CHARACTERS]


def blocks(model_path: str, text: str) -> Data:
    """Return the blocks of LENGTH tokens that a text consists of, in its order. Every token is predicted."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Data(tokenizer, [(tokens[at : at + LENGTH], 0) for at in range(0, len(tokens) - LENGTH + 1, LENGTH)])


def read_data(task: Task, data_folder: str, model_path: str) -> tuple[Data, Data, Data]:
    """Return training, validation and test rows, which have no row in common.

    Raises ValueError if the file has too few rows.
    """
    if task.train_file == STANDARD_LIBRARY:
        everything = blocks(model_path, source_code())
    elif task.train_file.endswith(".txt"):
        everything = blocks(model_path, Path(data_folder, task.train_file).read_text(encoding="utf-8"))
    else:
        everything = Data.read(model_path, os.path.join(data_folder, task.train_file), 10**9)
    rows = list(dict.fromkeys((tuple(tokens), asked) for tokens, asked in everything.rows))
    if task.test_file is None:
        rows, test = rows[:-TEST_ROWS], rows[-TEST_ROWS:]
    else:
        tested = Data.read(model_path, os.path.join(data_folder, task.test_file), TEST_ROWS)
        test = [(tuple(tokens), asked) for tokens, asked in tested.rows]
        rows = [row for row in rows if row not in set(test)]
    training, validation = rows[:-VALIDATION_ROWS], rows[-VALIDATION_ROWS:]
    if len(training) < VALIDATION_ROWS or len(test) < TEST_ROWS:
        raise ValueError(f"{task.train_file}: too few rows for {VALIDATION_ROWS} validation and {TEST_ROWS} test rows")
    first, second, third = (
        Data(everything.tokenizer, [(list(tokens), asked) for tokens, asked in part])
        for part in (training, validation, test)
    )
    return first, second, third


def run(task: Task, data_folder: str, model_path: str, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one method on a rank; return its losses on validation and test rows and its CPU seconds per step."""
    training, validation, test = read_data(task, data_folder, model_path)
    order = random.Random(seed).sample(range(len(training.rows)), len(training.rows))
    endless = itertools.cycle(order)
    batches = (training.batch(list(itertools.islice(endless, task.rows))) for _ in range(task.steps))
    gc.collect()
    engine, lisa = build(task, model_path, method, lr, seed)
    untrained = evaluate(engine, test, task.rows)[0] if method == "full" and seed == 0 else None
    engine.train()
    started = time.process_time()
    train(engine, lisa, batches, Parts.parse(method).rates(lr, task.steps))
    seconds = (time.process_time() - started) / task.steps
    if lisa is not None:
        lisa.close()
    validation_loss, _ = evaluate(engine, validation, task.rows)
    test_loss, accuracy = evaluate(engine, test, task.rows)
    engine.destroy()
    found = {"validation": validation_loss, "test": test_loss, "test_accuracy": accuracy, "seconds_per_step": seconds}
    found["layers"] = None if lisa is None else lisa.config.lisa_activated_layers
    return found | ({} if untrained is None else {"untrained": untrained})


def next_rungs(method: str, runs: dict[str, Any], first: int) -> list[int]:
    """Return the rungs to try next: none once the best rung has a worse neighbor on each side."""
    losses, best = losses_by_rung(method, runs), best_rung(method, runs)
    return [first] if best is None else [rung for rung in (best - 1, best + 1) if rung not in losses]


def first_rung(task: Task, method: str, runs: dict[str, Any]) -> int:
    """Return where the ladder of a method begins: at the highest best rung of the same layers with another scale.

    The lower the rate of embedding and head, the higher the best rate of everything else.
    """
    same = [name for name in dict.fromkeys(key.split("; ")[0] for key in runs) if name != method]
    known = [best_rung(name, runs) for name in same if name.split(", ends")[0] == method.split(", ends")[0]]
    if ", ends" in method and known:
        return max(rung for rung in known if rung is not None)
    parts = Parts.parse(method)
    kind = "adapters" if parts.rank is not None and parts.layers != "lora" else parts.layers
    return FIRST_RUNG[task.model][kind]


def lengths(task: str) -> list[int]:
    """Return the numbers of steps, other than the task's own, for which there are results."""
    files = RESULTS.glob(f"grid_{task}_*.json")
    return [int(steps) for file in files if (steps := file.stem.removeprefix(f"grid_{task}_")).isdigit()]


class Grid:
    """The runs of one task with one number of steps, and their results file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.task, self.arguments = TASKS[arguments.task], arguments
        name, own_steps = f"grid_{arguments.task}", self.task.steps
        self.known: list[dict[str, Any]] = []  # runs of shorter lengths, whose best rates are where ladders begin
        if arguments.steps not in (None, own_steps):
            self.task = replace(self.task, steps=arguments.steps)
            self.known = [read_runs(RESULTS / f"{name}.json")]
            shorter = sorted(steps for steps in lengths(arguments.task) if own_steps < steps < arguments.steps)
            self.known += [read_runs(RESULTS / f"{name}_{steps}.json") for steps in shorter]
            name = f"{name}_{arguments.steps}"
        is_own = self.task.model == SMOLLM2
        self.model_path = self.task.model if is_own else os.path.join(arguments.data, self.task.model)
        self.results: Path = arguments.results or RESULTS / f"{name}.json"
        self.runs = read_runs(self.results)
        self._writing = threading.Lock()

    def tune(self, method: str) -> None:
        """Run a method at one rate after another until the best one is inside, then with the other seeds."""
        known = [best for runs in self.known if (best := best_rung(method, runs)) is not None]
        first = known[-1] if known else first_rung(self.task, method, self.runs)
        if self.arguments.rungs is not None:
            for offset in self.arguments.rungs:
                self._run(method, first + offset, 0)
        else:
            while rungs := next_rungs(method, self.runs, first):
                for rung in rungs:
                    self._run(method, rung, 0)
        best = best_rung(method, self.runs)
        assert best is not None
        for seed in range(1, self.arguments.seeds):
            self._run(method, best, seed)

    def _run(self, method: str, rung: int, seed: int) -> None:
        key = key_of(method, rung, seed)
        if key in self.runs:
            return
        with RankGroup(1, Caller) as rank:
            lr = FIRST_RATE * 2.0**rung
            (found,) = rank.call("run", run, self.task, self.arguments.data, self.model_path, method, lr, seed)
        with self._writing:
            self.runs[key] = found
            settings = {"task": self.arguments.task, "steps": self.task.steps, "rows": self.task.rows}
            write_results(self.results, {"settings": settings, "runs": dict(sorted(self.runs.items()))}, quiet=True)
        print(f"{key}: validation {found['validation']:.4f}, test {found['test']:.4f}", flush=True)


def describe(method: str, baseline: str, runs: dict[str, Any]) -> str:
    """Return a line with the test loss of a method and its paired difference to a baseline."""
    losses = losses_on_test_rows(method, runs)
    best = best_rung(method, runs)
    if best is None:
        return f"{method:32} not run"
    rate, mean = FIRST_RATE * 2.0**best, statistics.mean(losses.values())
    text = f"{method:32} rate {rate:.2g}  test {mean:.4f} ({len(losses)} seeds)"
    if method != baseline and losses_on_test_rows(baseline, runs):
        difference, error = paired_difference(method, baseline, runs)
        text += f"  {difference:+.4f}" + ("" if error is None else f" +- {error:.4f}")
    return text


def main() -> None:
    """Run what is missing and print the test losses, the best first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, required=True)
    add("--methods", nargs="+", default=GRID, metavar="METHOD", help="methods to run; by default the whole grid")
    add("--baseline", default="lora 16, ends", help="method that the others are compared with")
    add("--data", default=os.environ.get("LISA_DIST_DATA", "../shared/data"), help="folder with models and datasets")
    add("--steps", type=positive, help="optimizer steps instead of the task's own; writes results/grid_TASK_STEPS.json")
    rungs_help = "try only these rungs, counted from the best rate of the next shorter length, instead of tuning"
    add("--rungs", type=int, nargs="+", metavar="OFFSET", help=rungs_help)
    add("--seeds", type=positive, default=3, help="seeds at the best rate")
    add("--jobs", type=positive, default=1, help="methods that run at the same time")
    add("--results", type=Path, help="results file; by default results/grid_TASK.json")
    arguments = parser.parse_args()
    try:
        for name in arguments.methods:
            Parts.parse(name)
    except ValueError as error:
        parser.error(str(error))
    run_on_cpu()
    grid = Grid(arguments)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(grid.tune, arguments.methods))
    ran = [name for name in arguments.methods if losses_on_test_rows(name, grid.runs)]
    for name in sorted(ran, key=lambda name: statistics.mean(losses_on_test_rows(name, grid.runs).values())):
        print(describe(name, arguments.baseline, grid.runs))


if __name__ == "__main__":
    main()
