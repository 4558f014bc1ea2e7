"""What the tables of tables.yaml have as rows: functions of what stands behind `of` there, and of figures of results.

A row is a sequence of values, which the columns take by their numbers. Results of scripts that no longer exist stay as
they were measured.
"""

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from benchmarks.tables.outcomes import FIRST_RATE, best_rung, losses_on_test_rows, paired_difference
from benchmarks.tables.render import Table, print_table

Row = Iterable


def as_written(of: str, figures: dict) -> Iterable[Row]:
    """Rows that the results have as such, as those of scripts that are gone."""
    return figures[of]


def cards(of: None, figures: dict) -> Iterable[Row]:
    return [(*key.split(", "), one) for key, one in figures.items()]


def checkpoints(of: None, figures: dict) -> Iterator[Row]:
    """Means over the saves."""
    for ds_config, ways in figures["saves"].items():
        for way, saves in ways.items():
            means = (statistics.mean(one[name] for one in saves) for name in ("bytes", "waited", "seconds"))
            yield ds_config, way, *means


def streams(of: None, figures: dict) -> Iterator[Row]:
    """By the size of the data."""
    for megabytes, one in figures["sizes"].items():
        yield megabytes, one, one["rows"] / one["seconds"], int(megabytes) / one["seconds"]


# kernels.py


def kernels(of: dict, figures: dict) -> Iterator[Row]:
    """Of 100 million elements."""
    found = {one["name"]: one for one in figures["kernels"] if one["numel"] == 10**8}
    for name, shown in of.items():
        beside = found[name]["bytes_beside"]
        size = "not seen" if beside is None else f"{beside / 2**20:.0f} MiB" if beside else "none"
        yield shown, 1e9 * found[name]["seconds"] / 10**8, size


# memory.py, speed.py, switch.py, communication.py


def ratios(of: dict, to: dict, steps: str = "steps") -> list[float]:
    """Steps of two methods of speed.py, one over the other, round by round."""
    return [one["step"] / other["step"] for one, other in zip(of[steps], to[steps], strict=True)]


def held(method: dict) -> int:
    """Bytes of memory.py after the last switch."""
    return list(method["live"].values())[-1]["total"]


def moved(method: dict) -> float | None:
    """The share of frozen elements that have moved."""
    return None if method["drift"] is None else method["drift"]["changed"] / method["drift"]["elements"]


def layers_of(method: str) -> str:
    """What a method of memory.py and speed.py trains, of the 32 layers of LLaMA-2-7B's shape."""
    return "32 of 32" if method.startswith("full") else "adapters" if method.startswith("lora") else "2 of 32"


def sent(figures: dict, ds_config: str, method: str) -> float:
    """What a rank sends in a step of communication.py, in parts of full training's."""
    methods = figures["counted"][ds_config]
    return methods[method]["moments"]["step"]["wire"] / methods["full"]["moments"]["step"]["wire"]


def headline(of: list, memory: dict, speed: dict, communication: dict) -> Iterator[Row]:
    """In parts of full training."""
    of_memory, steps = memory["zero2"], speed["zero2"]
    for name in of:
        sizes = held(of_memory[name]) / held(of_memory["full"]), of_memory[name]["peak"] / of_memory["full"]["peak"]
        time = statistics.median(ratios(steps[name], steps["full"])), steps[name]["flops"] / steps["full"]["flops"]
        yield name, layers_of(name), *sizes, *time, sent(communication, "zero2", name), moved(of_memory[name])


def memory(of: None, figures: dict) -> Iterator[Row]:
    """What each method holds, by what it is, and its peak beside the plan."""
    for ds_config, methods in figures.items():
        for name, one in methods.items():
            *_, last = one["live"].values()
            off = None if one["planned"] is None else one["planned"] / one["peak"] - 1
            yield f"{ds_config}, {name}", last, one, off, moved(one)


def steps(of: str, figures: dict) -> Iterator[Row]:
    """The sections of speed.py that have the method `of`."""
    for title, methods in figures.items():
        for name, one in methods.items() if of in methods else ():
            phases = ("step", "forward", "backward", "optimizer")
            seconds = [statistics.median(step[phase] for step in one["steps"]) for phase in phases]
            shares = ratios(one, methods["full"]), one["flops"] / methods["full"]["flops"]
            yield f"{title.split(',')[0]}, {name}", layers_of(name), *seconds, *shares


def beside_static(of: None, figures: dict) -> Iterator[Row]:
    """A row for each stage and width, in the first period and after a switch."""
    for title, methods in figures.items():
        if "lisa" in methods:
            lisa, static = methods["lisa"], methods["static"]
            yield title, lisa["parameters"], ratios(lisa, static), ratios(lisa, static, "after_a_switch")


