"""Write the tables of README and docs from benchmarks/results, so that no figure in them is typed by hand.

python benchmarks/tables.py            # writes what has changed
python benchmarks/tables.py --check    # writes nothing; exit status 1 where a page and the results differ

A table stands on its page between `<!-- table: NAME -->` and `<!-- end -->`, and NAME is that of a function below. The
table `index` in benchmarks/README.md has a row for every results file, and for every script that has none.
"""

import argparse
import ast
import json
import re
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import choosing
import quality

ROOT = Path(__file__).parents[1]
END = "<!-- end -->"
SHARED = ("arms", "bench", "rank_group", "recipes", "tables")  # modules that measure nothing
Rows = list[list[str]]  # the first is the header
TABLES: dict[str, Callable[["Benchmarks"], Rows]] = {}
LATEST: dict[str, Callable[[dict], str]] = {}


class TableError(ValueError):
    """A page, or results, of which no table can be made; the message says which and why."""


@dataclass(frozen=True)
class Benchmarks:
    """A folder of scripts, and their results."""

    folder: Path

    def results(self, name: str) -> dict:
        """A results file: command, machine, device, versions, figures."""
        path = self.folder / "results" / f"{name}.json"
        if not path.is_file():
            raise TableError(f"there is no benchmarks/results/{path.name}")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise TableError(f"benchmarks/results/{path.name} is no JSON ({error})") from error

    def figures(self, name: str) -> dict:
        return self.results(name)["figures"]

    def results_of(self, script: str) -> dict[str, dict]:
        """All results that a script has written, by the commands in them; those of its own name first."""
        names = sorted(path.stem for path in self.folder.glob("results/*.json"))
        found = {name: self.results(name) for name in sorted(names, key=lambda name: name != script)}
        return {name: one for name, one in found.items() if Path(one["command"].split()[1]).stem == script}


def table(name: str) -> Callable:
    """Of a function: it makes the rows of the table of this name."""
    return lambda function: register(TABLES, name, function)


def latest(script: str) -> Callable:
    """Of a function: it says in the index, from the figures of this script, what came of it."""
    return lambda function: register(LATEST, script, function)


def register(functions: dict, name: str, function: Callable) -> Callable:
    assert name not in functions, name
    functions[name] = function
    return function


# Figures as the pages have them


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def seconds(value: float) -> str:
    return f"{value:.2f}"


def loss(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}"


def rate(value: float) -> str:
    """A learning rate: 4e-3, 3.2e-2."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def times(value: float) -> str:
    """A ratio, in three digits."""
    return f"{value:#.3g}" if value else "0"


def named(values: dict[str, str]) -> str:
    """Values after their names, in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


# docs/choosing.md


def chosen(figures: dict, lr: float = 2e-3, **settings) -> float:
    """Mean held-out loss of an arm of choosing.py, over its seeds."""
    keys = [choosing.key_of({"lr": lr} | settings, seed) for seed in range(len(figures))]
    found = [figures[key]["held_out"] for key in keys if key in figures]
    if not found:
        raise TableError(f"choosing.json has no run {keys[0]}")
    return statistics.mean(found)


def side_by_side(benchmarks: Benchmarks, arms: dict[str, dict]) -> Rows:
    """Arms of choosing.py as columns, and their losses below."""
    figures = benchmarks.figures("choosing")
    return [list(arms), [loss(chosen(figures, **settings), 3) for settings in arms.values()]]


@table("choosing_gamma")
def gammas_and_rates(benchmarks: Benchmarks) -> Rows:
    figures, rates = benchmarks.figures("choosing"), (1e-3, 2e-3, 4e-3)
    rows = [
        [name, *(loss(chosen(figures, lr, lisa_activated_layers=gamma), 3) for lr in rates)]
        for gamma, name in {1: "1", 2: "2", 3: "3", 5: "5, all: full training"}.items()
    ]
    return [["gamma", *map(rate, rates)], *rows]


@table("choosing_k")
def intervals(benchmarks: Benchmarks) -> Rows:
    header, losses = side_by_side(benchmarks, {f"{k}": {"lisa_interval_steps": k} for k in (1, 5, 20, 100)})
    return [["K", *header], ["gamma 2, 2e-3", *losses]]


@table("choosing_samplers")
def samplers(benchmarks: Benchmarks) -> Rows:
    names = ("uniform", "reshuffle", "cyclic", "fixed")
    return side_by_side(benchmarks, {f"`{name}`": {"lisa_sampler": name} for name in names})


@table("choosing_ends")
def embeddings_and_head(benchmarks: Benchmarks) -> Rows:
    drawn, frozen = {"lisa_always_on": "rest"}, {"lisa_frozen": "embed,head"}
    return side_by_side(benchmarks, {"always on": {}, "drawn as layers are": drawn, "frozen": drawn | frozen})


