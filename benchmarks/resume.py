"""Does a resumed run equal the run? Stage x offload x precision x where the cut fell, and other world sizes and stages.

python benchmarks/resume.py --model stories260k-hf --dataset gsm8k/train.jsonl

Every resume begins from other initial weights than the run had.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from bench import launch, print_table, worker_parser, write_results

CONFIGS = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
INTERVAL, STEPS = 4, 12
CUTS = {"switch step": 4, "first step": 5, "mid-period": 6, "last step": 7}
# Saved on 2 ranks with the first config, resumed with the second on so many ranks.
ELSEWHERE = [
    ("zero2", "zero2", 1),
    ("zero2", "zero2", 4),
    ("zero2", "zero3", 2),
    ("zero3", "zero2", 2),
    ("zero3", "zero3", 1),
    ("zero3", "zero3", 4),
    ("zero2_offload", "zero1", 2),
]


class Run:
    """One engine on this rank, from the model's weights or from other ones, and its training loop."""

    def __init__(self, arguments: argparse.Namespace, ds_config: str, other_weights: bool):
        import torch
        from torch import distributed as dist
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import lisa_dist

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
        if other_weights:
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        lines = Path(arguments.dataset).read_text(encoding="utf-8").splitlines()[: 4 * STEPS]
        rows = [json.loads(line) for line in lines]
        ids = [tokenizer(f"{row['question']} {row['answer']}")["input_ids"][:128] for row in rows]
        ids = [row + [tokenizer.eos_token_id or 0] * (128 - len(row)) for row in ids]
        self.batches = torch.tensor(ids).view(STEPS, 4, 128)
        config = lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL)
        self.engine, self.lisa = lisa_dist.initialize(model, ds_config, config, lr=1e-3, weight_decay=0.1)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def train(self, after_step=lambda step: None) -> list[float]:
        """To the last step; the losses of the global batches."""
        from torch import distributed as dist

        losses = []
        for step in range(self.engine.global_steps, STEPS):
            self.lisa.on_step_begin()
            rows = self.batches[step].chunk(self.world_size)[self.rank]
            loss = self.engine(input_ids=rows, labels=rows).loss
            self.engine.backward(loss)
            self.engine.step()
            total = loss.detach().float().clone()
            dist.all_reduce(total)
            losses.append(total.item() / self.world_size)
            after_step(self.engine.global_steps)
        return losses

    def weights(self) -> list:
        """Copies of all weights."""
        import deepspeed

        parameters = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            return [parameter.detach().float().clone() for parameter in parameters]


def worker(arguments: argparse.Namespace) -> None:
    """Save at every cut of a whole run and resume from each; or resume one run from elsewhere."""
    from lisa_dist.checkpoint.resume import load_checkpoint
    from lisa_dist.checkpoint.save import save_checkpoint

    folder = Path(arguments.folder)
    figures: dict = {}
    if arguments.worker == "whole":
        run = Run(arguments, arguments.ds_config, other_weights=False)

        def save(step: int) -> None:
            if step in CUTS.values():
                save_checkpoint(run.lisa, folder / f"checkpoint-{step}")

        losses, wanted = run.train(save), run.weights()
        run.engine.destroy()
        for where, cut in CUTS.items():
            run = Run(arguments, arguments.ds_config, other_weights=True)
            load_checkpoint(run.lisa, folder / f"checkpoint-{cut}")
            resumed = run.train()
            pairs = zip(wanted, run.weights(), strict=True)
            difference = max((one - other).abs().max().item() for one, other in pairs)
            loss = max(abs(one - other) for one, other in zip(losses[cut:], resumed, strict=True))
            figures[where] = {"weights": difference, "losses": loss}
            run.engine.destroy()
        figures["run"] = losses
    else:
        run = Run(arguments, arguments.ds_config, other_weights=True)
        load_checkpoint(run.lisa, folder / f"checkpoint-{CUTS['mid-period']}")
        figures["losses"] = run.train()
    if run.rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))


def main() -> None:
    """Run all cells, print both tables."""
    parser = worker_parser(__doc__.splitlines()[0], "resume.json")
    parser.add_argument("--dataset", required=True, help="question/answer rows, .jsonl")
    parser.add_argument("--ds_config", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return

    def run(folder: str, role: str, ds_config: str, dtype: str, num_ranks: int) -> dict:
        flags = {"model": arguments.model, "dataset": arguments.dataset, "dtype": dtype, "ds_config": ds_config}
        flags |= {"folder": folder, "worker": role}
        launch(Path(__file__), [word for name, value in flags.items() for word in (f"--{name}", value)], num_ranks)
        return json.loads((Path(folder) / "figures.json").read_text())

    same, elsewhere = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for ds_config in CONFIGS:
            for dtype in ("float32", "bfloat16"):
                cell = os.path.join(folder, f"{ds_config}-{dtype}")
                os.mkdir(cell)
                same[f"{ds_config} {dtype}"] = run(cell, "whole", ds_config, dtype, 2)
        for before, after, num_ranks in ELSEWHERE:
            losses = run(os.path.join(folder, f"{before}-float32"), "resume", after, "float32", num_ranks)["losses"]
            whole = same[f"{before} float32"]["run"][CUTS["mid-period"] :]
            difference = max(abs(one - other) for one, other in zip(whole, losses, strict=True))
            elsewhere[f"{before} x 2 -> {after} x {num_ranks}"] = difference
    print("largest difference of a weight after the rest of the run, and of a loss, by where it was cut")
    rows = [
        [name, *(f"{cell[where]['weights']:g} {cell[where]['losses']:g}" for where in CUTS)]
        for name, cell in same.items()
    ]
    print_table(["run on 2 ranks", *CUTS], rows)
    print("largest difference of a loss after a resume elsewhere (fp32)")
    print_table(["from -> to", "difference"], [[name, f"{value:.2e}"] for name, value in elsewhere.items()])
    write_results(arguments.results, {"same": same, "elsewhere": elsewhere})


if __name__ == "__main__":
    main()