def switches(of: int, figures: dict) -> Iterable[Row]:
    """With its share of a period of so many steps."""
    return [(name, case, case["share_of_period"][f"{of}"]) for name, case in figures.items()]


def traffic(of: list, figures: dict) -> Iterator[Row]:
    """By DeepSpeed config."""
    for name in of:
        shares = [sent(figures, ds_config, name) for ds_config in figures["counted"]]
        yield name, figures["counted"]["zero1"][name]["active_share"], *shares


def peers(of: None, figures: dict) -> Iterator[Row]:
    """Medians over the rounds, and ratios to ours on as many ranks; of a method that did not run the reason."""
    for name, one in figures["arms"].items():
        if "not_run" in one or not one["runs"]:
            yield name, f"not run: {one.get('not_run', 'no round')}", *[""] * 5
            continue
        cells, ours = [], figures["arms"].get(one["baseline"], {"runs": []})["runs"]
        for quantity, digits, scale in (("cpu_seconds_per_step", ".2f", 1), ("live_bytes", ",.0f", 1e6)):
            values = [run[quantity] / scale for run in one["runs"]]
            low, middle, high = (f"{kind(values):{digits}}" for kind in (min, statistics.median, max))
            pairs = zip(one["runs"], ours, strict=False)  # one may have ended earlier
            of_ours = [run[quantity] / other[quantity] for run, other in pairs]
            cells += [f"{middle} ({low} to {high})" if low != high else middle]
            cells += [f"{statistics.median(of_ours):.2f}" if of_ours else "-"]
        batch = [f"{statistics.mean(run[count] for run in one['runs']):.0f}" for count in ("tokens", "labels")]
        versions = figures["versions"][one["peer"]]
        shown = [f"{package} {versions[package]}" for package in (one["peer"], "badam") if package in versions]
        yield name, *cells, ", ".join(batch), ", ".join(shown)


# decide.py


def of_the_grid(of: dict, figures: dict) -> Iterator[Row]:
    """Yield the methods of the grid, the best score first: name, score, GiB at 8B, and the test loss of each task.

    `of` has the tasks, and the methods by the names that a page gives them, or none for all methods. A test loss is a
    mean with its standard error, and the paired difference to the baseline with its own.
    """
    methods = figures["methods"]
    shown = of.get("methods") or {name: name for name in methods}
    by_score = sorted(shown, key=lambda name: (methods[name]["score"] is None, methods[name]["score"] or 0, name))
    for name in by_score if "methods" not in of else shown:
        one = methods[name]
        score = "-" if one["score"] is None else f"{one['score']:.3f}"
        losses = (one["tasks"].get(task) for task in of["tasks"])
        cells = ["-" if found is None else _test_loss(found) for found in losses]
        yield shown[name], score, f"{one['peak'] / 2**30:.1f}", *cells


def _test_loss(one: dict) -> str:
    losses, difference = one["losses"], one["difference"]
    text = f"{statistics.mean(losses):.3f}"
    if len(losses) > 1:
        text += f" ± {statistics.stdev(losses) / len(losses) ** 0.5:.3f}"
    if difference is None or difference[0] == 0:
        return text
    error = "" if difference[1] is None else f" ± {difference[1]:.3f}"
    return f"{text} ({difference[0]:+.3f}{error})"


# grid.py


def test_losses(of: dict, *tasks: dict) -> Iterator[Row]:
    """Yield the test losses of methods on several tasks, or after several numbers of steps.

    `of` has the baseline, and the methods by the names that a page gives them.
    """
    for method, shown in of["methods"].items():
        found = [_outcome(method, of["baseline"], task["runs"]) for task in tasks]
        yield shown, *("-" if one is None else _test_loss(one) for one in found)


def _outcome(method: str, baseline: str, runs: dict) -> dict | None:
    """Return the test losses of a method and its paired difference to a baseline, or None if it has no runs."""
    losses, of_baseline = (losses_on_test_rows(name, runs) for name in (method, baseline))
    if not losses:
        return None
    difference = paired_difference(method, baseline, runs) if losses.keys() & of_baseline.keys() else None
    return {"losses": list(losses.values()), "difference": difference}


def best_rates(of: dict, *tasks: dict) -> Iterator[Row]:
    """Yield the learning rate with the lowest validation loss on each task; `of` has methods and their names."""
    for method, shown in of.items():
        rungs = [best_rung(method, task["runs"]) for task in tasks]
        yield shown, *(None if rung is None else FIRST_RATE * 2.0**rung for rung in rungs)


TABLES = {
    name: Table(**declared | {"rows": globals()[declared["rows"]]})
    for name, declared in yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8")).items()
}


def show(results: str, figures: dict) -> None:
    """Print the tables of a results file alone, as they stand on the pages."""
    for table in (table for table in TABLES.values() if table.results == [results]):
        print_table(*table.make(figures))
        print()
