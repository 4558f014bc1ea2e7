"""Which gamma, K, learning rate and policies? Held-out loss on real data after as many steps of each, every seed apart.

python benchmarks/choosing.py --model stories260k-hf --dataset gsm8k/train.jsonl

All arms take the same rows in the same order from the same weights; seeds change which layers are drawn. What is in the
results already is not run again, so a sweep that was cut goes on.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from bench import launch, print_table, worker_parser, write_results

HELD_OUT = 128  # rows


def arms(arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Of each question the arms: a learning rate, and settings of LISA beside the defaults."""
    rate, deepest = arguments.rate, arguments.gammas[-1]
    policies = [{}, {"lisa_always_on": "rest"}, {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}]
    samplers = ("uniform", "reshuffle", "cyclic", "fixed")
    return {
        "gamma": [
            {"lr": lr, "lisa_activated_layers": gamma}
            for gamma, lr in itertools.product(arguments.gammas, arguments.rates)
        ],
        "K": [{"lr": rate, "lisa_interval_steps": interval} for interval in arguments.intervals],
        "sampler": [{"lr": rate, "lisa_sampler": sampler} for sampler in samplers[: 4 if deepest > 2 else 1]],
        "policy": [{"lr": rate} | policy for policy in policies],
        "state": [{"lr": rate, "lisa_state": state} for state in ("reset", "reset_all", "keep")],
    }


DEFAULTS = {
    "lisa_activated_layers": 2,
    "lisa_interval_steps": 20,
    "lisa_sampler": "uniform",
    "lisa_state": "reset",
}


def key_of(arm: dict, seed: int) -> str:
    """The name of a run: arms that say the same are one."""
    told = {name: value for name, value in arm.items() if DEFAULTS.get(name) != value}
    return json.dumps(told | {"seed": seed}, sort_keys=True)


def worker(arguments: argparse.Namespace) -> None:
    """Run one rank's share of every arm that has no figures yet."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lisa_dist

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lines = Path(arguments.dataset).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: arguments.rows * arguments.steps + HELD_OUT]]
    tokens = [tokenizer(f"{row['question']} {row['answer']}")["input_ids"][: arguments.length] for row in rows]

    def padded(value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (arguments.length - len(row)) for row in tokens])

    ids, labels = padded(tokenizer.eos_token_id or 0), padded(-100)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    path = Path(arguments.folder, "figures.json")
    figures = json.loads(path.read_text())

    def run(lr: float, seed: int, settings: dict) -> dict:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
        config = lisa_dist.LisaConfig(lisa_seed=seed, **settings)
        engine, lisa = lisa_dist.initialize(model, "zero2", config, lr=lr, micro_batch_size=arguments.rows)
        losses, started = [], time.perf_counter()
        for step in range(arguments.steps):
            for group in engine.optimizer.param_groups:  # linear, to nothing
                group["lr"] = lr * (1 - step / arguments.steps)
            lisa.on_step_begin()
            at = slice(HELD_OUT + step * arguments.rows, HELD_OUT + (step + 1) * arguments.rows)
            loss = engine(input_ids=ids[at], labels=labels[at]).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        seconds = (time.perf_counter() - started) / arguments.steps
        lisa.close()
        engine.eval()
        held_out = []
        with torch.no_grad():
            for start in range(0, HELD_OUT, arguments.rows):
                at = slice(start, start + arguments.rows)
                held_out.append(engine(input_ids=ids[at], labels=labels[at]).loss.item())
        visited = sum(count > 0 for count in lisa.visit_counts)
        engine.destroy()
        return {"losses": losses, "held_out": statistics.mean(held_out), "seconds": seconds, "layers_visited": visited}

    for arm in [arm for of_question in arms(arguments).values() for arm in of_question]:
        for seed in range(arguments.seeds):
            key = key_of(arm, seed)
            if key not in figures:
                settings = {name: value for name, value in arm.items() if name != "lr"}
                figures[key] = run(arm["lr"], seed, settings)
                path.write_text(json.dumps(figures))
                print(key, figures[key]["held_out"], flush=True)


def main() -> None:
    """Run every arm; print a table for each question and write what came of it."""
    parser = worker_parser(__doc__.splitlines()[0], "choosing.json")
    parser.add_argument("--dataset", required=True, help="question/answer rows, .jsonl")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--gammas", type=int, nargs="+", default=[1, 2, 3, 5], help="the last: all layers")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--intervals", type=int, nargs="+", default=[1, 5, 20, 50, 100])
    parser.add_argument("--rate", type=float, default=1e-3, help="where it is not what is asked")
    arguments = parser.parse_args()
    if arguments.folder:
        worker(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        done = json.loads(arguments.results.read_text())["figures"] if arguments.results.is_file() else {}
        kept = Path(folder, "figures.json")
        kept.write_text(json.dumps(done))
        flags = vars(arguments) | {"folder": folder}
        words = [
            word
            for name, value in flags.items()
            if name not in ("results", "local_rank")
            for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
        ]
        try:
            launch(Path(__file__), words, 1)
        finally:
            write_results(arguments.results, json.loads(kept.read_text()))
    figures = json.loads(arguments.results.read_text())["figures"]
    for question, of_question in arms(arguments).items():
        rows = []
        for arm in of_question:
            found = [figures[key_of(arm, seed)] for seed in range(arguments.seeds)]
            ends, losses = [run["held_out"] for run in found], [statistics.mean(run["losses"][-20:]) for run in found]
            settings = ", ".join(f"{name.removeprefix('lisa_')} {value}" for name, value in arm.items())
            visited = "/".join(str(run["layers_visited"]) for run in found)
            seconds = statistics.median(run["seconds"] for run in found)
            spread = max(ends) - min(ends)
            rows.append([settings, f"{statistics.mean(ends):.4f}", f"{spread:.4f}", f"{statistics.mean(losses):.4f}"])
            rows[-1] += [visited, f"{seconds:.3f}"]
        print(f"\n{question}")
        print_table(["arm", "held out", "between seeds", "last 20 steps", "layers visited", "s/step"], rows)


if __name__ == "__main__":
    main()
