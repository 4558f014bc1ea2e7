"""Which method learns most? Held-out loss of each after as many steps of the same rows, its learning rate tuned.

python benchmarks/quality.py --model stories260k-hf --dataset gsm8k/train.jsonl --held_out gsm8k/test.jsonl

Every arm tries as many learning rates on the first seed, a factor of two apart, and more where its best is the lowest
or the highest of them; the best is taken with the other seeds too. A seed is an order of the rows, the same for every
arm, and what an arm draws: layers, or adapters. Losses are of the answers. What is in the results already is not run
again, so a sweep that was cut goes on.

With --same_time_as, an earlier file of results, every arm takes as many steps as fit in the time that full training
takes for its --steps, by the CPU seconds of a step in that file.
"""

import argparse
import gc
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import launch, print_table, worker_parser, write_results

LISA, EMBED_AND_HEAD = {"lisa_activated_layers": 2}, {"lisa_activated_layers": 0}
FROZEN = {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}
WEIGHTED = {"lisa_sampler": "weighted"}  # and "weights", of a layer by its number from 0
BADAM = {"lisa_always_on": "", "lisa_frozen": "embed,head,rest", "lisa_activated_layers": 1}
# Name: method, its settings, and the middle of its learning rates in units of --rate.
ARMS = {
    "full": ("full", {}, 1),
    "lora r8": ("lora", {"r": 8}, 2),
    "lora r16": ("lora", {"r": 16}, 1),
    "lora r32": ("lora", {"r": 32}, 1),
    "lisa 1": ("lisa", {"lisa_activated_layers": 1}, 1),
    "lisa 1 reshuffle": ("lisa", {"lisa_activated_layers": 1, "lisa_sampler": "reshuffle"}, 1),
    "lisa 1 adaptive": ("lisa", {"lisa_activated_layers": 1, "lisa_sampler": "adaptive"}, 1),
    "lisa 2": ("lisa", LISA, 1),
    "lisa 2 reshuffle": ("lisa", LISA | {"lisa_sampler": "reshuffle"}, 1),
    "lisa 2 adaptive": ("lisa", LISA | {"lisa_sampler": "adaptive"}, 1),
    "fixed 2": ("lisa", LISA | {"lisa_sampler": "fixed"}, 1),
    "embed and head": ("lisa", EMBED_AND_HEAD, 4),
    "one block": ("lisa", BADAM | {"lisa_sampler": "reshuffle"}, 1),
    # What may close the gap between LISA and full training.
    "lisa 2 K 5": ("lisa", LISA | {"lisa_interval_steps": 5}, 1),
    "lisa 2 K 50": ("lisa", LISA | {"lisa_interval_steps": 50}, 1),
    "lisa 2 K 100": ("lisa", LISA | {"lisa_interval_steps": 100}, 1),
    "lisa 2 keep": ("lisa", LISA | {"lisa_state": "keep"}, 1),
    "lisa 2 warm-up": ("lisa", LISA | {"lisa_wake_warmup_steps": 10}, 1),
    "lisa 2 sharp": ("lisa", LISA | {"lisa_sampler": "adaptive", "lisa_importance_temperature": 0.2}, 1),
    "lisa 2 keep, warm-up": ("lisa", LISA | {"lisa_state": "keep", "lisa_wake_warmup_steps": 10}, 1),
    "lisa 2 keep, K 5": ("lisa", LISA | {"lisa_state": "keep", "lisa_interval_steps": 5}, 1),
    "lisa 2 keep, K 1": ("lisa", LISA | {"lisa_state": "keep", "lisa_interval_steps": 1}, 1),
    "lisa 2 rate x 1.6": ("lisa", LISA | {"lisa_lr_power": 0.5}, 1),
    "lisa 2 rate / 1.6": ("lisa", LISA | {"lisa_lr_power": -0.5}, 1),
    "lisa 2 upper more": ("lisa", LISA | WEIGHTED | {"weights": lambda layer: layer + 1}, 1),
    "lisa 2 upper most": ("lisa", LISA | WEIGHTED | {"weights": lambda layer: (layer + 1) ** 3}, 1),
    "lisa 2 lower most": ("lisa", LISA | WEIGHTED | {"weights": lambda layer: 1 / (layer + 1) ** 3}, 1),
    "lisa 3": ("lisa", {"lisa_activated_layers": 3}, 1),
    "lisa 4": ("lisa", {"lisa_activated_layers": 4}, 1),
    "lisa 4 keep": ("lisa", {"lisa_activated_layers": 4, "lisa_state": "keep"}, 1),
    "lisa 2, embed frozen": ("lisa", LISA | FROZEN, 1),
    "lisa 8, embed frozen": ("lisa", {"lisa_activated_layers": 8} | FROZEN, 1),
    "lisa 8": ("lisa", {"lisa_activated_layers": 8}, 1),
}
BASELINES = (
    "full",
    "lora r8",
    "lora r32",
    "lisa 1",
    "lisa 1 reshuffle",
    "lisa 1 adaptive",
    "lisa 2",
    "lisa 2 reshuffle",
)
BASELINES = (*BASELINES, "lisa 2 adaptive", "fixed 2", "embed and head", "one block")
SETTINGS = ("model", "dtype", "dataset", "held_out", "steps", "rows", "length", "held_out_rows", "warmup")
SETTINGS = (*SETTINGS, "interval", "same_time_as")  # of all runs of a file


