"""What runs of quality.py have come to: their keys in results, which learning rate is best, and that as cells."""

import re
import statistics

from benchmarks.tables.render import TableError

LAYERS = {"stories260k-hf": 5, "model": 30}  # of the models by their folders, of which `model` is SmolLM2's
SHOWN = {
    "embed and head": "embeddings and head",
    "one block": "one block at a time",
    "full one pass": "full, one pass (`lisa_adamw`)",
    "lisa auto": "LISA, as many layers as the states of two in 32 bits take",
    "galore r16": "GaLore r16",
    "apollo r16": "APOLLO r16",
    "lisa modules": "LISA, modules in the place of layers",
    "lisa in lora's memory": "LISA, as many layers as fit LoRA's peak and a tenth",
    "lisa in lora's, embed frozen": "LISA, as many as fit it with embed frozen",
    "lisa at lora's peak, embed frozen": "LISA, as many as fit LoRA's own peak with embed frozen",
}


def method_name(method: str) -> str:
    """A method of quality.py as the pages call it."""
    if lisa := re.fullmatch(r"lisa (\d+),? ?(.*)", method):
        return f"LISA, gamma {lisa[1]}, {lisa[2] or 'uniform'}"
    return SHOWN.get(method, method).replace("lora", "LoRA").replace("fixed ", "fixed layers, gamma ")


def layers_that_train(method: str, figures: dict) -> str:
    """The decoder layers that a method trains at a time, of those of its model, as "2 of 5"; of LoRA its adapters."""
    num_layers = LAYERS.get(figures["settings"].get("model"), "all")
    if method.startswith("lora"):
        return "adapters"
    if method.startswith(("full", "galore", "apollo")):
        return f"{num_layers} of {num_layers}" if num_layers != "all" else "all"
    if method == "one block":
        return f"1 of {num_layers}, or none"
    named = re.search(r"(?:lisa|fixed|modules) (\d+)", method)
    planned = [run["layers"] for run in runs_at_best(method, figures["runs"]) if run.get("layers")]
    count = int(named[1]) if named else 0 if method == "embed and head" else planned[0] if planned else 2
    if "modules" in method:  # named by how many of SmolLM2's layers have as many parameters
        return f"modules of {count * num_layers // 30 if named else count} of {num_layers}"
    shown = f"{count} of {num_layers}"
    if method.endswith(", adapters"):
        return f"{shown}, adapters"
    is_full = count == num_layers and "embed frozen" not in method
    return f"{shown}: full training with small states" if is_full else shown


def quality_key(method: str, lr: float, seed: int) -> str:
    """The key of a run of quality.py."""
    return f"{method}, {lr:g}, seed {seed}"


def losses_by_rate(method: str, runs: dict) -> dict[float, float]:
    """Held-out loss of the first seed by learning rate, ascending."""
    found = {}
    for key, run in runs.items():
        name, lr, seed = key.rsplit(", ", 2)
        if name == method and seed == "seed 0":
            found[float(lr)] = run["held_out"]
    return dict(sorted(found.items()))


def best_rate(method: str, runs: dict) -> float:
    losses = losses_by_rate(method, runs)
    return min(losses, key=losses.get)


def runs_at_best(method: str, runs: dict) -> list[dict]:
    """Every seed at the rate that is best on the first one; none where the method has no runs."""
    if not losses_by_rate(method, runs):
        return []
    begins = quality_key(method, best_rate(method, runs), 0).removesuffix("0")
    return [runs[key] for key in sorted(runs) if key.startswith(begins)]


def spread_of_seeds(losses: list[float]) -> str:
    return f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "one seed"


def outcome(method: str, figures: dict, may_lack: bool = False) -> dict:
    """A method's runs at its best rate, as cells and figures; dashes where it may lack them, else a TableError."""
    runs = figures["runs"]
    found = runs_at_best(method, runs)
    if not found and not may_lack:
        raise TableError(f"the results of quality.py have no run of {method}")
    if not found:
        return {"short": "-", "long": "-", "steps": None, "seeds": 0}
    losses = [run["held_out"] for run in found]
    mean, layers, seeds = statistics.mean(losses), layers_that_train(method, figures), spread_of_seeds(losses)
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ", one seed"
    one_rate = ", one rate" if len(losses_by_rate(method, runs)) == 1 else ""
    costs = {name: [run[name] for run in found if name in run] for name in ("seconds_per_step", "peak_bytes")}
    return {
        "method": method_name(method),
        "layers": layers,
        "rate": best_rate(method, runs),
        "loss": mean,
        "seeds": seeds,
        "short": f"{mean:.3f}{spread}",
        "long": f"{mean:.4f} ({seeds}{one_rate})",
        "right": statistics.mean(run["token_accuracy"] for run in found),
        "steps": statistics.mean(run.get("steps", 0) for run in found),
        "seconds": statistics.median(costs["seconds_per_step"]) if costs["seconds_per_step"] else None,
        "peak": max(costs["peak_bytes"], default=None),
    }