@table("choosing_states")
def states(benchmarks: Benchmarks) -> Rows:
    return side_by_side(benchmarks, {f"`{name}`": {"lisa_state": name} for name in ("reset", "reset_all", "keep")})


# docs/comparing.md


ON_SMOLLM2 = ("full", "lora r16", "lisa 2", "lisa 2 K 5", "lisa 2, embed frozen", "lisa 8", "lisa 8, embed frozen")


def method_name(arm: str) -> str:
    """An arm of quality.py as the pages call it."""
    if lisa := re.fullmatch(r"lisa (\d+),? ?(.*)", arm):
        return f"LISA, gamma {lisa[1]}, {lisa[2] or 'uniform'}"
    named = {"embed and head": "embeddings and head", "one block": "one block at a time"}
    return named.get(arm, arm).replace("lora", "LoRA").replace("fixed ", "fixed layers, gamma ")


def runs_at_best(arm: str, runs: dict) -> list[dict]:
    """Every seed at the rate that is best on the first one."""
    if not quality.tried(arm, runs):
        raise TableError(f"the results of quality.py have no run of {arm}")
    begins = quality.key_of(arm, quality.best_rate(arm, runs), 0).removesuffix("0")
    seeds = sum(key.startswith(begins) for key in runs)
    return quality.runs_of(arm, Namespace(seeds=seeds), runs)


def mean_loss(arm: str, runs: dict) -> float:
    return statistics.mean(run["held_out"] for run in runs_at_best(arm, runs))


def quality_table(benchmarks: Benchmarks, results: str, arms: Iterable[str]) -> Rows:
    """Arms of a results file of quality.py, each at its best rate, the best first.

    Steps have a column where they differ, right answers where questions were asked.
    """
    runs, settings = (benchmarks.figures(results)[part] for part in ("runs", "settings"))
    arms = sorted(arms, key=lambda arm: mean_loss(arm, runs))
    of_steps = bool(settings.get("same_time_as"))
    of_answers = any(run["solved"] is not None for arm in arms for run in runs_at_best(arm, runs))
    header = ["method", "best rate", "held-out loss", "spread of seeds", "next tokens right"]
    header += of_answers * ["answers right"] + of_steps * ["steps"] + ["CPU s a step", "MB of tensors"]
    rows = []
    for arm in arms:
        found = runs_at_best(arm, runs)
        losses = [run["held_out"] for run in found]
        row = [method_name(arm), rate(quality.best_rate(arm, runs)), loss(statistics.mean(losses))]
        row += [loss(statistics.stdev(losses)) if len(found) > 1 else "one seed"]
        row += [percent(statistics.mean(run["token_accuracy"] for run in found))]
        if of_answers:
            row += [quality.solved_by(found)]
        if of_steps:
            row += [f"{found[0]['steps']}"]
        row += [f"{statistics.median(run['cpu_seconds_per_step'] for run in found):.3f}"]
        rows.append([*row, f"{found[0]['live_bytes'] / 1e6:,.1f}"])
    return [header, *rows]


@table("comparing_methods")
def methods(benchmarks: Benchmarks) -> Rows:
    return quality_table(benchmarks, "quality", quality.BASELINES)


@table("comparing_smollm2")
def methods_on_smollm2(benchmarks: Benchmarks) -> Rows:
    return quality_table(benchmarks, "quality_smollm2", ON_SMOLLM2)


@table("comparing_smollm2_time")
def methods_on_smollm2_in_equal_time(benchmarks: Benchmarks) -> Rows:
    return quality_table(benchmarks, "quality_smollm2_time", [arm for arm in ON_SMOLLM2 if arm != "lisa 2"])


@table("comparing_seeds")
def changes_with_every_seed(benchmarks: Benchmarks) -> Rows:
    arms = ("full", "lisa 2", "lisa 2 keep", "lisa 2 warm-up", "lisa 2 upper most", "lisa 4", "lisa 4 keep")
    return quality_table(benchmarks, "quality", arms)


@table("comparing_changes")
def changes_to_lisa(benchmarks: Benchmarks) -> Rows:
    """Single runs, of the first seed at 4e-3."""
    arms = {
        "lisa 2 K 5": "K = 5",
        "lisa 2 K 50": "K = 50",
        "lisa 2 K 100": "K = 100",
        "lisa 2 keep": "states kept (`--lisa_state keep`)",
        "lisa 2 warm-up": "10 steps of warm-up after a wake (`--lisa_wake_warmup_steps 10`)",
        "lisa 2 keep, warm-up": "both",
        "lisa 2 keep, K 5": "states kept, K = 5",
        "lisa 2 keep, K 1": "states kept, K = 1",
        "lisa 2 rate x 1.6": "the rate 1.6 times as high (`--lisa_lr_power 0.5`)",
        "lisa 2 rate / 1.6": "the rate 1.6 times as low (`--lisa_lr_power -0.5`)",
        "lisa 2 sharp": "adaptive at temperature 0.2",
        "lisa 2 upper more": "`weighted`, upper layers more often: weights 1, 2, 3, 4, 5",
        "lisa 2 upper most": "`weighted`, their cubes: 1, 8, 27, 64, 125",
        "lisa 2 lower most": "`weighted`, lower layers more often: 1, 1/8, 1/27, 1/64, 1/125",
        "lisa 3": "gamma 3",
        "lisa 4": "gamma 4",
        "lisa 4 keep": "gamma 4, states kept",
    }
    runs = benchmarks.figures("quality")["runs"]
    rows = [[name, loss(runs[quality.key_of(arm, 4e-3, 0)]["held_out"])] for arm, name in arms.items()]
    return [["change", "held-out loss"], *rows]


