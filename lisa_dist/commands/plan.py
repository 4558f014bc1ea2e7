"""`lisa-dist plan`: what a run will need, part by part, which way of running fits, and the command that starts it."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lisa_dist.commands import exit_on_error, writing
from lisa_dist.config import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.flags import FlagParser
from lisa_dist.memory.plan import (
    NO_DATA,
    Plan,
    PlanArguments,
    command_for,
    format_plans,
    learning_rate,
    load_model_config,
    preset_settings,
    unit_of,
    with_accumulation,
    with_settings,
)
from lisa_dist.memory.planner import Chosen, first_that_fits, make_plans, what_fits
from lisa_dist.memory.trace import FakeRuns
from lisa_dist.run_folder import PLANNED_PARTS
from lisa_dist.text import format_bytes

USAGE = "lisa-dist plan --model llama3.1-8b [--gpus N] [--gpu_memory 80GiB] [--any_flag value ...]"
# The screen of --help; what is not here is in --help_all.
HELP = {
    "What is trained": {
        "model": "a shipped name, a folder, a config.json, or a model of the hub",
        "method": "lisa, full or lora",
        "task": "sft, dpo, kto, orpo, reward or grpo: some have a reference model too",
        "lora_r": "of the adapters, for --method lora",
        "load_in_4bit": "weights in 4 bits, for --method lora: QLoRA",
        "lora_modules_to_save": "modules that train whole next to them, for --method lora",
        "seq_length": "tokens of a sequence",
        "micro_batch_size": "examples of a GPU in a forward pass",
        "gradient_accumulation_steps": "micro-batches of a step; by default those of 16 examples",
    },
    "On what": {
        "gpus": "GPUs of the run",
        "gpu_memory": "of a GPU, such as 24GiB or 80GB",
        "reserve": "of it, for the CUDA context, NCCL and fragments",
        "host_memory": "of a host",
        "gpus_per_host": "that share a host's memory",
    },
    "How": {
        "deepspeed": "plan zero1, zero2, ..., or a file; by default all are planned",
        "precision": "bf16 or fp32",
        "lisa_preset": "as in training: adapters by default, paper, none",
        "optim": "as in training",
        "checkpointed_layers": "none, all, a number, or auto: the fewest that fit",
        "lisa_adapters": "rank of LoRA adapters that train in every step",
        "lisa_activated_layers": "decoder layers that train in a period (gamma), or auto",
        "lisa_always_on": "of embed, head, rest; those left out are sampled like layers",
        "lisa_frozen": "of embed, head, rest: never trained",
        "lisa_state": "at a switch: reset, reset_all, keep (on the host)",
        "lisa_state_bits": "of moments, by block: embed=8,head=factored,layers=8",
        "lisa_frozen_bits": "of frozen layers: 16, 8, 4 or fp8, with originals on the host",
        "lisa_master": "fp32, or bf16_sr for no masters",
        "lisa_offload": "blocks whose optimizer states live on the host",
    },
    "What is written": {
        "dataset_name": "in the command of the run",
        "json": "the plans, to this file",
        "plot": "their bars, to this .png",
    },
}
ARGUMENTS = (PlanArguments, LisaConfig)


def main(argv: Sequence[str]) -> None:
    """Plan, print the table and the command."""
    with exit_on_error("lisa-dist plan"):
        flags = FlagParser(ARGUMENTS, USAGE, HELP)
        arguments, lisa_config = flags.parse(argv)
        arguments.check_bounds()
        if arguments.takes_minutes:
            tell(f"planning {arguments.tokens} tokens on each of {arguments.gpus} GPUs takes minutes")
        given = flags.given(argv)
        config = load_model_config(arguments.model)
        arguments, preset = with_accumulation(arguments, given), preset_settings(arguments, lisa_config, given)
        asked, settings = with_settings(arguments, lisa_config, preset)
        runs, rate = FakeRuns(config), None
        if arguments.method == "lisa":
            rate = learning_rate(arguments.model, config, lisa_config, arguments.task)
        plans = make_plans(config, asked, settings, runs=runs)
        print(format_plans(plans, asked))
        if asked.json:
            written = {"arguments": asdict(asked), "plans": [plan.to_dict() for plan in plans]}
            with writing(f"--json {asked.json}"):
                Path(asked.json).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        if asked.plot:
            _plot_plans(plans, asked)

        def fallback(with_offload: bool) -> Chosen | None:
            """What fits with other settings: of other methods than LISA, and under a given config, nothing."""
            if arguments.method != "lisa" or arguments.deepspeed:
                return None
            with contextlib.suppress(UserError):
                return first_that_fits(config, arguments, lisa_config, preset, with_offload, runs, tell)
            return None

        try:
            best, why = what_fits(plans, asked), "Of these the fastest that fits"
        except UserError:
            if (found := fallback(with_offload=True)) is None:
                raise
            best, asked, why = found.plan, found.arguments, f"None of these fits. {_what_it_takes(found)}"
        else:
            if best.ds_config.endswith("_offload") and (found := fallback(with_offload=False)) is not None:
                _print_command(best, asked, rate, "With states on the host, for which a step waits")
                best, asked, why = found.plan, found.arguments, _what_it_takes(found)
        if arguments.dataset_name == NO_DATA:
            why += " (the data are an example: --dataset_name takes yours)"
        _print_command(best, asked, rate, why)


def tell(line: str) -> None:
    """Print the progress of a search that takes a minute on a small machine, apart from its result."""
    print(line, file=sys.stderr, flush=True)


def _print_command(plan: Plan, arguments: PlanArguments, rate: float | None, why: str) -> None:
    on_host = max(plan.host_bytes, plan.start) * min(arguments.gpus, arguments.gpus_per_host)
    takes = f"{format_bytes(plan.gpu.needed)} of each GPU"
    takes += f" and {format_bytes(on_host)} of a host's memory" if on_host else ""
    print(f"\n{why}; it takes {takes}:\n{command_for(plan, arguments, rate)}")


def _what_it_takes(found: Chosen) -> str:
    where = "host" if found.fallback.offloads else "GPU"
    return f"With states on the {where}: {found.fallback.name}"


def _plot_plans(plans: Sequence[Plan], arguments: PlanArguments) -> None:
    """Draw a bar of stacked parts for each plan, and the budget as a line, to `--plot`."""
    assert arguments.plot is not None
    from matplotlib.figure import Figure  # slow to import, and a table does not need it

    unit, name = unit_of(plans)
    figure = Figure(figsize=(1.5 * len(plans) + 3, 5), layout="constrained")
    axes = figure.subplots()
    names, bottoms = [plan.ds_config for plan in plans], [0.0] * len(plans)
    for title, fields in PLANNED_PARTS:
        heights = [sum(plan.gpu.at_peak()[name] for name in fields) / unit for plan in plans]
        if any(heights):
            axes.bar(names, heights, bottom=bottoms, label=title)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    if arguments.budget / unit <= 5 * max(bottoms):  # else the bars of a small model could not be seen
        axes.axhline(arguments.budget / unit, color="black", linestyle="--", label="budget")
    axes.set_ylabel(f"{name} on each GPU at the peak")
    axes.set_title(f"{Path(arguments.model).name}, {arguments.method}, {arguments.gpus} GPU(s)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    try:
        figure.savefig(arguments.plot, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {arguments.plot}: cannot be written ({error}).") from error
