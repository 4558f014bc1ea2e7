"""What does it cost to know the slowest rank? Seconds of its hooks and of its collective, beside those of a step.

python benchmarks/health.py --model .quickstart/model

A step of seconds varies by more than what is looked for, so steps with and without it would not tell. The hooks of all
modules that have some are called by themselves, --repeats times, and so is what a log does.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench import launch, print_table, worker_parser, write_results

TOKENS = 256
LIMIT = 0.005  # of a step


def worker(arguments: argparse.Namespace) -> None:
    """Time steps of the model, then the hooks and a log alone."""
    import torch
    from torch import distributed as dist
    from transformers import AutoModelForCausalLM

    import lisa_dist
    from lisa_dist.distributed.health import ComputeTime

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    engine, lisa = lisa_dist.initialize(model, arguments.ds_config, lisa_dist.LisaConfig(), lr=1e-5)
    engine.train()
    device = torch.device("cpu")
    compute_time = ComputeTime(engine.module, device, lisa.partitions.weights_are_sharded)
    batch = torch.randint(0, model.config.vocab_size, (1, TOKENS))
    steps = []
    for _ in range(arguments.steps):
        begun = time.perf_counter()
        lisa.on_step_begin()
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
        steps.append(time.perf_counter() - begun)
    ours = [compute_time._begin, compute_time._end]
    timed = [module for module in engine.module.modules() if ours[0] in module._forward_pre_hooks.values()]
    compute_time.slowest()
    begun = time.perf_counter()
    for _ in range(arguments.repeats):
        for module in timed:
            compute_time._begin(module, ())
            compute_time._end(module, (), None)
        assert len(compute_time._spans) == len(timed)
        compute_time._spans.clear()
    hooks = (time.perf_counter() - begun) / arguments.repeats
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(arguments.repeats):
        compute_time.slowest()
    log = (time.perf_counter() - begun) / arguments.repeats
    if dist.get_rank() == 0:
        figures = {"step_seconds": statistics.median(steps[1:]), "hooked_modules": len(timed)}
        figures |= {"hooks_seconds": hooks, "log_seconds": log}
        Path(arguments.folder, "figures.json").write_text(json.dumps(figures))


def main() -> None:
    """Measure under ZeRO-2 and ZeRO-3 on two ranks; print and write shares of a step, with a log in each step."""
    parser = worker_parser(__doc__.splitlines()[0], "health.json")
    parser.add_argument("--ds_config", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.folder:
        worker(arguments)
        return
    figures, rows = {}, []
    for ds_config in ("zero2", "zero3"):
        with tempfile.TemporaryDirectory() as folder:
            words = ["--folder", folder, "--model", arguments.model, "--ds_config", ds_config]
            words += ["--steps", str(arguments.steps), "--repeats", str(arguments.repeats)]
            launch(Path(__file__), words, 2)
            figures[ds_config] = found = json.loads(Path(folder, "figures.json").read_text())
        step = found["step_seconds"]
        found["share_of_step"] = (found["hooks_seconds"] + found["log_seconds"]) / step
        times = [f"{found[name] * 1e6:.0f}" for name in ("hooks_seconds", "log_seconds")]
        rows.append([ds_config, f"{step:.2f}", str(found["hooked_modules"]), *times, f"{found['share_of_step']:.4%}"])
    print_table(["config", "s a step", "modules", "us of hooks", "us of a log", "of a step"], rows)
    write_results(arguments.results, figures)
    if any(found["share_of_step"] > LIMIT for found in figures.values()):
        sys.exit(f"health: more than {LIMIT:.1%} of a step")


if __name__ == "__main__":
    main()
