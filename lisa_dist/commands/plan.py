"""`lisa-dist plan`: what a run will need, part by part, which way of running fits, and the command that starts it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lisa_dist.commands import exit_on_error
from lisa_dist.config import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.flags import FlagParser
from lisa_dist.memory.known_models import load_model_config
from lisa_dist.memory.ladder import Chosen, first_that_fits
from lisa_dist.memory.plan import NO_DATA, Plan, PlanArguments
from lisa_dist.memory.planner import command_for, format_plans, plot_plans
from lisa_dist.memory.plans import make_plans, what_fits
from lisa_dist.memory.trace import FakeRuns
from lisa_dist.text import format_bytes

USAGE = "lisa-dist plan --model llama3.1-8b [--gpus N] [--gpu_memory 80GiB] [--any_flag value ...]"
# The screen of --help; what is not here is in --help_all.
HELP = {
    "What is trained": {
        "model": "a shipped name, a folder, a config.json, or a model of the hub",
        "method": "lisa, full or lora",
        "task": "sft, dpo, kto, orpo, reward or grpo: some have a reference model too",
        "lora_r": "of the adapters, for --method lora",
        "seq_length": "tokens of a sequence",
        "micro_batch_size": "examples of a GPU in a forward pass",
        "gradient_accumulation_steps": "micro-batches of a step",
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
        "optim": "as in training",
        "checkpointed_layers": "none, all, a number, or auto: the fewest that fit",
        "lisa_activated_layers": "decoder layers that train in a period (gamma), or auto",
        "lisa_always_on": "of embed, head, rest; those left out are sampled like layers",
        "lisa_frozen": "of embed, head, rest: never trained",
        "lisa_state": "at a switch: reset, reset_all, keep (on the host)",
        "lisa_state_bits": "of moments, by block: embed=8,head=factored,layers=8",
        "lisa_frozen_bits": "of frozen layers: 16, 8 or 4, with originals on the host",
        "lisa_master": "fp32, or bf16_sr for no masters",
        "lisa_offload": "blocks whose optimizer states live on the host",
    },
    "What is written": {
        "dataset_name": "in the command of the run",
        "json": "the plans, to this file",
        "plot": "their bars, to this .png",
    },
}


def parser() -> FlagParser:
    """Of the flags of a plan."""
    return FlagParser((PlanArguments, LisaConfig), USAGE, HELP)


def main(words: Sequence[str]) -> None:
    """Plan, print the table and the command."""
    with exit_on_error("lisa-dist plan"):
        flags = parser()
        flags.check_words(words)
        arguments, lisa_config = flags.parse_args_into_dataclasses(words)
        config = load_model_config(arguments.model)
        runs = FakeRuns(config)
        plans = make_plans(config, arguments, lisa_config, runs=runs)
        print(format_plans(plans, arguments))
        if arguments.json:
            written = {"arguments": asdict(arguments), "plans": [plan.to_dict() for plan in plans]}
            try:
                Path(arguments.json).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"--json {arguments.json}: cannot be written ({error.strerror}).") from error
        if arguments.plot:
            plot_plans(plans, arguments)
        try:
            best = what_fits(plans, arguments)
        except UserError:
            if (found := _on_the_gpu(runs, arguments, lisa_config)) is not None:
                _print_command(found.plan, found.arguments, _what_it_takes(found))
            raise
        why = "Of these the fastest that fits"
        offloads = best.ds_config.endswith("_offload") and not arguments.deepspeed
        if offloads and (found := _on_the_gpu(runs, arguments, lisa_config)) is not None:
            _print_command(best, arguments, "With states on the host, for which a step waits")
            best, arguments, why = found.plan, found.arguments, _what_it_takes(found)
        if arguments.dataset_name == NO_DATA:
            why += " (the data are an example: --dataset_name takes yours)"
        _print_command(best, arguments, why)


def _print_command(plan: Plan, arguments: PlanArguments, why: str) -> None:
    print(f"\n{why}:\n{command_for(plan, arguments)}")


def _on_the_gpu(runs: FakeRuns, arguments: PlanArguments, lisa_config: LisaConfig) -> Chosen | None:
    """The first settings by which the GPU's memory is enough for states too, if there are any."""
    if arguments.method != "lisa":
        return None
    asked = replace(arguments, deepspeed=None)
    try:
        return first_that_fits(runs.config, asked, lisa_config, with_offload=False, runs=runs)
    except UserError:  # none does
        return None


def _what_it_takes(found: Chosen) -> str:
    return f"With states on the GPU, {format_bytes(found.plan.gpu.peak)} of it: {found.rung.name}"
