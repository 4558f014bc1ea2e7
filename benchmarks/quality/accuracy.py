"""Do losses become answers? Loss and accuracy of greedy answers after training in bf16, with its standard error.

python -m benchmarks.quality.accuracy --model MODEL --dataset gsm8k/train.jsonl --held_out gsm8k/test.jsonl \\
    --rates full=1e-4 "lora r16=2e-3" "lisa 5, small=4e-4" "lisa 4, adapters=1e-4"
python -m benchmarks.quality.accuracy --model MODEL --dataset alpaca/p3_sample.json --longest 6 --rates ...

An answer is right where its last word is that of the example: a number, or a choice. Of one file --answers examples are
held out. Where there are fewer than --examples they come again. What is in the results already is not run again.
"""

import argparse
import itertools
import json
import math
import random

import torch

from benchmarks.common.methods import METHODS
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, positive, write_results
from benchmarks.quality.engines import build
from benchmarks.quality.training import LENGTH, Data, evaluate, train
from benchmarks.tables.outcomes import quality_key

WARMUP = 10  # steps
ANSWERED = 25  # questions at a time


def run(arguments: argparse.Namespace, method: str, lr: float, seed: int) -> dict:
    """On a rank: train on so many examples, then answer."""
    data, held_out = read(arguments)
    steps = arguments.examples // arguments.rows
    batches = map(data.batch, places(data, arguments.rows, steps, random.Random(seed)))
    rates = (lr * min(1.0, (step + 1) / WARMUP, 1 - step / steps) for step in range(steps))
    engine, lisa = build(arguments, method, lr, seed, bf16=True)
    train(engine, lisa, batches, rates)
    if lisa is not None:
        lisa.close()
    loss, _ = evaluate(engine, held_out, arguments.rows)
    parts = (range(len(held_out.rows))[at : at + ANSWERED] for at in range(0, len(held_out.rows), ANSWERED))
    right = [one for part in parts for one in answered_rightly(engine.module, held_out, part)]
    engine.destroy()
    accuracy, count = sum(right) / len(right), len(right)
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    return {"held_out": loss, "accuracy": accuracy, "standard_error": error, "answers": count, "steps": steps}


def places(data: Data, rows: int, steps: int, order: random.Random) -> list[list[int]]:
    """The examples of each step: all of them in random order, again and again; those of a step are about as long."""
    passes = (order.sample(range(len(data.rows)), len(data.rows)) for _ in itertools.count())
    found = list(enumerate(itertools.islice(itertools.chain.from_iterable(passes), steps * rows)))
    found.sort(key=lambda one: (one[0] // (8 * rows), len(data.rows[one[1]][0])))
    return order.sample([[place for _, place in found[at : at + rows]] for at in range(0, len(found), rows)], steps)


def answered_rightly(model, data: Data, places: range) -> list[bool]:
    """Whether greedy answers to examples end like the examples' own."""
    rows, tokenizer = [data.rows[place] for place in places], data.tokenizer
    questions = [torch.tensor(tokens[:asked]) for tokens, asked in rows]
    padded = torch.nn.utils.rnn.pad_sequence(questions, True, tokenizer.eos_token_id, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence(list(map(torch.ones_like, questions)), True, padding_side="left")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    longest = max(len(tokens) - asked for tokens, asked in data.rows)
    with torch.no_grad():
        answers = model.generate(padded, attention_mask=mask, max_new_tokens=longest, do_sample=False, **ends)
    given = tokenizer.batch_decode(answers[:, padded.shape[1] :], skip_special_tokens=True)
    expected = tokenizer.batch_decode([tokens[asked:] for tokens, asked in rows], skip_special_tokens=True)
    return [one.split()[-1:] == other.split()[-1:] for one, other in zip(given, expected, strict=True)]


def read(arguments: argparse.Namespace) -> tuple[Data, Data]:
    """Examples to train on, and those to answer; none is cut. Those of one file are told apart in a random order."""
    data, held_out = (
        Data.read(arguments.model, path, math.inf)
        for path in (arguments.dataset, arguments.held_out or arguments.dataset)
    )
    rows, others = (
        [row for row in one.rows if len(row[0]) < LENGTH and len(row[0]) - row[1] <= arguments.longest]
        for one in (data, held_out)
    )
    if arguments.held_out is None:
        random.Random(0).shuffle(others)
        others, rows = others[: arguments.answers], others[arguments.answers :]
    return Data(data.tokenizer, rows[: arguments.examples]), Data(data.tokenizer, others[: arguments.answers])


def main() -> None:
    """Run every method with every seed and write what came of it."""
    parser = parser_of(__doc__, "accuracy", with_data=True)
    parser.add_argument("--held_out", help="examples to answer; by default some of --dataset")
    parser.add_argument("--rates", nargs="+", required=True, metavar="METHOD=RATE", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--examples", type=positive, default=2000, help="to train on")
    parser.add_argument("--answers", type=positive, default=500)
    parser.add_argument("--longest", type=positive, default=LENGTH, help="tokens of an answer that is taken")
    parser.add_argument("--rows", type=positive, default=8, help="of a step")
    parser.add_argument("--seeds", type=positive, default=3)
    arguments = parser.parse_args()
    arguments.gpu = False
    run_on_cpu()
    figures = json.loads(arguments.results.read_text())["figures"] if arguments.results.is_file() else {}
    for seed in range(arguments.seeds):
        for method, rate in (words.rsplit("=", 1) for words in arguments.rates):
            key = quality_key(method, float(rate), seed)
            if key not in figures:
                with RankGroup(1, Caller) as rank:
                    (figures[key],) = rank.call("run", run, arguments, method, float(rate), seed)
                write_results(arguments.results, figures, quiet=True)
                print(key, figures[key], flush=True)


if __name__ == "__main__":
    main()
