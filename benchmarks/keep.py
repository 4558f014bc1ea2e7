"""Are kept states worth their host memory? The loss on real data under each state policy, host bytes, switch seconds.

python benchmarks/keep.py --model stories260k-hf --dataset gsm8k/train.jsonl

All policies draw the same layers; each begins from the same weights.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from bench import launch, print_table, worker_parser, write_results

POLICIES = ("reset", "reset_all", "keep")
INTERVAL, STEPS, ROWS, LENGTH = 5, 200, 16, 128
HELD_OUT = 64


def worker(arguments: argparse.Namespace) -> None:
    """Train under each policy on this rank."""
    import deepspeed
    import torch
    from torch import distributed as dist
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lisa_dist

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lines = Path(arguments.dataset).read_text(encoding="utf-8").splitlines()[: ROWS * STEPS + HELD_OUT]
    rows = [json.loads(line) for line in lines]
    ids = [tokenizer(f"{row['question']} {row['answer']}")["input_ids"][:LENGTH] for row in rows]
    ids = torch.tensor([row + [tokenizer.eos_token_id or 0] * (LENGTH - len(row)) for row in ids])
    batches, held_out = ids[HELD_OUT:].split(ROWS), ids[:HELD_OUT]
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def mean(loss: torch.Tensor) -> float:
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / world_size

    figures = {}
    for policy in POLICIES:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
        config = lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL, lisa_state=policy, lisa_sampler="reshuffle")
        engine, lisa = lisa_dist.initialize(model, "zero2", config, lr=arguments.lr, weight_decay=0.01)
        losses = []
        for step in range(STEPS):
            lisa.on_step_begin()
            mine = batches[step % len(batches)].chunk(world_size)[rank]
            loss = engine(input_ids=mine, labels=mine).loss
            engine.backward(loss)
            engine.step()
            losses.append(mean(loss))
        lisa.close()
        engine.eval()
        with torch.no_grad():
            mine = held_out.chunk(world_size)[rank]
            after = mean(engine(input_ids=mine, labels=mine).loss)
        figures[policy] = {
            "losses": losses,
            "held_out": after,
            "host_bytes": [record.host_bytes for record in lisa.records],
            "seconds": [record.seconds for record in lisa.records[1:]],
        }
        engine.destroy()
    if rank == 0:
        Path(arguments.folder, "figures.json").write_text(json.dumps(figures))


def main() -> None:
    """Train under every policy on two ranks; print and write what came of it."""
    parser = worker_parser(__doc__.splitlines()[0], "keep.json")
    parser.add_argument("--dataset", required=True, help="question/answer rows, .jsonl")
    parser.add_argument("--lr", type=float, default=5e-4)
    arguments = parser.parse_args()
    if arguments.folder:
        worker(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = {"folder": folder, "model": arguments.model, "dtype": arguments.dtype}
        flags |= {"dataset": arguments.dataset, "lr": arguments.lr}
        launch(Path(__file__), [word for name, value in flags.items() for word in (f"--{name}", str(value))], 2)
        figures = json.loads(Path(folder, "figures.json").read_text())
    rows = []
    for policy, found in figures.items():
        losses = found["losses"]
        curve = [f"{statistics.mean(losses[end - 20 : end]):.4f}" for end in (20, 60, 100, 140, 200)]
        seconds, host = statistics.median(found["seconds"]), max(found["host_bytes"]) / 2**20
        rows.append([policy, *curve, f"{found['held_out']:.4f}", f"{host:.2f}", f"{seconds:.4f}"])
    steps = [f"to step {end}" for end in (20, 60, 100, 140, 200)]
    print_table(["states", *steps, "held out", "host MiB a rank", "s/switch"], rows)
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