def worker(arguments: argparse.Namespace) -> None:
    """Run what is asked for by `--runs`, a JSON list of (arm, learning rate, seed, steps), one after another."""
    import deepspeed
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lisa_dist
    from lisa_dist.core.live_bytes import live_tensor_bytes

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    end = [tokenizer.eos_token_id]

    def rows_of(path: str, count: int) -> list[tuple[list[int], int]]:
        """Tokens, and how many of them are the question's; rows in which something of the answer is left."""
        rows = []
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            question = tokenizer(row["question"] + "\n")["input_ids"]
            tokens = (question + tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + end)[
                : arguments.length
            ]
            if len(tokens) > len(question):
                rows.append((tokens, len(question)))
            if len(rows) == count:
                break
        return rows

    runs = json.loads(arguments.runs)
    # Where some arms take more steps than others, the order is one of all rows, so that it begins alike for all.
    needed = math.inf if arguments.all_rows else arguments.rows * arguments.steps
    train, held_out = rows_of(arguments.dataset, needed), rows_of(arguments.held_out, arguments.held_out_rows)
    assert len(train) >= min(needed, 1000), "too few rows"

    def batch(rows: list) -> dict[str, torch.Tensor]:
        width = max(len(tokens) for tokens, _ in rows)
        ids = torch.full((len(rows), width), tokenizer.eos_token_id)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for at, (tokens, asked) in enumerate(rows):
            ids[at, : len(tokens)], mask[at, : len(tokens)] = torch.tensor(tokens), 1
            labels[at, asked : len(tokens)] = torch.tensor(tokens[asked:])
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def build(method: str, settings: dict, lr: float, seed: int):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
        common = {"lr": lr, "micro_batch_size": arguments.rows}
        if method == "lisa":
            settings = {"lisa_interval_steps": arguments.interval} | settings
            if weight_of := settings.pop("weights", None):
                settings["lisa_weights_file"] = f"{arguments.folder}.weights"
                weights = [weight_of(layer) for layer in range(model.config.num_hidden_layers)]
                Path(settings["lisa_weights_file"]).write_text(json.dumps(weights))
            return lisa_dist.initialize(model, "zero2", lisa_dist.LisaConfig(lisa_seed=seed, **settings), **common)
        torch.manual_seed(seed)
        if method == "lora":
            adapters = LoraConfig(
                lora_alpha=2 * settings["r"], target_modules="all-linear", task_type="CAUSAL_LM", **settings
            )
            model = get_peft_model(model, adapters)
        config = lisa_dist.load_ds_config("zero2", model=model, micro_batch_size=arguments.rows)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = lisa_dist.build_optimizer([{"params": trained, "weight_decay": 0.0}], lr=lr)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.train()
        return engine, None

    def evaluate(engine) -> tuple[float, float]:
        """Loss and next-token accuracy over the answers' tokens."""
        engine.eval()
        loss = hits = count = 0.0
        for start in range(0, len(held_out), arguments.rows):
            inputs = batch(held_out[start : start + arguments.rows])
            with torch.no_grad():
                logits = engine(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            labels = inputs["labels"][:, 1:]
            counted = labels != -100
            loss += torch.nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="sum").item()
            hits += (logits[counted].argmax(-1) == labels[counted]).sum().item()
            count += counted.sum().item()
        engine.train()
        return loss / count, hits / count

    def solved(engine) -> float | None:
        """The part of held-out questions whose greedy answer ends with the right number."""
        asked = [json.loads(line) for line in Path(arguments.held_out).read_text(encoding="utf-8").splitlines()]
        right, asked = 0, asked[: arguments.questions]
        engine.eval()
        for start in range(0, len(asked), 8):
            some = asked[start : start + 8]
            prompts = [row["question"] + "\n" for row in some]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
            with torch.no_grad():
                told = engine.module.generate(**inputs, max_new_tokens=200, do_sample=False)
            for tokens, row in zip(told[:, inputs["input_ids"].shape[1] :], some, strict=True):
                number = re.search(r"####\s*(-?[\d,.]*\d)", tokenizer.decode(tokens, skip_special_tokens=True))
                right += number is not None and number[1].replace(",", "") == row["answer"].split("####")[1].strip()
        engine.train()
        return right / len(asked) if asked else None

    def run(arm: str, lr: float, seed: int, steps: int) -> dict:
        method, settings, _ = ARMS[arm]
        order = random.Random(seed).sample(range(len(train)), len(train))
        gc.collect()
        of_others = live_tensor_bytes()  # what DeepSpeed has left of the runs before
        engine, lisa = build(method, settings, lr, seed)
        factor = 1.0 if lisa is None else lisa.config.rate_factor(len(lisa.blocks.layers))
        losses, cpu_seconds, most = [], 0.0, 0
        for step in range(steps):
            warm = min(1.0, (step + 1) / arguments.warmup)
            for group in engine.optimizer.param_groups:
                group["lr"] = factor * lr * min(warm, 1 - step / steps)  # linear, to nothing
            inputs = batch(
                [train[order[at % len(order)]] for at in range(step * arguments.rows, (step + 1) * arguments.rows)]
            )
            started = time.process_time()
            if lisa is not None:
                lisa.on_step_begin()
            loss = engine(**inputs).loss
            engine.backward(loss)
            engine.step()
            cpu_seconds += time.process_time() - started
            losses.append(loss.item())
            if step in (1, steps - 1):
                most = max(most, live_tensor_bytes() - of_others)
        if lisa is not None:
            lisa.close()
        held_out_loss, accuracy = evaluate(engine)
        exact = solved(engine)
        visits = None if lisa is None else lisa.visit_counts
        engine.destroy()
        return {
            "held_out": held_out_loss,
            "token_accuracy": accuracy,
            "solved": exact,
            "train_last_50": statistics.mean(losses[-50:]),
            "steps": steps,
            "cpu_seconds_per_step": cpu_seconds / steps,
            "live_bytes": most,
            "visits": visits,
        }

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    path = Path(arguments.folder)
    figures = {}
    for arm, lr, seed, steps in runs:
        figures[key_of(arm, lr, seed)] = found = run(arm, lr, seed, steps)
        path.write_text(json.dumps(figures))
        print(arm, lr, seed, found["held_out"], flush=True)


