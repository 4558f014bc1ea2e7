"""Do all ZeRO stages, offloads and numbers of ranks train the same? The loss of every step, side by side.

python benchmarks/stages.py --model .quickstart/model --dataset gsm8k/train.jsonl
python benchmarks/stages.py --model stories260k-hf --dataset gsm8k/train.jsonl --rows 8 --num_ranks 1 2 4 \\
    --configs zero2 zero3 --results benchmarks/results/ranks.json
"""

import argparse
import json
import tempfile
from pathlib import Path

from bench import launch, print_table, write_results

CONFIGS = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
TRAIN = Path(__file__).parents[1] / "launch" / "train.py"


def losses_of(ds_config: str, num_ranks: int, arguments: argparse.Namespace, output_dir: str) -> list[float]:
    """Train and read the losses that the Trainer logged."""
    flags = {
        "model_name_or_path": arguments.model,
        "dataset_name": arguments.dataset,
        "output_dir": output_dir,
        "deepspeed": ds_config,
        "max_steps": arguments.steps,
        "lisa_interval_steps": arguments.interval_steps,
        "lisa_debug": True,
        "per_device_train_batch_size": arguments.rows // num_ranks,
        "max_length": 256,
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "gradient_checkpointing": False,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    launch(TRAIN, [word for name, value in flags.items() for word in (f"--{name}", str(value))], num_ranks)
    state = json.loads((Path(output_dir) / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def main() -> None:
    """Train with each config, print the losses and their largest difference at any step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--dataset", required=True, help="question/answer rows, .jsonl")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--interval_steps", type=int, default=4)
    parser.add_argument("--num_ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--rows", type=int, default=2, help="rows in the global batch, whatever the number of ranks")
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "stages.json")
    arguments = parser.parse_args()

    losses = {}
    for ds_config in arguments.configs:
        for num_ranks in arguments.num_ranks:
            with tempfile.TemporaryDirectory() as output_dir:
                arm = f"{ds_config} x {num_ranks}"
                losses[arm] = losses_of(ds_config, num_ranks, arguments, output_dir)
    rows = [[str(step), *(f"{losses[name][step]:.6f}" for name in losses)] for step in range(arguments.steps)]
    print_table(["step", *losses], rows)
    spread = max(max(values) - min(values) for values in zip(*losses.values(), strict=True))
    print(f"largest difference at any step: {spread:.2e}")
    write_results(arguments.results, {"losses": losses, "largest_difference": spread})


if __name__ == "__main__":
    main()
