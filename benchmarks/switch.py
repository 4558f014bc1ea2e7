"""What does a switch cost? Seconds, share of a period, states per rank, live bytes over many switches, for each stage.

python benchmarks/switch.py --model .quickstart/model
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

from bench import launch, print_table, write_results

CONFIGS = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


def measure(arguments: argparse.Namespace) -> None:
    """On each rank: step time at full length, then one switch a step at a short one. Rank 0 writes the figures."""
    import torch
    from torch import distributed as dist
    from transformers import AutoModelForCausalLM

    import lisa_dist
    from lisa_dist.blocks import parameter_numel

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, attn_implementation="sdpa")
    config = lisa_dist.LisaConfig(lisa_interval_steps=arguments.warmup_steps)
    engine, lisa = lisa_dist.initialize(model, arguments.worker, config, lr=1e-5, weight_decay=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    seconds = []

    def step(length: int) -> None:
        tokens = torch.randint(0, 1000, (1, length), generator=generator)
        dist.barrier()
        started = time.perf_counter()
        lisa.on_step_begin()
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        seconds.append(time.perf_counter() - started)

    for _ in range(arguments.warmup_steps):
        step(arguments.seq_length)
    step_seconds = statistics.median(seconds[1:])
    # From here on each step is a period of its own.
    config.lisa_interval_steps = 1
    lisa.period = engine.global_steps - 1
    for _ in range(arguments.switches + 1):
        step(16)
    lisa.close()
    switches = lisa.records[-arguments.switches :]
    groups = lisa.param_groups()
    active = sum(parameter_numel(parameter) for group in groups for parameter in group["params"])
    masters = sum(state.numel for state in lisa.partition_states().values())
    if dist.get_rank() == 0:
        figures = {
            "step_seconds": step_seconds,
            "switch_seconds": statistics.median(record.seconds for record in switches),
            "switch_seconds_max": max(record.seconds for record in switches),
            "state_bytes": [record.state_bytes_per_rank for record in switches],
            "live_bytes": [record.live_bytes for record in switches],
            "master_elements": masters,
            "active_elements": active,
            "formula_elements": math.ceil(active / dist.get_world_size()),
        }
        Path(arguments.figures).write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure each config in processes of its own and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--switches", type=int, default=50)
    parser.add_argument("--seq_length", type=int, default=256, help="tokens a rank and step, for the step time")
    parser.add_argument("--warmup_steps", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num_ranks", type=int, default=2)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "switch.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--figures", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments)
        return

    figures = {}
    for ds_config in arguments.configs:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "figures.json")
            flags = ["--worker", ds_config, "--figures", path, "--model", arguments.model]
            for name in ("switches", "seq_length", "warmup_steps", "dtype"):
                flags += [f"--{name}", str(getattr(arguments, name))]
            launch(Path(__file__), flags, arguments.num_ranks)
            figures[ds_config] = json.loads(Path(path).read_text())
    rows = []
    for name, of in figures.items():
        share = of["switch_seconds"] / (20 * of["step_seconds"] + of["switch_seconds"])
        rows.append(
            [
                name,
                f"{of['step_seconds']:.2f}",
                f"{of['switch_seconds']:.3f}",
                f"{of['switch_seconds_max']:.3f}",
                f"{100 * share:.2f}%",
                f"{of['master_elements']:,}",
                f"{of['formula_elements']:,}",
                f"{of['state_bytes'][0]:,}",
                f"{of['state_bytes'][-1]:,}",
                f"{min(of['live_bytes']):,}",
                f"{max(of['live_bytes']):,}",
            ]
        )
    header = ["config", "step s", "switch s", "max s", "of K=20", "masters/rank", "formula"]
    header += ["state B first", "state B last", "live B min", "live B max"]
    print_table(header, rows)
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
