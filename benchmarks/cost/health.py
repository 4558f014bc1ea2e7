"""What does it cost to know the slowest rank? Seconds of its hooks and of its collective, next to those of a step.

python -m benchmarks.cost.health --model .quickstart/model

A step of seconds varies by more than what is looked for, so steps with and without it would not tell. Hooks are timed
on as many small modules as are hooked in the model, --repeats times, and so is what a log does.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM

import lisa_dist
from benchmarks.common.ranks import run_on_ranks
from benchmarks.common.results import parser_of, positive, print_table, write_results
from lisa_dist.distributed.health import ComputeTime

TOKENS = 256


def seconds_of(action: Callable[[], object], repeats: int) -> float:
    """The median of single calls, after one that does not count."""
    action()
    dist.barrier()
    each = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        each.append(time.perf_counter() - started)
    return statistics.median(each)


def measure(model_path: str, ds_config: str, steps: int, repeats: int) -> dict:
    """On a rank: steps of the model, then the hooks and a log alone."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    engine, lisa = lisa_dist.initialize(model, ds_config, lisa_dist.LisaConfig(), lr=1e-5)
    engine.train()
    tokens = torch.randint(0, model.config.vocab_size, (1, TOKENS))

    def step() -> None:
        lisa.on_step_begin()
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    step_seconds = seconds_of(step, steps)
    waits = lisa.partitions.weights_are_sharded
    linear = [torch.nn.Linear(1, 1) for one in model.modules() if isinstance(one, torch.nn.Linear)]
    small = torch.nn.Sequential(*linear if waits else linear[:1])

    def pass_through() -> None:
        with torch.no_grad():
            small(torch.ones(1))

    plain = seconds_of(pass_through, repeats)
    compute_time = ComputeTime(small, torch.device("cpu"), waits)
    hooks = max(0.0, seconds_of(pass_through, repeats) - plain)
    figures = {"step_seconds": step_seconds, "hooked_modules": len(linear) if waits else 1}
    return figures | {"hooks_seconds": hooks, "log_seconds": seconds_of(compute_time.slowest, repeats)}


def main() -> None:
    """Measure under ZeRO-2 and ZeRO-3 on two ranks; print and write shares of a step, with a log in each step."""
    parser = parser_of(__doc__, "health")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--steps", type=positive, default=6)
    parser.add_argument("--repeats", type=positive, default=200)
    arguments = parser.parse_args()
    figures, rows = {}, []
    for name in ("zero2", "zero3"):
        found = run_on_ranks(2, measure, arguments.model, name, arguments.steps, arguments.repeats)[0]
        found["share_of_step"] = (found["hooks_seconds"] + found["log_seconds"]) / found["step_seconds"]
        figures[name] = found
        times = [f"{found[which] * 1e6:.0f}" for which in ("hooks_seconds", "log_seconds")]
        rows.append([name, f"{found['step_seconds']:.2f}", str(found["hooked_modules"]), *times])
        rows[-1].append(f"{found['share_of_step']:.4%}")
    print_table(["config", "s a step", "modules", "us of hooks", "us of a log", "of a step"], rows)
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
