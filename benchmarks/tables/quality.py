"""The tables of quality.py, pareto.py and importance.py in README and benchmarks/REPORT.md."""

import re
import statistics
from collections.abc import Iterable

from benchmarks.tables import runs as of_results
from benchmarks.tables.parts import Rows, TableError, gib, loss, percent, rate, table

BASELINES = ("full", "lora r8", "lora r32", "lisa 1", "lisa 1 reshuffle", "lisa 1 adaptive", "lisa 2",
             "lisa 2 reshuffle", "lisa 2 adaptive", "fixed 2", "embed and head", "one block")  # fmt: skip


def method_name(arm: str) -> str:
    """An arm of quality.py as the pages call it."""
    if lisa := re.fullmatch(r"lisa (\d+),? ?(.*)", arm):
        return f"LISA, gamma {lisa[1]}, {lisa[2] or 'uniform'}"
    named = {
        "embed and head": "embeddings and head",
        "one block": "one block at a time",
        "full one pass": "full, one pass (`lisa_adamw`)",
        "lisa auto": "LISA, as many layers as the states of two in 32 bits take",
        "galore r16": "GaLore r16",
        "apollo r16": "APOLLO r16",
        "lisa modules": "LISA, modules in the place of layers",
        "lisa modules 8, embed frozen": "LISA, as many modules as 8 layers, embed frozen",
        "lisa modules 8 fixed, embed frozen": "LISA, as many modules as 8 layers, fixed, embed frozen",
        "lisa modules 14 fixed, embed frozen": "LISA, as many modules as 14 layers, fixed, embed frozen",
        "lisa in lora's memory": "LISA, as many layers as fit LoRA's peak and a tenth",
        "lisa in lora's, 32 bits": "LISA, as many as fit it with layers' moments in 32 bits",
        "lisa in lora's, embed frozen": "LISA, as many as fit it with embed frozen",
        "lisa at lora's peak, embed frozen": "LISA, as many as fit LoRA's own peak with embed frozen",
        "lisa in lora's, no masters": "LISA, as many layers as fit LoRA's peak and a tenth, in bf16",
    }
    return named.get(arm, arm).replace("lora", "LoRA").replace("fixed ", "fixed layers, gamma ")


LAYERS = {"stories260k-hf": 5, "model": 30}  # of the models by their folders, of which `model` is SmolLM2's


def layers_that_train(arm: str, figures: dict) -> str:
    """The decoder layers that an arm trains at a time, of those of its model, as "2 of 5"; of LoRA its adapters.

    Of a model that is not among `LAYERS` their number alone.
    """
    num_layers = LAYERS.get(figures["settings"].get("model"), "all")
    if arm.startswith("lora"):
        return "adapters"
    if arm.startswith(("full", "galore", "apollo")):
        return f"{num_layers} of {num_layers}" if num_layers != "all" else "all"
    if arm == "one block":
        return f"1 of {num_layers}, or none"
    named = re.search(r"(?:lisa|fixed|modules) (\d+)", arm)
    planned = [run["layers"] for run in of_results.runs_at_best(arm, figures["runs"]) if run.get("layers")]
    count = int(named[1]) if named else 0 if arm == "embed and head" else planned[0] if planned else 2
    said = f"{count} of {num_layers}"
    if "modules" in arm:
        return f"modules of {said}"
    return f"{said}: full training with small states" if count == num_layers and "embed frozen" not in arm else said


def runs_at_best(arm: str, runs: dict) -> list[dict]:
    """Every seed at the rate that is best on the first one."""
    if not (found := of_results.runs_at_best(arm, runs)):
        raise TableError(f"the results of quality.py have no run of {arm}")
    return found


def mean_loss(arm: str, runs: dict) -> float:
    return statistics.mean(run["held_out"] for run in runs_at_best(arm, runs))


def spread_of_seeds(losses: list[float]) -> str:
    return loss(statistics.stdev(losses)) if len(losses) > 1 else "one seed"