# docs/kernels.md


@table("kernels_adamw")
def adamw(benchmarks: Benchmarks) -> Rows:
    names = {
        "lisa_adamw, fp32": "`lisa_adamw`, fp32",
        "lisa_adamw, bf16, fp32 master": "`lisa_adamw`, fp32 masters of bf16 weights",
        "lisa_adamw, bf16, fp32 master, 8 bits": "`lisa_adamw`, masters and 8 bits",
        "lisa_adamw, bf16, stochastic": "`lisa_adamw`, `bf16_sr`",
        "lisa_adamw, bf16, stochastic, 8 bits": "`lisa_adamw`, `bf16_sr` and 8 bits",
        "torch AdamW, foreach": "torch's AdamW, for-each",
        "torch AdamW, fused": "torch's AdamW, fused",
        "DeepSpeedCPUAdam": "DeepSpeedCPUAdam",
        "bitsandbytes AdamW8bit": "bitsandbytes AdamW8bit, fp32",
        "bitsandbytes AdamW8bit in bf16": "bitsandbytes AdamW8bit, bf16",
        "torchao AdamW8bit in bf16": "torchao's AdamW8bit, bf16, stochastic",
    }
    found = {one["name"]: one for one in benchmarks.figures("kernels_cpu")["kernels"] if one["numel"] == 10**8}
    rows = [["", "ns an element", "beside the tensors"]]
    for name, shown in names.items():
        beside = found[name]["bytes_beside"]
        size = "not seen" if beside is None else mib(beside) if beside else "none"
        rows.append([shown, f"{1e9 * found[name]['seconds'] / 10**8:.1f}", size])
    return rows


@table("kernels_forms")
def forms(benchmarks: Benchmarks) -> Rows:
    names = {
        "fp32, torch AdamW": "fp32, torch's AdamW",
        "fp32": "fp32",
        "bf16, torch AdamW": "bf16, torch's AdamW",
        "bf16, bitsandbytes 8 bits": "bf16, bitsandbytes' 8 bits",
        "bf16, fp32 master": "bf16, fp32 masters",
        "bf16, fp32 master, 8 bits": "bf16, fp32 masters, 8 bits",
        "bf16_sr": "`bf16_sr`",
        "bf16_sr, 8 bits": "`bf16_sr`, 8 bits",
    }
    figures = benchmarks.figures("forms")
    rows = [["", "bytes an active parameter, ZeRO-3", "loss of the last 20 steps", "held out"]]
    for form, shown in names.items():
        sizes = " + ".join(f"{size:.2f}" for size in figures[form]["bytes"]["zero3"].values())
        ends = [statistics.mean(run["losses"][-20:]) for run in figures[form]["runs"]]
        held_out = [run["held_out"] for run in figures[form]["runs"]]
        rows.append([shown, sizes, loss(statistics.mean(ends)), loss(statistics.mean(held_out))])
    return rows


# docs/memory.md, docs/zero.md, docs/norms.md


@table("memory_policies")
def policies(benchmarks: Benchmarks) -> Rows:
    names = {
        "LoRA r16": "LoRA, rank 16",
        "LISA as published": "LISA as published: embed and head always on",
        "LISA, always-on 8 bit": "their moments in 8 bits",
        "LISA, embed+head drawn": "embed and head drawn",
        "LISA, drawn, 8 bit": "drawn, all moments in 8 bits",
        "LISA, always on, 6 bytes": "always on, no masters, moments in 8 bits "
        "(`--optim lisa_adamw --lisa_master bf16_sr`)",
        "LISA, drawn, 6 bytes": "drawn, the same",
        "LISA, states on host": "all states on the host (`--deepspeed zero2_offload`)",
        "LISA, drawn, on host": "drawn (`--lisa_always_on rest`), all states on the host "
        "(`--lisa_offload embed,head,rest,layers`)",
    }
    figures = benchmarks.figures("policies")
    lengths = {"1024": "1024 tokens, 0", "4096": "4096 tokens, 0", "1024, all checkpointed": "1024 tokens, 32"}
    models = {"LLaMA-2-7B": "llama2-7b", "Llama-3.1-8B": "llama3.1-8b"}
    columns = [f"{model}, {length} checkpointed" for model in models.values() for length in lengths.values()]
    rows = [
        [shown, *(gib(figures[f"{column}, {name}"]["gpu"]["peak"]) for column in columns)]
        for name, shown in names.items()
    ]
    return [["", *(f"{model}, {length}" for model in models for length in lengths)], *rows]


