"""What the runs of grid.py have come to: the best rate of a method, its test losses, and differences between methods.

A run's key in a results file names the method, the rung of the ladder of learning rates, and the seed.
"""

import json
import statistics
from pathlib import Path
from typing import Any

FIRST_RATE = 1e-3  # every ladder consists of this rate times powers of two


def key_of(method: str, rung: int, seed: int) -> str:
    """Return the key of a run in a results file."""
    return f"{method}; rung {rung}; seed {seed}"


def losses_by_rung(method: str, runs: dict[str, Any]) -> dict[int, float]:
    """Return the validation losses of a method's first seed by rung, in ascending order."""
    found = {}
    for key, one in runs.items():
        name, rung, seed = key.split("; ")
        if name == method and seed == "seed 0":
            found[int(rung.removeprefix("rung "))] = one["validation"]
    return dict(sorted(found.items()))


def best_rung(method: str, runs: dict[str, Any]) -> int | None:
    """Return the rung with the lowest validation loss on the first seed, or None if there is no run."""
    losses = losses_by_rung(method, runs)
    return min(losses, key=lambda rung: losses[rung]) if losses else None


def losses_on_test_rows(method: str, runs: dict[str, Any]) -> dict[int, float]:
    """Return the test losses of a method at its best rung, by seed."""
    best, found = best_rung(method, runs), {}
    for key, one in runs.items():
        name, rung, seed = key.split("; ")
        if best is not None and (name, rung) == (method, f"rung {best}"):
            found[int(seed.removeprefix("seed "))] = one["test"]
    return found


def paired_difference(method: str, other: str, runs: dict[str, Any]) -> tuple[float, float | None]:
    """Return the mean difference in test loss by seed, and its standard error, or None for a single seed.

    Raises ValueError if the two methods have no seed in common.
    """
    ours, theirs = losses_on_test_rows(method, runs), losses_on_test_rows(other, runs)
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        raise ValueError(f"{method} and {other} have no seed in common")
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return statistics.mean(differences), error


def read_runs(results: Path) -> dict[str, Any]:
    """Return the runs of a results file, or none if there is no such file."""
    return json.loads(results.read_text(encoding="utf-8"))["figures"]["runs"] if results.is_file() else {}
