"""Which gamma, learning rate, sampler and policies? Held-out loss on real data after equal steps, every seed apart.

python -m benchmarks.quality.choosing --model stories260k-hf --dataset gsm8k/train.jsonl

All methods take the same rows in the same order from the same weights; seeds change which layers are sampled. What is
in the results already is not run again.
"""

import itertools
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lisa_dist
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, positive, write_results
from benchmarks.quality.training import on_device, read_pairs, train
from benchmarks.tables.rows import choosing_key, show

HELD_OUT, ROWS, LENGTH = 128, 16, 128  # rows, rows of a step, tokens of a row
RATE = 2e-3  # where it is not what is asked
GAMMAS, RATES, SAMPLERS = (1, 2, 3, 5), (1e-3, 2e-3, 4e-3), ("uniform", "reshuffle", "fixed")
# A learning rate, and settings of LISA that are not the defaults.
METHODS = (
    *({"lr": lr, "lisa_activated_layers": gamma} for gamma, lr in itertools.product(GAMMAS, RATES)),
    *({"lr": RATE, "lisa_sampler": sampler} for sampler in SAMPLERS),
    {"lr": RATE, "lisa_always_on": "rest"},
    {"lr": RATE, "lisa_always_on": "rest", "lisa_frozen": "embed,head"},
)


def run(model_path: str, dataset: str, steps: int, method: dict, seed: int) -> dict:
    """On a rank: train a method; its losses and seconds of a step."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    texts = [f"{question} {answer}" for question, answer in read_pairs(dataset)[: ROWS * steps + HELD_OUT]]
    rows = [tokenizer(text)["input_ids"][:LENGTH] for text in texts]
    ids = torch.tensor([row + [tokenizer.eos_token_id or 0] * (LENGTH - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (LENGTH - len(row)) for row in rows])
    batches = [{"input_ids": ids[at : at + ROWS], "labels": labels[at : at + ROWS]} for at in range(0, len(ids), ROWS)]
    held_out, batches = batches[: HELD_OUT // ROWS], batches[HELD_OUT // ROWS :]
    settings = dict(method)
    lr = settings.pop("lr")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config = lisa_dist.LisaConfig(lisa_seed=seed, **settings)
    engine, lisa = lisa_dist.initialize(model, "zero2", config, lr=lr, micro_batch_size=ROWS)
    started = time.perf_counter()
    losses = train(engine, lisa, batches, [lr * (1 - step / steps) for step in range(steps)])  # linear, to nothing
    seconds = (time.perf_counter() - started) / steps
    lisa.close()
    visited = sum(count > 0 for count in lisa.visit_counts)
    engine.eval()
    with torch.no_grad():
        after = [engine(**on_device(engine, inputs)).loss.item() for inputs in held_out]
    engine.destroy()
    return {"losses": losses, "held_out": statistics.mean(after), "seconds": seconds, "layers_visited": visited}


def main() -> None:
    """Run every method; print the tables and write what came of it."""
    run_on_cpu()
    parser = parser_of(__doc__, "choosing", with_data=True)
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--seeds", type=positive, default=2)
    arguments = parser.parse_args()
    done = json.loads(arguments.results.read_text())["figures"] if arguments.results.is_file() else {}
    with RankGroup(1, Caller) as rank:
        for method, seed in itertools.product(METHODS, range(arguments.seeds)):
            key = choosing_key(method, seed)
            if key not in done:
                words = (arguments.model, arguments.dataset, arguments.steps, method, seed)
                done[key] = rank.call("run", run, *words)[0]
                write_results(arguments.results, done, quiet=True)
                print(key, done[key]["held_out"], flush=True)
    show("choosing", done)


if __name__ == "__main__":
    main()