SIDE_BY_SIDE = ("full", "lora r16", "lora r128", "callback", "static", "lisa")


def middle(steps: list[dict], part: str = "step") -> float:
    """Median seconds of a part of the steps of speed.py."""
    return statistics.median(step[part] for step in steps)


def ratios(of: dict, to: dict, steps: str = "steps") -> list[float]:
    """Of speed.py, two arms' steps, one over the other, round by round."""
    return [one["step"] / other["step"] for one, other in zip(of[steps], to[steps], strict=True)]


def spread(each: list[float], digits: int = 2) -> str:
    """The median, and the least and the most."""
    return f"{statistics.median(each):.{digits}f} ({min(each):.{digits}f} to {max(each):.{digits}f})"


def held(arm: dict) -> int:
    """Bytes of memory.py after the last switch."""
    return list(arm["live"].values())[-1]["total"]


def moved(arm: dict) -> str:
    """Of the elements that sleep those that have moved."""
    return "-" if arm["drift"] is None else percent(arm["drift"]["changed"] / arm["drift"]["elements"], 0)


@table("headline")
def headline(benchmarks: Benchmarks) -> Rows:
    """What each method takes, in parts of full training."""
    bytes_held, steps = benchmarks.figures("memory")["zero2"], benchmarks.figures("speed")["zero2"]
    rows = [["of full training's, ZeRO-2, two ranks", "memory between steps", "peak of a step", "time of a step",
             "FLOPs of a step", "bytes sent", "sleeping weights that move"]]  # fmt: skip
    for arm in SIDE_BY_SIDE:
        rows.append(
            [
                arm,
                percent(held(bytes_held[arm]) / held(bytes_held["full"]), 0),
                percent(bytes_held[arm]["peak"] / bytes_held["full"]["peak"], 0),
                percent(statistics.median(ratios(steps[arm], steps["full"])), 0),
                percent(steps[arm]["flops"] / steps["full"]["flops"], 0),
                percent(sent(benchmarks, "zero2", arm), 0),
                moved(bytes_held[arm]),
            ]
        )
    return rows


def sent(benchmarks: Benchmarks, ds_config: str, arm: str) -> float:
    """Of communication.py, what a rank sends in a step, in parts of full training's."""
    arms = benchmarks.figures("communication")["counted"][ds_config]
    return arms[arm]["moments"]["step"]["wire"] / arms["full"]["moments"]["step"]["wire"]


@table("memory_held")
def memory_held(benchmarks: Benchmarks) -> Rows:
    """Of every arm of memory.py what it holds, by what it is, and its peak beside the plan."""
    figures, kinds = benchmarks.figures("memory"), ("weights", "gradients", "masters", "moments", "other")
    rows = [["MiB of a rank", *kinds, f"all, after {last_switch(figures)} switches", "after the first step",
             "peak of a step", "its plan", "peak with a switch", "asleep, moved"]]  # fmt: skip
    for ds_config, of_arms in figures.items():
        for name, arm in of_arms.items():
            first, *_, last = arm["live"].values()
            sizes = [*(last[kind] for kind in kinds), last["total"], first["total"], arm["peak"]]
            off = "-" if arm["planned"] is None else f"{100 * (arm['planned'] / arm['peak'] - 1):+.1f}%"
            row = [f"{ds_config}, {name}", *(f"{size / 2**20:.1f}" for size in sizes), off]
            with_switch = arm["peak_with_switch"]
            rows.append([*row, "-" if with_switch is None else f"{with_switch / 2**20:.1f}", moved(arm)])
    return rows


def last_switch(figures: dict) -> str:
    """After how many switches memory.py has looked last."""
    return list(figures["zero2"]["lisa"]["live"])[-1]


STATIC_OF = {name: name.replace("lisa", "static") for name in ("lisa", "lisa, embed frozen", "lisa, checkpointed")}


def step_rows(of_sections: dict[str, dict]) -> Rows:
    """A row of each arm of sections of speed.py in which full training runs too."""
    rows = [["", "step s", "forward", "backward", "optimizer", "of static's step", "of full's step", "FLOPs of full's"]]
    for title, of_arms in of_sections.items():
        for name, arm in of_arms.items():
            static = of_arms.get(STATIC_OF.get(name))
            rows.append(
                [
                    f"{title}, {name}",
                    *(f"{middle(arm['steps'], part):.2f}" for part in ("step", "forward", "backward", "optimizer")),
                    "-" if static is None else spread(ratios(arm, static)),
                    spread(ratios(arm, of_arms["full"])),
                    f"{arm['flops'] / of_arms['full']['flops']:.2f}",
                ]
            )
    return rows


