"""Runs of quality.py and choosing.py in their results: their keys, and which learning rate is best."""

import json
import statistics

DEFAULTS = {
    "lisa_activated_layers": 2,
    "lisa_interval_steps": 20,
    "lisa_sampler": "uniform",
    "lisa_state": "reset",
}


def choosing_key(arm: dict, seed: int) -> str:
    """The key of a run of choosing.py: arms with the same settings are one."""
    settings = {name: value for name, value in arm.items() if DEFAULTS.get(name) != value}
    return json.dumps(settings | {"seed": seed}, sort_keys=True)


def quality_key(arm: str, lr: float, seed: int) -> str:
    """The key of a run of quality.py."""
    return f"{arm}, {lr:g}, seed {seed}"


def losses_by_rate(arm: str, runs: dict) -> dict[float, float]:
    """Held-out loss of the first seed by learning rate, ascending."""
    found = {}
    for key, run in runs.items():
        name, lr, seed = key.rsplit(", ", 2)
        if name == arm and seed == "seed 0":
            found[float(lr)] = run["held_out"]
    return dict(sorted(found.items()))


def best_rate(arm: str, runs: dict) -> float:
    losses = losses_by_rate(arm, runs)
    return min(losses, key=losses.get)


def runs_at_best(arm: str, runs: dict) -> list[dict]:
    """Every seed at the rate that is best on the first one; none where the arm has no runs."""
    if not losses_by_rate(arm, runs):
        return []
    begins = quality_key(arm, best_rate(arm, runs), 0).removesuffix("0")
    return [runs[key] for key in sorted(runs) if key.startswith(begins)]


def solved_by(runs: list[dict]) -> str:
    """The part of questions that was answered rightly; runs may have been asked none."""
    asked = [run["solved"] for run in runs if run["solved"] is not None]
    return f"{100 * statistics.mean(asked):.1f}%" if asked else "-"
