"""Which method learns most? Held-out loss of each after as many steps of the same rows, its learning rate tuned.

python -m benchmarks.quality.quality --model stories260k-hf --dataset gsm8k/train.jsonl --held_out gsm8k/test.jsonl

Every arm tries as many learning rates on the first seed, a factor of two apart, and more where its best is the lowest
or the highest of them; the best is taken with the other seeds too. A seed is an order of the rows, the same for every
arm, and what an arm draws: layers, or adapters. Losses are of the answers. What is in the results already is not run
again, so a sweep that was cut goes on.

With --same_time_as, an earlier file of results, every arm takes as many steps as fit in the time that full training
takes for its --steps, by the CPU seconds of a step in that file.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import math
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lisa_dist
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_with_data, positive, print_table, write_results
from benchmarks.quality.training import Batch, train
from benchmarks.tables.rows import BASELINES, quality_table
from benchmarks.tables.runs import best_rate, losses_by_rate, quality_key, runs_at_best
from lisa_dist.config import AUTO_LAYERS
from lisa_dist.core.live_bytes import live_tensor_bytes
from lisa_dist.memory.parts import MemoryParts
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.memory.planner import Planner
from lisa_dist.memory.trace import CHUNKED

LISA, EMBED_AND_HEAD = {"lisa_activated_layers": 2}, {"lisa_activated_layers": 0}
FROZEN = {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}
WEIGHTED = {"lisa_sampler": "weighted"}  # and "weights", of a layer by its number from 0
BADAM = {"lisa_always_on": "", "lisa_frozen": "embed,head,rest", "lisa_activated_layers": 1}
ONE_PASS, BF16 = {"optim": "lisa_adamw"}, {"dtype": torch.bfloat16}
FACTORED = {"lisa_state_bits": "embed=factored,head=factored"}
SMALL = {"lisa_state_bits": "embed=factored,head=factored,layers=8"}
BALANCED = {"lisa_sampler": "balanced"}
IN_LORA_S = {"lisa_activated_layers": AUTO_LAYERS, "memory_of": "lora"} | ONE_PASS | SMALL
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
    # Smaller states and frozen layers; "optim" and "dtype" are the run's.
    "lisa 2 one pass": ("lisa", LISA | ONE_PASS, 1),
    "lisa 2, 8 bits": ("lisa", LISA | ONE_PASS | {"lisa_state_bits": "embed=8,head=8,layers=8"}, 1),
    "lisa 2, factored": ("lisa", LISA | ONE_PASS | FACTORED, 1),
    "lisa 2 bf16": ("lisa", LISA | ONE_PASS | BF16, 1),
    "lisa 2, frozen 8 bits": ("lisa", LISA | ONE_PASS | BF16 | {"lisa_frozen_bits": 8}, 1),
    "lisa 2, frozen 4 bits": ("lisa", LISA | ONE_PASS | BF16 | {"lisa_frozen_bits": 4}, 1),
    "lisa auto": ("lisa", {"lisa_activated_layers": AUTO_LAYERS} | ONE_PASS | SMALL, 1),
    # As many layers as fit in a tenth more than a step of LoRA takes, rank 16, and which of them.
    "lisa in lora's memory": ("lisa", IN_LORA_S, 1),
    "lisa in lora's, upper more": ("lisa", IN_LORA_S | BALANCED | {"lisa_depth_bias": 1.0}, 1),
    "lisa in lora's, upper most": ("lisa", IN_LORA_S | BALANCED | {"lisa_depth_bias": 4.0}, 1),
    "lisa in lora's, embed frozen": ("lisa", IN_LORA_S | FROZEN | {"lisa_state_bits": "layers=8"}, 1),
    "lisa 2 balanced": ("lisa", LISA | BALANCED, 1),
    "lisa 2 depth 1": ("lisa", LISA | BALANCED | {"lisa_depth_bias": 1.0}, 1),
    "lisa 2 depth 2": ("lisa", LISA | BALANCED | {"lisa_depth_bias": 2.0}, 1),
    "lisa 2 depth 4": ("lisa", LISA | BALANCED | {"lisa_depth_bias": 4.0}, 1),
    "lisa 2 depth 8": ("lisa", LISA | BALANCED | {"lisa_depth_bias": 8.0}, 1),
    "lisa 2 window": ("lisa", LISA | {"lisa_sampler": "window"}, 1),
    "lisa 2, embed and head / 2": ("lisa", LISA | {"lisa_lr_scale": "embed=0.5,head=0.5"}, 1),
    "lisa 3": ("lisa", {"lisa_activated_layers": 3}, 1),
    "lisa 4": ("lisa", {"lisa_activated_layers": 4}, 1),
    "lisa 4 keep": ("lisa", {"lisa_activated_layers": 4, "lisa_state": "keep"}, 1),
    "lisa 2, embed frozen": ("lisa", LISA | FROZEN, 1),
    "lisa 8, embed frozen": ("lisa", {"lisa_activated_layers": 8} | FROZEN, 1),
    "lisa 8": ("lisa", {"lisa_activated_layers": 8}, 1),
}
SETTINGS = ("model", "dataset", "held_out", "steps", "rows", "held_out_rows", "same_time_as")  # of all runs of a file
LENGTH, WARMUP, INTERVAL = 256, 10, 20  # tokens of the longest row; steps in which the rate rises; K


@dataclass(frozen=True)
class Data:
    """Examples: their tokens, and how many of these are the question's."""

    tokenizer: object
    rows: list[tuple[list[int], int]]

    @classmethod
    @functools.cache
    def read(cls, model_path: str, path: str, count: float) -> "Data":
        """The first examples of a file in which something of the answer is left, or with a negative count the last."""
        tokenizer, rows = AutoTokenizer.from_pretrained(model_path), []
        for asked, answered in read_pairs(path):
            question = tokenizer(asked + "\n")["input_ids"]
            answer = [*tokenizer(answered, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            tokens = (question + answer)[:LENGTH]
            if len(tokens) > len(question):
                rows.append((tokens, len(question)))
            if len(rows) == count:
                break
        return cls(tokenizer, rows[int(count) :] if count < 0 else rows)

    def batch(self, places: list[int]) -> Batch:
        """Examples side by side, as wide as the longest; labels are the answers."""
        rows = [self.rows[place] for place in places]
        width = max(len(tokens) for tokens, _ in rows)
        ids = torch.full((len(rows), width), self.tokenizer.eos_token_id)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for at, (tokens, asked) in enumerate(rows):
            ids[at, : len(tokens)], mask[at, : len(tokens)] = torch.tensor(tokens), 1
            labels[at, asked : len(tokens)] = torch.tensor(tokens[asked:])
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def read_pairs(path: str) -> list[tuple[str, str]]:
    """Questions and answers of a .jsonl, or instructions and outputs of a .json in Alpaca's format."""
    text = Path(path).read_text(encoding="utf-8")
    if path.endswith(".jsonl"):
        return [(row["question"], row["answer"]) for row in map(json.loads, text.splitlines())]
    return [("\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in json.loads(text)]


def with_memory_of(other: str, arguments: argparse.Namespace, settings: dict) -> dict:
    """As many layers as two with AdamW's states in 32 bits hold beside activations, or as fit 1.1 times LoRA's peak."""
    config = AutoConfig.from_pretrained(arguments.model)
    asked = PlanArguments(
        arguments.model,
        reserve="0",
        seq_length=LENGTH,
        micro_batch_size=arguments.rows,
        precision="fp32",
        optim="lisa_adamw",
        checkpointed_layers="none",
        loss="chunked",
    )

    def parts(settings: dict, **changes) -> MemoryParts:
        lisa_config = lisa_dist.LisaConfig(**settings)
        return (
            Planner(config, dataclasses.replace(asked, **changes), lisa_config, on_cpu=True)
            .plan("zero2", 0, CHUNKED)
            .gpu
        )

    def taken(parts: MemoryParts) -> int:
        return parts.static + parts.gradients if other == "lisa" else parts.peak

    budget = taken(parts(LISA)) if other == "lisa" else 1.1 * taken(parts({}, method=other, optim="adamw_torch"))
    of_layers = {"lisa_activated_layers": config.num_hidden_layers}
    while taken(parts(settings | of_layers)) > budget:
        of_layers["lisa_activated_layers"] -= 1
    return settings | of_layers


def build(arguments: argparse.Namespace, arm: str, lr: float, seed: int):
    """An engine of an arm, and LISA's controller if it has one."""
    method, settings, _ = ARMS[arm]
    settings = dict(settings)
    dtype = settings.pop("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    common = {"lr": lr, "micro_batch_size": arguments.rows}
    if method == "lisa":
        common["optim"] = settings.pop("optim", "adamw_torch")
        settings = {"lisa_interval_steps": INTERVAL} | settings
        other = settings.pop("memory_of", "lisa")
        if settings.get("lisa_activated_layers") == AUTO_LAYERS:
            settings = with_memory_of(other, arguments, settings)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as weights:
            if weight_of := settings.pop("weights", None):
                json.dump([weight_of(layer) for layer in range(model.config.num_hidden_layers)], weights)
                weights.flush()
                settings["lisa_weights_file"] = weights.name
            return lisa_dist.initialize(model, "zero2", lisa_dist.LisaConfig(lisa_seed=seed, **settings), **common)
    torch.manual_seed(seed)
    if method == "lora":
        more = {"lora_alpha": 2 * settings["r"], "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**more, **settings))
    config = lisa_dist.load_ds_config("zero2", model=model, micro_batch_size=arguments.rows)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = lisa_dist.build_optimizer([{"params": trained, "weight_decay": 0.0}], lr=lr)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    return engine, None


def evaluate(engine, data: Data, rows: int) -> tuple[float, float]:
    """Loss and next-token accuracy over the answers' tokens."""
    engine.eval()
    loss = hits = count = 0.0
    for start in range(0, len(data.rows), rows):
        inputs = data.batch(range(start, min(start + rows, len(data.rows))))
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = engine(**inputs).logits[:, :-1]
        counted = labels != -100
        loss += torch.nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="sum").item()
        hits += (logits[counted].argmax(-1) == labels[counted]).sum().item()
        count += counted.sum().item()
    return loss / count, hits / count


def solved(engine, tokenizer, path: str, count: int) -> float | None:
    """The part of the first questions of a file whose greedy answer ends with the right number."""
    asked = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()[:count]]
    right = 0
    for start in range(0, len(asked), 8):
        some = asked[start : start + 8]
        prompts = [row["question"] + "\n" for row in some]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            answers = engine.module.generate(**inputs, max_new_tokens=200, do_sample=False)
        for tokens, row in zip(answers[:, inputs["input_ids"].shape[1] :], some, strict=True):
            number = re.search(r"####\s*(-?[\d,.]*\d)", tokenizer.decode(tokens, skip_special_tokens=True))
            right += number is not None and number[1].replace(",", "") == row["answer"].split("####")[1].strip()
    return right / len(asked) if asked else None


def run(arguments: argparse.Namespace, arm: str, lr: float, seed: int, steps: int) -> dict:
    """On a rank: train an arm, and measure what it has learned."""
    # Where some arms take more steps than others, the order is one of all rows, so that it begins alike for all.
    needed = math.inf if arguments.same_time_as else arguments.rows * arguments.steps
    data = Data.read(arguments.model, arguments.dataset, needed)
    assert len(data.rows) >= min(needed, 1000), "too few rows"
    if arguments.held_out is None:  # the end of the rows, which are more than are trained on
        held_out = Data.read(arguments.model, arguments.dataset, -arguments.held_out_rows)
        data = Data(data.tokenizer, [row for row in data.rows if row not in held_out.rows])
    else:
        held_out = Data.read(arguments.model, arguments.held_out, arguments.held_out_rows)
    order = random.Random(seed).sample(range(len(data.rows)), len(data.rows))
    places = [[order[at % len(order)] for at in range(step * arguments.rows, (step + 1) * arguments.rows)]
              for step in range(steps)]  # fmt: skip
    batches = list(map(data.batch, places))
    gc.collect()
    of_others = live_tensor_bytes()  # the batches, and what DeepSpeed has left of the runs before
    engine, lisa = build(arguments, arm, lr, seed)
    factor = 1.0 if lisa is None else lisa.config.rate_factor(len(lisa.blocks.layers))
    rates = [
        factor * lr * min(1.0, (step + 1) / WARMUP, 1 - step / steps) for step in range(steps)
    ]  # linear, to nothing
    losses, most, cpu_seconds = [], 0, 0.0
    for part in (slice(2), slice(2, None)):
        started = time.process_time()
        losses += train(engine, lisa, batches[part], rates[part])
        cpu_seconds += time.process_time() - started
        most = max(most, live_tensor_bytes() - of_others)
    if lisa is not None:
        lisa.close()
    exact = contextlib.nullcontext() if lisa is None or lisa.frozen_layers is None else lisa.frozen_layers.exact()
    with exact:  # of the 16-bit model, whatever frozen layers were held in
        held_out_loss, accuracy = evaluate(engine, held_out, arguments.rows)
    found = {
        "held_out": held_out_loss,
        "token_accuracy": accuracy,
        "solved": solved(engine, data.tokenizer, arguments.held_out or arguments.dataset, arguments.questions),
        "train_last_50": statistics.mean(losses[-50:]),
        "steps": steps,
        "cpu_seconds_per_step": cpu_seconds / steps,
        "live_bytes": most,
        "visits": None if lisa is None else lisa.visit_counts,
        "layers": None if lisa is None else lisa.config.lisa_activated_layers,
    }
    engine.destroy()
    return found


def window_of(arm: str, arguments: argparse.Namespace) -> list[float]:
    """As many rates for every arm, a factor of two apart around its own middle."""
    given = dict(words.rsplit("=", 1) for words in arguments.middle)
    middle, count = float(given.get(arm, arguments.rate * ARMS[arm][2])), arguments.num_rates
    return [middle * 2.0 ** (place - (count - 1) // 2) for place in range(count)]


def beyond(arm: str, figures: dict) -> float | None:
    """The rate to try next, where the best one so far has others on one side alone."""
    rates, best = list(losses_by_rate(arm, figures)), best_rate(arm, figures)
    return best / 2 if best == rates[0] else best * 2 if best == rates[-1] else None


def run_all(runs: list, arguments: argparse.Namespace, figures: dict) -> None:
    """Those of `runs` that have no figures yet, on as many processes as `--jobs`; figures are filled in."""
    missing = [one for one in runs if quality_key(*one) not in figures]
    writing = threading.Lock()

    def work(mine: list) -> None:
        with RankGroup(1, Caller) as rank:
            for arm, lr, seed in mine:
                (found,) = rank.call("run", run, arguments, arm, lr, seed, steps_of(arm, arguments))
                with writing:
                    figures[quality_key(arm, lr, seed)] = found
                    write_results(arguments.results, {"settings": settings_of(arguments), "runs": figures}, quiet=True)
                print(arm, lr, seed, found["held_out"], flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(work, filter(None, (missing[job :: arguments.jobs] for job in range(arguments.jobs)))))


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


def plot(arms: list[str], figures: dict, path: Path) -> None:
    """Held-out loss against the learning rate of the first seed, and the best of each arm with all seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_rate, by_arm = figure.subplots(1, 2)
    at_best = {arm: [run["held_out"] for run in runs_at_best(arm, figures)] for arm in arms}
    ranked = sorted(arms, key=lambda arm: -statistics.mean(at_best[arm]))
    for place, arm in enumerate(ranked):
        losses, color = losses_by_rate(arm, figures), f"C{place % 10}"
        dashes = "o-" if place < 10 else "s--"
        by_rate.plot(losses.keys(), losses.values(), dashes, color=color, label=arm)
        by_arm.plot(at_best[arm], [place] * len(at_best[arm]), "o", color=color, alpha=0.5)
        by_arm.plot(statistics.mean(at_best[arm]), place, "|", color=color, markersize=18, markeredgewidth=2)
    rates = sorted({lr for arm in ranked for lr in losses_by_rate(arm, figures)})
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, first seed")
    by_arm.set(xlabel="held-out loss at the best rate: every seed, and their mean", yticks=range(len(ranked)))
    by_arm.set_yticklabels(ranked)
    by_rate.set_xticks(rates, [f"{lr:g}" for lr in rates], rotation=45)
    by_rate.minorticks_off()
    by_rate.legend(fontsize=7, ncols=2, reverse=True)
    for axes in (by_arm, by_rate):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Tune, run the other seeds, print the table and write what came of it."""
    run_on_cpu()
    parser = parser_with_data(__doc__, "quality")
    parser.add_argument("--held_out", help="examples to measure on; by default the last of --dataset")
    parser.add_argument("--held_out_rows", type=positive, default=256)
    parser.add_argument("--questions", type=int, default=0, help="held-out questions to answer, for exact accuracy")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=BASELINES, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--rows", type=positive, default=8, help="of a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="the middle of full training's learning rates")
    parser.add_argument("--middle", nargs="+", default=[], metavar="ARM=RATE", help="the middle of an arm's own rates")
    parser.add_argument("--num_rates", type=positive, default=3)
    parser.add_argument("--more_rates", type=int, default=2, help="that an arm may try where its best is at an end")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--same_time_as", type=Path, help="a file of results of this script, for its seconds of a step")
    parser.add_argument("--jobs", type=positive, default=1, help="processes at a time")
    parser.add_argument("--plot", type=Path, help="draw losses to this .png")
    arguments = parser.parse_args()
    figures = read_figures(arguments)
    run_all([(arm, lr, 0) for arm in arguments.arms for lr in window_of(arm, arguments)], arguments, figures)
    for _ in range(arguments.more_rates):
        further = [(arm, lr, 0) for arm in arguments.arms if (lr := beyond(arm, figures)) is not None]
        run_all(further, arguments, figures)
    best = {arm: best_rate(arm, figures) for arm in arguments.arms}
    run_all([(arm, best[arm], s) for arm in arguments.arms for s in range(1, arguments.seeds)], arguments, figures)
    header, *rows = quality_table({"settings": settings_of(arguments), "runs": figures}, arguments.arms)
    print_table(header, rows)
    if arguments.plot:
        plot(arguments.arms, figures, arguments.plot)


if __name__ == "__main__":
    main()