@table("speed_steps")
def speed_steps(benchmarks: Benchmarks) -> Rows:
    """Of every stage the arms side by side."""
    return step_rows({name: arms for name, arms in benchmarks.figures("speed").items() if "callback" in arms})


@table("speed_more")
def speed_more(benchmarks: Benchmarks) -> Rows:
    """With embeddings frozen and with checkpointing."""
    figures = benchmarks.figures("speed")
    return step_rows({name.split(",")[0]: arms for name, arms in figures.items() if "full, checkpointed" in arms})


@table("speed_of_static")
def speed_of_static(benchmarks: Benchmarks) -> Rows:
    """LISA's step in parts of static's: of each stage and width, in the first period and after a switch."""
    rows = [["LISA's step, of static's", "parameters", "in the first period", "after a switch"]]
    for title, arms in benchmarks.figures("speed").items():
        if "lisa" in arms:
            each = [spread(ratios(arms["lisa"], arms["static"], which), 3) for which in ("steps", "after_a_switch")]
            rows.append([title, f"{arms['lisa']['parameters'] / 1e6:.0f} M", *each])
    return rows


@table("zero_switch")
def switch(benchmarks: Benchmarks) -> Rows:
    cells = benchmarks.figures("switch")
    intervals = next(iter(cells.values()))["share_of_period"]
    rows = [["", "parameters", "switch s", "with what follows", "step s", "states MiB a rank", "MiB let go",
             *(f"of K = {interval}" for interval in intervals)]]  # fmt: skip
    for name, cell in cells.items():
        each = cell["switch_seconds"]
        rows.append(
            [
                name,
                f"{cell['parameters'] / 1e6:.0f} M",
                f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})",
                f"{cell['cost_seconds']:.3f}",
                f"{statistics.median(cell['step_seconds']):.2f}",
                *(f"{cell[key] / 2**20:.1f}" for key in ("state_bytes_of_rank_0", "bytes_released")),
                *(percent(share, 2) for share in cell["share_of_period"].values()),
            ]
        )
    return rows


@table("zero_switch_time")
def where_a_switch_spends_its_time(benchmarks: Benchmarks) -> Rows:
    """Of the first cells, which are the stages, the parts of a switch that take most."""
    rows = [["", "what takes the time of a switch"]]
    for name, cell in list(benchmarks.figures("switch").items())[:3]:
        parts = {part: percent(share, 0) for part, share in cell["of_time"].items() if share > 0.1}
        rows.append([name, named({f"`{part}`": share for part, share in parts.items()})])
    return rows


@table("scaling_ranks")
def scaling_ranks(benchmarks: Benchmarks) -> Rows:
    """Steps of this machine's ranks, measured and by the model."""
    rows = [["", "ranks", "rows a rank", "step s", "longest", "by the model", "off", "CPU ms a token",
             "states MB a rank"]]  # fmt: skip
    for point in benchmarks.figures("scaling")["here"]["points"]:
        rows.append(
            [
                f"{point['ds_config']}, {point['arm']}, {point['kind']}",
                f"{point['ranks']}",
                f"{point['rows_a_rank']}",
                f"{point['seconds']:.2f}",
                f"{100 * point['spread']:+.0f}%",
                f"{point['predicted']:.2f}",
                f"{100 * point['off']:+.0f}%",
                f"{1e3 * point['cpu_seconds_a_token']:.2f}",
                f"{point['memory']['states'] / 1e6:.1f}",
            ]
        )
    return rows


@table("scaling_70b")
def scaling_of_a_large_model(benchmarks: Benchmarks) -> Rows:
    """What the model says where it fits the GPUs, for the shortest rows."""
    points = benchmarks.figures("scaling")["large"]["points"]
    shortest = min(point["length"] for point in points)
    rows = [["", "GPUs", "step s", "of it communication", "tokens a second", "GB of a GPU"]]
    for point in points:
        if point["fits"] and point["length"] == shortest and point["gpus"] in (8, 32, 128, 512):
            name, speed = f"{point['ds_config']}, {point['arm']}", f"{point['tokens_per_second']:,.0f}"
            share = percent(point["communication"] / point["seconds"], 0)
            peak = f"{point['peak_bytes'] / 1e9:.1f}"
            rows.append([name, f"{point['gpus']}", f"{point['seconds']:.2f}", share, speed, peak])
    return rows