def key_of(arm: str, lr: float, seed: int) -> str:
    return f"{arm}, {lr:g}, seed {seed}"


def window_of(arm: str, arguments: argparse.Namespace) -> list[float]:
    """As many rates for every arm, a factor of two apart around its own middle."""
    given = dict(words.rsplit("=", 1) for words in arguments.middle)
    middle, count = float(given.get(arm, arguments.rate * ARMS[arm][2])), arguments.num_rates
    return [middle * 2.0 ** (place - (count - 1) // 2) for place in range(count)]


def tried(arm: str, figures: dict) -> dict[float, float]:
    """Held-out loss of the first seed by learning rate, ascending."""
    found = {}
    for key, run in figures.items():
        name, lr, seed = key.rsplit(", ", 2)
        if name == arm and seed == "seed 0":
            found[float(lr)] = run["held_out"]
    return dict(sorted(found.items()))


def best_rate(arm: str, figures: dict) -> float:
    losses = tried(arm, figures)
    return min(losses, key=losses.get)


def beyond(arm: str, figures: dict) -> float | None:
    """The rate to try next, where the best one so far has others on one side alone."""
    rates, best = list(tried(arm, figures)), best_rate(arm, figures)
    return best / 2 if best == rates[0] else best * 2 if best == rates[-1] else None


def run_all(runs: list, arguments: argparse.Namespace, figures: dict) -> None:
    """Those of `runs` that have no figures yet, on as many processes as `--jobs`; figures are filled in."""
    missing = [run for run in runs if key_of(*run) not in figures]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        started = []
        for job in range(arguments.jobs):
            if mine := missing[job :: arguments.jobs]:
                given = {name: getattr(arguments, name) for name in (*SETTINGS, "questions") if name != "same_time_as"}
                words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
                words += ["--all_rows"] if arguments.same_time_as else []
                with_steps = [(*run, steps_of(run[0], arguments)) for run in mine]
                words += ["--folder", f"{folder}/{job}.json", "--runs", json.dumps(with_steps)]
                started.append(pool.submit(launch, Path(__file__), words, 1))
        try:
            for job in started:
                job.result()
        finally:
            for path in Path(folder).glob("*.json"):
                figures |= json.loads(path.read_text())
            write_results(arguments.results, {"settings": settings_of(arguments), "runs": figures})


def steps_of(arm: str, arguments: argparse.Namespace) -> int:
    """The steps of an arm: --steps, or with --same_time_as those that take as long as --steps of full training."""
    if arguments.same_time_as is None:
        return arguments.steps
    runs = json.loads(arguments.same_time_as.read_text())["figures"]["runs"]

    def seconds(of: str) -> float:
        found = [run["cpu_seconds_per_step"] for key, run in runs.items() if key.rsplit(", ", 2)[0] == of]
        if not found:
            sys.exit(f"--same_time_as {arguments.same_time_as}: has no run of {of}.")
        return statistics.median(found)

    return round(arguments.steps * seconds("full") / seconds(arm))


def settings_of(arguments: argparse.Namespace) -> dict:
    """What all runs of a file have in common; of files their names, wherever they lie."""
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    paths = ("model", "dataset", "held_out", "same_time_as")
    return settings | {name: Path(settings[name]).name for name in paths if settings[name] is not None}


def read_figures(arguments: argparse.Namespace) -> dict:
    """The runs that are in the results already; they must be of the same settings."""
    if not arguments.results.is_file():
        return {}
    held = json.loads(arguments.results.read_text())["figures"]
    asked = settings_of(arguments)
    other = [f"{name} {held['settings'].get(name)}" for name in SETTINGS if held["settings"].get(name) != asked[name]]
    if other:
        sys.exit(f"{arguments.results} has runs with {', '.join(other)}: give other --results.")
    return held["runs"]


def runs_of(arm: str, arguments: argparse.Namespace, figures: dict) -> list[dict]:
    """At the best rate, every seed."""
    lr = best_rate(arm, figures)
    return [figures[key_of(arm, lr, seed)] for seed in range(arguments.seeds)]


def mean_of(arm: str, arguments: argparse.Namespace, figures: dict) -> float:
    return statistics.mean(run["held_out"] for run in runs_of(arm, arguments, figures))


def solved_by(runs: list[dict]) -> str:
    """The part of questions that was answered rightly; runs may have been asked none."""
    asked = [run["solved"] for run in runs if run["solved"] is not None]
    return f"{100 * statistics.mean(asked):.1f}%" if asked else "-"


def table_of(arguments: argparse.Namespace, figures: dict) -> list[list[str]]:
    rows = []
    for arm in sorted(arguments.arms, key=lambda arm: mean_of(arm, arguments, figures)):
        found = runs_of(arm, arguments, figures)
        losses = [run["held_out"] for run in found]
        rows.append(
            [
                arm,
                f"{best_rate(arm, figures):g} of {len(tried(arm, figures))}",
                f"{statistics.mean(losses):.4f}",
                f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-",
                f"{100 * statistics.mean(run['token_accuracy'] for run in found):.1f}%",
                f"{steps_of(arm, arguments)}",
                *([solved_by(found)] if arguments.questions else []),
                f"{statistics.median(run['cpu_seconds_per_step'] for run in found):.3f}",
                f"{found[0]['live_bytes'] / 1e6:.1f}",
            ]
        )
    return rows


def plot(arguments: argparse.Namespace, figures: dict) -> None:
    """Held-out loss against the learning rate of the first seed, and the best of each arm with all seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_rate, by_arm = figure.subplots(1, 2)
    ranked = sorted(arguments.arms, key=lambda arm: -mean_of(arm, arguments, figures))
    for place, arm in enumerate(ranked):
        losses, color = tried(arm, figures), f"C{place % 10}"
        dashes = "o-" if place < 10 else "s--"
        by_rate.plot(losses.keys(), losses.values(), dashes, color=color, label=arm)
        of_seeds = [run["held_out"] for run in runs_of(arm, arguments, figures)]
        by_arm.plot(of_seeds, [place] * len(of_seeds), "o", color=color, alpha=0.5)
        by_arm.plot(statistics.mean(of_seeds), place, "|", color=color, markersize=18, markeredgewidth=2)
    rates = sorted({lr for arm in ranked for lr in tried(arm, figures)})
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, first seed")
    by_arm.set(xlabel="held-out loss at the best rate: every seed, and their mean", yticks=range(len(ranked)))
    by_arm.set_yticklabels(ranked)
    by_rate.set_xticks(rates, [f"{lr:g}" for lr in rates], rotation=45)
    by_rate.minorticks_off()
    by_rate.legend(fontsize=7, ncols=2, reverse=True)
    by_arm.grid(alpha=0.3)
    by_rate.grid(alpha=0.3)
    figure.savefig(arguments.results.with_suffix(".png"), dpi=120)


def main() -> None:
    """Tune, run the other seeds, print the table and write what came of it."""
    parser = worker_parser(__doc__.splitlines()[0], "quality.json")
    parser.add_argument("--dataset", required=True, help="question/answer rows to train on, .jsonl")
    parser.add_argument("--held_out", required=True, help="question/answer rows to measure on, .jsonl")
    parser.add_argument("--held_out_rows", type=int, default=256)
    parser.add_argument("--questions", type=int, default=0, help="held-out questions to answer, for exact accuracy")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=BASELINES, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest row")
    parser.add_argument("--warmup", type=int, default=10, help="steps in which the rate rises")
    parser.add_argument("--interval", type=int, default=20, help="K, where an arm has none of its own")
    parser.add_argument("--rate", type=float, default=4e-3, help="the middle of full training's learning rates")
    parser.add_argument("--middle", nargs="+", default=[], metavar="ARM=RATE", help="the middle of an arm's own rates")
    parser.add_argument("--num_rates", type=int, default=3)
    parser.add_argument("--more_rates", type=int, default=2, help="that an arm may try where its best is at an end")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--same_time_as", type=Path, help="a file of results of this script, for its seconds of a step")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--all_rows", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        worker(arguments)
        return
    figures = read_figures(arguments)
    run_all([(arm, lr, 0) for arm in arguments.arms for lr in window_of(arm, arguments)], arguments, figures)
    for _ in range(arguments.more_rates):
        further = [(arm, lr, 0) for arm in arguments.arms if (lr := beyond(arm, figures)) is not None]
        run_all(further, arguments, figures)
    best = {arm: best_rate(arm, figures) for arm in arguments.arms}
    run_all(
        [(arm, best[arm], seed) for arm in arguments.arms for seed in range(1, arguments.seeds)], arguments, figures
    )
    solved = ["solved"] if arguments.questions else []
    print_table(
        ["arm", "rate, of tried", "held out", "spread", "tokens right", *solved, "steps", "CPU s/step", "live MB"],
        table_of(arguments, figures),
    )
    plot(arguments, figures)


if __name__ == "__main__":
    main()