# Arms whose costs pareto.py measures: others of the table of experiments cost as much as one of these.
MEASURED = ("full", "full one pass", "lora r16", "lora r64", "galore r16", "apollo r16", "lisa 2", "lisa 2 one pass",
            "lisa 2, factored", "lisa 2, 8 bits", "lisa 2 bf16", "lisa 2, frozen 8 bits", "lisa 2, frozen 4 bits",
            "lisa auto", "lisa modules", "lisa in lora's memory", "lisa in lora's, embed frozen",
            "lisa at lora's peak, embed frozen", "lisa 14, embed frozen", "lisa 8", "lisa 8, embed frozen")  # fmt: skip


def pareto_table(figures: dict, quality: dict) -> Rows:
    """Arms of a task of pareto.py, the best first; `quality`: the figures of quality.py, which have their layers."""
    arms = sorted(figures["arms"].items(), key=lambda arm: arm[1]["loss"])
    rows = []
    for arm, one in arms:
        row = [method_name(arm), layers_that_train(arm, quality), loss(one["loss"]), spread_of_seeds(one["losses"])]
        rows.append([*row, f"{one['peak'] / 1e6:,.1f}", f"{one['seconds']:.3f}"])
    return [["method", "layers", "held-out loss", "spread of seeds", "MB at the peak", "CPU s a step"], *rows]


def importance_table(figures: dict) -> Rows:
    """Spearman's rank correlation of each measure of importance.py with the sets of layers that were trained."""
    losses: dict[tuple[int, ...], list[float]] = {}
    for key, value in figures["fixed"].items():
        layers = tuple(map(int, key.partition(", ")[0].split(",")))
        losses.setdefault(layers, []).append(value)
    paid = ranks([-statistics.mean(found) for found in losses.values()])
    rows = []
    for name, of_layers in figures["measures"].items():
        of_sets = ranks([statistics.mean(of_layers[layer] for layer in layers) for layers in losses])
        rows.append([name, f"{statistics.correlation(of_sets, paid):+.2f}"])
    return [["measure", f"rank correlation with {len(losses)} sets of layers"], *rows]