@table("communication_step")
def communication_step(benchmarks: Benchmarks) -> Rows:
    """Bytes of a step in parts of full training's, by DeepSpeed config."""
    counted = benchmarks.figures("communication")["counted"]
    rows = [["sent by a rank in a step, of full training's", "active share", *counted, "equal to the formula"]]
    for arm in SIDE_BY_SIDE:
        of_full = [percent(sent(benchmarks, ds_config, arm)) for ds_config in counted]
        equal = all(counted[ds_config][arm]["equal"] for ds_config in counted)
        rows.append([arm, percent(counted["zero2"][arm]["active_share"]), *of_full, "yes" if equal else "no"])
    return rows


@table("communication_70b")
def communication_of_a_large_model(benchmarks: Benchmarks) -> Rows:
    ((title, of_stages),) = benchmarks.figures("communication")["by_formula_alone"].items()
    rows = [[f"GB that a rank sends in a step, {title}", "full", "LISA", "LISA with a switch in 20 steps"]]
    for ds_config, arms in of_stages.items():
        steps = [arms[arm]["wire"] / 1e9 for arm in ("full", "lisa")]
        rows.append([ds_config, *(f"{step:.2f}" for step in steps), f"{arms['lisa']['mean_of_period'] / 1e9:.2f}"])
    return rows


def times_a_layer(blocks: dict[str, dict], quantity: str, block: str) -> str:
    """How many times the median layer's norm that of embedding or head is."""
    if block not in blocks:
        return "tied"
    layer = statistics.median(norms[quantity] for name, norms in blocks.items() if name.startswith("layers."))
    return times(blocks[block][quantity] / layer)


@table("norms_ends")
def norms_of_the_ends(benchmarks: Benchmarks) -> Rows:
    lines = {
        "weight norm, full": ("full", "weight_norm"),
        "weight norm, LoRA, merged, on the layers": ("lora", "weight_norm"),
        "weight norm, LoRA, merged, ends": ("lora_ends", "weight_norm"),
        "update of a step, full": ("full", "update_norm"),
        "update of a step, LoRA on the layers": ("lora", "update_norm"),
        "update of a step, LoRA, ends": ("lora_ends", "update_norm"),
        "moved, full": ("full", "moved_norm"),
        "moved, LoRA, ends": ("lora_ends", "moved_norm"),
        "adapter product, LoRA, ends": ("lora_ends", "product_norm"),
        "adapter product, LoRA, ends, even": ("lora_ends_even", "product_norm"),
    }
    models = [benchmarks.figures(f"norms_{model}") for model in ("stories260k-hf", "smollm2-135m")]
    rows = [["", "stories260K: embed", "head", "SmolLM2-135M: embed", "head"]]
    for name, (arm, quantity) in lines.items():
        ends = [(model[arm]["blocks"], block) for model in models for block in ("embed", "head")]
        rows.append([name, *(times_a_layer(blocks, quantity, block) for blocks, block in ends)])
    return rows


# benchmarks/README.md


@table("index")
def index(benchmarks: Benchmarks) -> Rows:
    rows = [["benchmark", "question", "command", "latest result", "machine", "device"]]
    for path in sorted(benchmarks.folder.glob("*.py")):
        if path.stem in SHARED:
            continue
        asked = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]
        link = f"[{path.stem}]({path.name})"
        for name, found in benchmarks.results_of(path.stem).items():
            result = f"[{sentence(path.stem, found)}](results/{name}.json)"
            rows.append([link, asked, f"`{shown_command(found)}`", result, found["machine"], found["device"]])
            link = asked = ""  # of the script's other results
        if link:
            rows.append([link, asked, "not run yet", "", "", ""])
    return rows


def shown_command(results: dict) -> str:
    """The command that made them; of files outside the repository the name, wherever they lie."""
    words = results["command"].split()
    return " ".join(Path(word).name if word.startswith(("/", "..")) else word for word in words)


def sentence(script: str, results: dict) -> str:
    if script not in LATEST:
        raise TableError(f"nothing says what came of {script}.py: write a function with @latest({script!r})")
    return LATEST[script](results["figures"])


@latest("choosing")
def of_choosing(figures: dict) -> str:
    losses = {}
    for gamma in (1, 2, 3, 5):
        lowest = min(chosen(figures, lr, lisa_activated_layers=gamma) for lr in (1e-3, 2e-3, 4e-3))
        losses[f"gamma {gamma}:"] = loss(lowest, 3)
    return f"held-out loss at the best rate: {named(losses)}"


@latest("export")
def of_export(figures: dict) -> str:
    size, export = figures["checkpoint_bytes"] / 1e9, figures["lisa_dist_export_seconds"]
    save, load = (max(one["seconds"] for one in figures[f"{verb}_checkpoint"]) for verb in ("save", "load"))
    return f"a checkpoint of {size:.2f} GB: saved in {save:.1f} s, loaded in {load:.1f} s, exported in {export:.1f} s"


