"""Which gamma, K, learning rate and policies? Held-out loss on real data after as many steps of each, every seed apart.

python -m benchmarks.quality.choosing --model stories260k-hf --dataset gsm8k/train.jsonl

All arms take the same rows in the same order from the same weights; seeds change which layers are sampled. What is in
the results already is not run again, so a sweep that was cut goes on.
"""

import itertools
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lisa_dist
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_with_data, positive, write_results
from benchmarks.quality.training import held_out_losses, padded, read_tokens, train
from benchmarks.tables.declared import show
from benchmarks.tables.rows import choosing_key

HELD_OUT, ROWS, LENGTH = 128, 16, 128  # rows, rows of a step, tokens of a row
RATE = 2e-3  # where it is not what is asked
GAMMAS, RATES, INTERVALS = (1, 2, 3, 5), (1e-3, 2e-3, 4e-3), (1, 5, 20, 100)
SAMPLERS, STATES = ("uniform", "reshuffle", "cyclic", "fixed"), ("reset", "reset_all", "keep")
# A learning rate, and settings of LISA that are not the defaults.
ARMS = (
    *({"lr": lr, "lisa_activated_layers": gamma} for gamma, lr in itertools.product(GAMMAS, RATES)),
    *({"lr": RATE, "lisa_interval_steps": interval} for interval in INTERVALS),
    *({"lr": RATE, "lisa_sampler": sampler} for sampler in SAMPLERS),
    {"lr": RATE, "lisa_always_on": "rest"},
    {"lr": RATE, "lisa_always_on": "rest", "lisa_frozen": "embed,head"},
    *({"lr": RATE, "lisa_state": state} for state in STATES),
)


def run(model_path: str, dataset: str, steps: int, arm: dict, seed: int) -> dict:
    """On a rank: train an arm; its losses and seconds of a step."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokens = read_tokens(tokenizer, dataset, ROWS * steps + HELD_OUT, LENGTH)
    ids, labels = padded(tokens, LENGTH, tokenizer.eos_token_id or 0), padded(tokens, LENGTH, -100)
    batches = [{"input_ids": ids[at : at + ROWS], "labels": labels[at : at + ROWS]} for at in range(0, len(ids), ROWS)]
    held_out, batches = batches[: HELD_OUT // ROWS], batches[HELD_OUT // ROWS :]
    settings = dict(arm)
    lr = settings.pop("lr")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config = lisa_dist.LisaConfig(lisa_seed=seed, **settings)
    engine, lisa = lisa_dist.initialize(model, "zero2", config, lr=lr, micro_batch_size=ROWS)
    started = time.perf_counter()
    losses = train(engine, lisa, batches, [lr * (1 - step / steps) for step in range(steps)])  # linear, to nothing
    seconds = (time.perf_counter() - started) / steps
    lisa.close()
    visited = sum(count > 0 for count in lisa.visit_counts)
    found = {"losses": losses, "held_out": statistics.mean(held_out_losses(engine, held_out)), "seconds": seconds}
    engine.destroy()
    return found | {"layers_visited": visited}


def main() -> None:
    """Run every arm; print the tables and write what came of it."""
    run_on_cpu()
    parser = parser_with_data(__doc__, "choosing")
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--seeds", type=positive, default=2)
    arguments = parser.parse_args()
    done = json.loads(arguments.results.read_text())["figures"] if arguments.results.is_file() else {}
    with RankGroup(1, Caller) as rank:
        for arm, seed in itertools.product(ARMS, range(arguments.seeds)):
            key = choosing_key(arm, seed)
            if key not in done:
                words = (arguments.model, arguments.dataset, arguments.steps, arm, seed)
                done[key] = rank.call("run", run, *words)[0]
                write_results(arguments.results, done, quiet=True)
                print(key, done[key]["held_out"], flush=True)
    show("choosing", done)


if __name__ == "__main__":
    main()