def ranks(values: list[float]) -> list[float]:
    """The rank of each value; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def quality_table(figures: dict, arms: Iterable[str]) -> Rows:
    """Arms of a results file of quality.py, each at its best rate, the best first.

    Steps have a column where they differ, right answers where every arm was asked, costs where a GPU measured them.
    """
    runs, settings = figures["runs"], figures["settings"]
    arms = sorted(arms, key=lambda arm: mean_loss(arm, runs))
    of_steps, of_costs = settings.get("seconds") is not None, bool(settings.get("gpu"))
    of_answers = all(any(run["solved"] is not None for run in runs_at_best(arm, runs)) for arm in arms)
    header = ["method", "layers", "best rate", "held-out loss", "spread of seeds", "next tokens right"]
    header += of_answers * ["answers right"] + of_steps * ["steps"] + of_costs * ["s a step", "GiB at the peak"]
    rows = []
    for arm in arms:
        found = runs_at_best(arm, runs)
        losses = [run["held_out"] for run in found]
        row = [method_name(arm), layers_that_train(arm, figures), rate(of_results.best_rate(arm, runs))]
        row += [loss(statistics.mean(losses))]
        row += [spread_of_seeds(losses)]
        row += [percent(statistics.mean(run["token_accuracy"] for run in found))]
        if of_answers:
            row += [of_results.solved_by(found)]
        if of_steps:
            row += [f"{statistics.mean(run['steps'] for run in found):.0f}"]
        if of_costs:
            row += [f"{statistics.median(run['seconds_per_step'] for run in found):.3f}"]
            row += [gib(max(run["peak_bytes"] for run in found))]
        rows.append(row)
    return [header, *rows]


IN_TIME = (
    "full",
    "lora r16",
    "lisa in lora's memory",
    "lisa in lora's, 32 bits",
    "lisa in lora's, embed frozen",
    "lisa 3 depth 8, factored",
    "lisa 14, factored",
    "lisa 14, embed frozen",
    "lisa 14 window, embed frozen",
    "lisa 14 middle, embed frozen",
    "lisa 14 fixed, embed frozen",
    "lisa 8, embed frozen",
    "lisa modules 8, embed frozen",
    "lisa modules 8 fixed, embed frozen",
    "lisa modules 14 fixed, embed frozen",
)
MODELS = ("stories260K", "SmolLM2")
TASKS = (
    "stories260K, GSM8K",
    "SmolLM2, GSM8K",
    "SmolLM2, GSM8K, another day",
    "SmolLM2, GSM8K, a third day",
    "SmolLM2, Alpaca",
    "SmolLM2, Alpaca, another day",
    "SmolLM2, Alpaca, a third day",
)


@table(
    "comparing_time",
    "time",
    "time_smollm2",
    "time_smollm2_fixed",
    "time_smollm2_modules",
    "time_smollm2_alpaca",
    "time_smollm2_alpaca_middle",
    "time_smollm2_alpaca_modules",
)
def methods_in_equal_time(*tasks: dict) -> Rows:
    """Mean held-out loss and steps of each method after as many seconds, of every task."""
    rows = []
    for arm in IN_TIME:
        row = [method_name(arm)]
        for figures in tasks:
            cells = ["-", "-"]
            if found := of_results.runs_at_best(arm, figures["runs"]):
                cells = [_mean_and_spread([run["held_out"] for run in found], layers_that_train(arm, figures))]
                cells += [f"{statistics.mean(run['steps'] for run in found):.0f}"]
            row += cells
        if set(row[1:]) != {"-"}:
            rows.append(row)
    header = ["held-out loss"]
    for name, figures in zip(TASKS, tasks, strict=True):
        header += [f"{name}, {figures['settings']['seconds']:.0f} CPU s", "steps"]
    return [header, *rows]


@table("comparing_pareto_stories", "pareto", "quality")
def costs_on_stories(figures: dict, quality: dict) -> Rows:
    return pareto_table(figures["tasks"]["stories260K on GSM8K"], quality)


@table("comparing_pareto_smollm2", "pareto", "quality_smollm2")
def costs_on_smollm2(figures: dict, quality: dict) -> Rows:
    return pareto_table(figures["tasks"]["SmolLM2-135M on GSM8K"], quality)


@table("comparing_pareto_alpaca", "pareto", "quality_smollm2_alpaca")
def costs_on_alpaca(figures: dict, quality: dict) -> Rows:
    return pareto_table(figures["tasks"]["SmolLM2-135M on Alpaca"], quality)


@table("comparing_importance", "importance", "importance_smollm2")
def measures_of_layers(*models: dict) -> Rows:
    """In the order of the page."""
    header, found = ["measure"], {}
    for name, figures in zip(MODELS, models, strict=True):
        (_, of_sets), *rows = importance_table(figures)
        header.append(f"{name}: {of_sets}")
        for measure, correlation in rows:
            found.setdefault(measure, []).append(correlation)
    names = {
        "probe 5": "probe of 5 steps (`--lisa_probe_steps 5`)",
        "probe 10": "probe of 10 steps",
        "probe 20": "probe of 20 steps",
        "update": "norm of the update (`--lisa_importance update`)",
        "gradient": "norm of the gradient (`--lisa_importance gradient`)",
        "depth": "depth",
    }
    return [header, *([name, *found[key]] for key, name in names.items())]


@table("headline_quality", "quality", "quality_alpaca", "quality_smollm2", "quality_smollm2_alpaca")
def methods_on_every_task(*tasks: dict) -> Rows:
    """Mean held-out loss over the seeds, at the best rate of each."""
    arms = {
        "full": "full training",
        "lora r16": "LoRA, rank 16",
        "lisa 2 as published": "LISA as in the paper (`--lisa_preset paper`)",
        "lisa 2 one pass": "LISA, two layers at a time",
        "lisa in lora's memory": "LISA, as many layers as fit the memory of LoRA's step and a tenth",
    }
    rows = []
    for arm, name in arms.items():
        found = [[run["held_out"] for run in runs_at_best(arm, figures["runs"])] for figures in tasks]
        layers = [layers_that_train(arm, figures) for figures in tasks]
        rows.append([name, *map(_mean_and_spread, found, layers)])
    models = [f"{model}: {task}" for model in ("Llama of 260K", "SmolLM2-135M") for task in ("GSM8K", "Alpaca")]
    return [["held-out loss, mean and spread of three seeds; layers that train", *models], *rows]


def _mean_and_spread(losses: list[float], layers: str) -> str:
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ", one seed"
    return f"{loss(statistics.mean(losses), 3)}{spread}; {layers}"