@latest("faults")
def of_faults(figures: dict) -> str:
    if "exit_statuses" in figures:
        counts = figures["exit_statuses"]
        return f"{counts.get('0', 0)} of {sum(counts.values())} undisturbed ranks end with status 0"
    whole, runs = figures["runs_with_the_undisturbed_weights"], figures["runs"]
    return f"{sum(figures['faults'].values())} faults: {whole} of {runs} runs have the undisturbed run's weights"


@latest("forms")
def of_forms(figures: dict) -> str:
    losses = [statistics.mean(run["held_out"] for run in form["runs"]) for form in figures.values()]
    return f"held-out losses of {len(losses)} forms: {loss(min(losses))} to {loss(max(losses))}"


@latest("gpu")
def of_gpu(figures: dict) -> str:
    """Of each shape peak and speed of what has run, or that it has not."""
    shapes = []
    for shape, arms in figures.items():
        ran = {name: arm for name, arm in arms.items() if "not_run" not in arm}
        speed = {name: arm["tokens"] / statistics.median(step["step"] for step in arm["steps"])
                 for name, arm in ran.items()}  # fmt: skip
        said = {name: f"{gib(arm['peak'])} GiB {speed[name]:.0f} tokens/s" for name, arm in ran.items()}
        shapes.append(f"{shape}: {named(said) or 'nothing has run'}")
    return "; ".join(shapes)


@latest("health")
def of_health(figures: dict) -> str:
    return f"of a step: {named({name: percent(one['share_of_step'], 3) for name, one in figures.items()})}"


@latest("keep")
def of_keep(figures: dict) -> str:
    return f"held-out loss: {named({name: loss(one['held_out'], 3) for name, one in figures.items()})}"


@latest("kernels")
def of_kernels(figures: dict) -> str:
    ran = [one for one in figures["kernels"] if "seconds" in one]
    largest = max(one["numel"] for one in ran)
    each = {one["name"]: 1e9 * one["seconds"] / largest for one in ran if one["numel"] == largest}
    names = ("lisa_adamw, fp32", "torch AdamW, fused", "lisa_adamw, bf16, stochastic, 8 bits")
    shown = "; ".join(f"{name} {each[name]:.2f}" for name in names)
    return f"ns an element of {largest:,}: {shown}"


@latest("loading")
def of_loading(figures: dict) -> str:
    most = {name: max(own for own, _ in one["peaks"]) / one["model_bytes"] for name, one in figures.items()}
    return f"own pages of a rank, in copies of the model: {named({name: f'{seen:.2f}' for name, seen in most.items()})}"


@latest("memory")
def of_memory(figures: dict) -> str:
    zero2 = figures["zero2"]
    shown = named({arm: percent(held(zero2[arm]) / held(zero2["static"]), 0) for arm in ("full", "callback", "lisa")})
    return f"held after {last_switch(figures)} switches, of what static layers hold, zero2: {shown}"


@latest("speed")
def of_speed(figures: dict) -> str:
    both = {name: (arms["lisa"], arms["static"]) for name, arms in figures.items() if "lisa" in arms}
    shown = {name: f"{statistics.median(ratios(*pair)):.3f}" for name, pair in both.items()}
    return f"step of LISA, of static layers': {named(shown)}"


@latest("communication")
def of_communication(figures: dict) -> str:
    arms = [arm for of_config in figures["counted"].values() for arm in of_config.values()]
    shown = {}
    for name in ("zero2", "zero3"):
        lisa, full = (figures["counted"][name][arm]["moments"]["step"]["wire"] for arm in ("lisa", "full"))
        shown[name] = percent(lisa / full)
    equal = f"counted equals the formula in {sum(arm['equal'] for arm in arms)} of {len(arms)} arms"
    return f"{equal}; LISA sends of full training's bytes: {named(shown)}"


@latest("norms")
def of_norms(figures: dict) -> str:
    arms = {"full training": "full", "LoRA on the layers": "lora", "LoRA at the ends too": "lora_ends"}
    shown = {name: times_a_layer(figures[arm]["blocks"], "update_norm", "embed") for name, arm in arms.items()}
    return f"update of the embedding, in times a layer's: {named(shown)}"


@latest("packing")
def of_packing(figures: dict) -> str:
    return f"losses of an example, packed, padded and alone, differ by {max(figures.values()):.1e} at most"


@latest("policies")
def of_policies(figures: dict) -> str:
    names = ("LoRA r16", "LISA as published", "LISA, embed+head drawn", "LISA, drawn, on host")
    peaks = [gib(figures[f"llama3.1-8b, 1024 tokens, 0 checkpointed, {name}"]["gpu"]["peak"]) for name in names]
    shown = "; ".join(f"{name} {peak}" for name, peak in zip(names, peaks, strict=True))
    return f"planned peak GiB of llama3.1-8b, 1024 tokens: {shown}"


