"""Which default preset follows from the runs of the grid? Scores, memory by plan and time, as RULE.md defines them.

python -m benchmarks.quality.decide

Reads results/grid_TASK.json of the four tasks of the rule. Scores need full training, which tells how much can be
gained: a task without it does not count yet. A method that lacks another task has no score.
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any

from benchmarks.common.results import RESULTS, parser_of, write_results
from benchmarks.quality.grid import Parts
from benchmarks.tables.outcomes import best_rung, losses_on_test_rows, paired_difference, read_runs
from benchmarks.tables.render import print_table
from lisa_dist import LisaConfig
from lisa_dist.memory.plan import PlanArguments, load_model_config
from lisa_dist.memory.planner import Planner
from lisa_dist.memory.trace import FakeRuns
from lisa_dist.memory.workload import CHUNKED
from lisa_dist.presets import reserved_bytes

TASKS = ("stories_gsm8k", "stories_alpaca", "smollm2_gsm8k", "smollm2_alpaca")
MODEL, TOKENS, CARD = "llama3.1-8b", 2048, 24 << 30
BASELINE, SLOWEST, CLOSE = "lora 16", 1.5, 0.01  # of the rule: time is relative to the baseline's

Runs = dict[str, Any]


def mechanisms(parts: Parts) -> int:
    """Count the parts: adapters, trained embedding and head, sampled layers, quantized frozen layers."""
    trains_layers = parts.layers in ("sampled", "fixed")
    return sum((parts.rank is not None, parts.ends is not None, trains_layers, parts.frozen_bits < 16))


def regrets(task: Runs) -> dict[str, float]:
    """Return how far each method is behind the best one, relative to what the best one has gained by training.

    Returns nothing if full training, which measures the loss of the untrained model, has not been run.
    """
    untrained = next((run["untrained"] for run in task.values() if "untrained" in run), None)
    methods = dict.fromkeys(key.split("; ")[0] for key in task)
    losses = {method: statistics.mean(losses_on_test_rows(method, task).values()) for method in methods}
    if untrained is None or not losses:
        return {}
    best = min(losses.values())
    return {method: (loss - best) / (untrained - best) for method, loss in losses.items()}


def scores(tasks: dict[str, Runs]) -> dict[str, float]:
    """Return the mean regret over the tasks of every method that all tasks have. Lower is better.

    Runs with quantized frozen layers exist in bf16 only; elsewhere the losses without quantization count.
    """
    by_task = [found for task in tasks.values() if (found := regrets(task))]
    names = dict.fromkeys(name for found in by_task for name in found)
    found = {}
    for name in names:
        plain = name.removesuffix(", frozen 8")
        values = [regret.get(name, regret.get(plain)) for regret in by_task]
        if values and None not in values:
            found[name] = statistics.mean(value for value in values if value is not None)
    return found


def relative_times(task: Runs) -> dict[str, float]:
    """Return the CPU seconds of a step relative to the baseline's: medians over the runs of each method."""
    seconds: dict[str, list[float]] = {}
    for key, run in task.items():
        if "seconds_per_step" in run:  # runs that were restored from a log have losses alone
            seconds.setdefault(key.split("; ")[0], []).append(run["seconds_per_step"])
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    return {method: value / medians[BASELINE] for method, value in medians.items()} if BASELINE in medians else {}


class Memory:
    """Peaks of a step by plan, in bytes of one GPU."""

    def __init__(self) -> None:
        self._model_config = load_model_config(MODEL)
        self._runs = FakeRuns(self._model_config)

    def peak(self, name: str) -> int:
        """Return the peak of a method with the activations of every decoder layer recomputed."""
        parts = Parts.parse(name)
        arguments = PlanArguments(MODEL, seq_length=TOKENS, checkpointed_layers="all", reserve="0")
        config = LisaConfig.plain()
        if parts.layers == "full":
            arguments = replace(arguments, method="full", optim="adamw_torch_fused")
        elif parts.layers == "lora" and parts.ends is None:
            arguments = replace(arguments, method="lora", lora_r=parts.rank or 0, optim="adamw_torch_fused")
        else:
            settings = parts.settings(self._model_config.num_hidden_layers, seed=0)
            config = LisaConfig(**settings | {"lisa_master": "bf16_sr"})
            arguments = replace(arguments, optim="lisa_adamw")
        return Planner(self._model_config, arguments, config, runs=self._runs).peak("zero2", CHUNKED)


def decide(methods: dict[str, dict[str, Any]]) -> str | None:
    """Return the default that rule 1 chooses, or None if no method is eligible."""
    fits = CARD - reserved_bytes(CARD)
    eligible = {
        name: one
        for name, one in methods.items()
        if one["score"] is not None and one["peak"] <= fits and (one["time"] or 0) <= SLOWEST
    }
    if not eligible:
        return None
    best = min(one["score"] for one in eligible.values())
    close = {name: one for name, one in eligible.items() if one["score"] <= best + CLOSE}
    return min(close, key=lambda name: (close[name]["mechanisms"], close[name]["score"]))


def measure(tasks: dict[str, Runs], compared_with: str) -> dict[str, Any]:
    """Return everything that the rule needs to know of every method."""
    memory, scored, times = Memory(), scores(tasks), relative_times(tasks["smollm2_gsm8k"])
    methods = {}
    for name in dict.fromkeys(key.split("; ")[0] for task in tasks.values() for key in task):
        outcomes = {}
        for task, runs in tasks.items():
            if losses := losses_on_test_rows(name, runs):
                other = losses_on_test_rows(compared_with, runs)
                difference = paired_difference(name, compared_with, runs) if losses.keys() & other.keys() else None
                outcomes[task] = {
                    "rung": best_rung(name, runs),
                    "losses": [loss for _, loss in sorted(losses.items())],
                    "difference": difference,
                }
        methods[name] = {
            "score": scored.get(name),
            "peak": memory.peak(name),
            "time": times.get(name),
            "mechanisms": mechanisms(Parts.parse(name)),
            "tasks": outcomes,
        }
    scored_on = [task for task, runs in tasks.items() if regrets(runs)]
    return {"compared_with": compared_with, "scored_on": scored_on, "methods": methods, "default": decide(methods)}


def main() -> None:
    """Write the figures and print the methods, the best first."""
    parser: argparse.ArgumentParser = parser_of(__doc__, "decision")
    parser.add_argument("--compared-with", default="lora 16, ends", help="baseline of the paired differences")
    arguments = parser.parse_args()
    figures = measure({task: read_runs(RESULTS / f"grid_{task}.json") for task in TASKS}, arguments.compared_with)
    write_results(arguments.results, figures)
    rows = [["method", "score", "GiB", "time", *TASKS]]
    order = sorted(figures["methods"].items(), key=lambda item: (item[1]["score"] is None, item[1]["score"] or 0))
    for name, one in order:
        cells = [
            f"{statistics.mean(one['tasks'][task]['losses']):.4f}" if task in one["tasks"] else "-" for task in TASKS
        ]
        numbers = ("-" if one[key] is None else f"{one[key]:.3f}" for key in ("score", "time"))
        score, seconds = numbers
        rows.append([name, score, f"{one['peak'] / 2**30:.2f}", seconds, *cells])
    print_table(*rows)
    print(f"scored on {', '.join(figures['scored_on']) or 'no task yet'}; default: {figures['default']}")


if __name__ == "__main__":
    main()