@latest("preempt")
def of_preempt(figures: dict) -> str:
    runs = {name: run for name, run in figures.items() if name != "steps"}
    parts = []
    for name, run in runs.items():
        same = run["weights_are_the_undisturbed_runs"]
        held = "weights bit for bit" if same else f"losses within {run['largest_difference_of_a_loss']:.1e}"
        parts.append(f"{name}, preempted {run['preemptions']} times: {held}")
    return "; ".join(parts)


@latest("quality")
def of_quality(figures: dict) -> str:
    settings, runs = figures["settings"], figures["runs"]
    arms = [arm for arm in ("full", "lisa 2", "lora r8", "lora r16", "lora r32") if quality.tried(arm, runs)]
    time = "the time of full training's " if settings.get("same_time_as") else ""
    losses = named({arm: loss(mean_loss(arm, runs)) for arm in arms})
    return f"held-out loss of {settings['model']} after {time}{settings['steps']} steps: {losses}"


@latest("resume")
def of_resume(figures: dict) -> str:
    cuts = [cut for cell in figures["same"].values() for where, cut in cell.items() if where != "run"]
    same = sum(cut["weights"] == cut["losses"] == 0 for cut in cuts)
    elsewhere = max(figures["elsewhere"].values())
    return f"{same} of {len(cuts)} resumes are bit for bit; on other ranks and stages losses within {elsewhere:.1e}"


@latest("scaling")
def of_scaling(figures: dict) -> str:
    measured = {}  # once, where one point stands for strong and weak scaling both
    for point in figures["here"]["points"]:
        if point["ranks"] > 1:
            key = (point["ds_config"], point["arm"], point["ranks"], point["rows_a_rank"])
            measured[key] = abs(point["off"])
    off = measured.values()
    most, median = percent(max(off), 0), percent(statistics.median(off), 0)
    return f"the model is off by {median} in the median of {len(off)} measured steps, by {most} at most"


@latest("stages")
def of_stages(figures: dict) -> str:
    return f"losses of {len(figures['losses'])} ways to run differ by {figures['largest_difference']:.1e} at most"


@latest("switch")
def of_switch(figures: dict) -> str:
    shown = {}
    for name, cell in list(figures.items())[:3]:
        shown[name.split(",")[0]] = percent(cell["share_of_period"]["20"], 2)
    return f"of a period of 20 steps: {named(shown)}"


# Pages


def markdown(rows: Rows) -> str:
    """A table; its first row is the header. A bar within a cell would end it."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return re.sub(r" +\|", " |", "\n".join(lines)) + "\n"


def make(name: str, benchmarks: Benchmarks) -> str:
    """The table of a name as it should be."""
    if name not in TABLES:
        raise TableError(f"there is no table {name}; there are {', '.join(sorted(TABLES))}")
    try:
        return markdown(TABLES[name](benchmarks))
    except TableError as error:
        raise TableError(f"table {name}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise TableError(f"table {name}: its results have another shape than it reads ({error!r})") from error


def with_tables(page: str, benchmarks: Benchmarks) -> tuple[str, list[str]]:
    """A page with its tables as they should be, and the names of those that were not."""
    written, *parts = re.split(r"^<!-- table: (.*) -->\n", page, flags=re.MULTILINE)
    loose, differ = written, []
    for name, rest in zip(parts[::2], parts[1::2], strict=True):
        old, end, after = rest.partition(END)
        if not end:
            raise TableError(f"the table {name} has no {END}")
        new = make(name, benchmarks)
        written += f"<!-- table: {name} -->\n{new}{END}{after}"
        loose += after
        differ += [name] * (old != new)
    if END in loose:
        raise TableError(f"there is an {END} that no line <!-- table: NAME --> begins")
    return written, differ


def changed_pages(root: Path) -> dict[Path, tuple[str, list[str]]]:
    """The pages whose tables differ: what they should be, and the names of the tables."""
    benchmarks, changed = Benchmarks(root / "benchmarks"), {}
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md")), root / "benchmarks" / "README.md"):
        try:
            page, differ = with_tables(path.read_text(encoding="utf-8"), benchmarks)
        except TableError as error:
            raise TableError(f"{path.relative_to(root)}: {error}.") from error
        if differ:
            changed[path] = (page, differ)
    return changed


def main(words: list[str] | None = None, root: Path = ROOT) -> None:
    """Write the pages whose tables differ, or with --check name them and exit with status 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    arguments = parser.parse_args(words)
    try:
        changed = changed_pages(root)
    except TableError as error:
        sys.exit(str(error))
    for path, (page, differ) in changed.items():
        print(f"{path.relative_to(root)}: {', '.join(differ)}")
        if not arguments.check:
            path.write_text(page, encoding="utf-8")
    if arguments.check and changed:
        sys.exit("These tables are not what the results say: python benchmarks/tables.py writes them.")


if __name__ == "__main__":
    main()
