"""A recipe for a model and a budget of memory, with comments."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from transformers import PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.core.activation_checkpointing import AUTO
from lisa_dist.core.blocks import number_of_decoder_layers
from lisa_dist.core.layer_weights import load_layer_weights
from lisa_dist.core.sampling import Coverage, coverage, describe_coverage
from lisa_dist.definitions import setting
from lisa_dist.errors import UserError
from lisa_dist.files import check_new_file
from lisa_dist.memory.plan import Plan, PlanArguments, given_settings
from lisa_dist.memory.planner import Chosen
from lisa_dist.model_names import name_or_folder
from lisa_dist.presets import ADAPTERS, NONE, PAPER
from lisa_dist.tasks import GRPO, REWARD, SFT
from lisa_dist.text import GIB, format_bytes

_END = """\
lr_scheduler_type: cosine
warmup_steps: 0.03                  # below 1: this part of all steps
num_train_epochs: 1

# Logs and checkpoints. SIGTERM and SIGUSR1 save one too; --resume_from_checkpoint auto goes on from the newest.
logging_steps: 10
eval_strategy: steps
eval_steps: 100
save_steps: 200
save_total_limit: 2
report_to: tensorboard              # or wandb, mlflow, ..., none
"""
_HELD_OUT = 0.02  # of the rows
_SMALLEST_INTERVAL = 5  # K of a short run, since moments begin again in each period
_PACKING = "# packing: true                     # several short examples in one sequence, which never see each other"
_LAYERS = "# of {} decoder layers; fewer are faster, and auto is as many as fit"
_ALL = "# of {} decoder layers, which are all: full training"
_PRESETS = {
    ADAPTERS: "# LoRA adapters of rank 32, embedding and head; no layer is sampled",
    PAPER: "# 2 sampled layers, as in the paper",
}
_RATE_OF_PREFERENCES = "This rate is for training by preferences: a tenth of that of fine-tuning."
_RATES = {
    1e-3: "This rate is for adapters of models below 1B.",
    2e-4: "This rate is for adapters.",
    1e-4: "This rate is for models below 1B.",
    1e-5: "This rate is for a model that is tuned already; a base model takes 2 to 4 times as much.",
    2e-5: "This rate is for a base model; one that is tuned already takes 1e-5.",
}


@dataclass
class InitArguments(PlanArguments):
    """What is asked of `lisa-dist init`: a plan's questions, and where things are."""

    output_dir: str | None = setting(None, "Of the run; by default runs/ and the model's name.")
    recipe: str | None = setting(None, "The file to write; left out, it is printed.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "lisa":
            raise UserError(f"--method {self.method}: init writes recipes of LISA.")
        if self.task == GRPO:
            raise UserError(f"--task {GRPO}: init writes no recipe of it; docs/tasks.md has its flags.")
        for flag in ("json", "plot", "deepspeed"):
            if getattr(self, flag) is not None:
                raise UserError(f"--{flag} {getattr(self, flag)}: it is for lisa-dist plan.")
        if self.recipe is not None:
            check_new_file("--recipe", self.recipe)

    @property
    def model_name(self) -> str:
        """The model's name without its folder or owner."""
        path = Path(self.model)
        return (path.parent if path.name == "config.json" else path).name


def steps_of_recipe(arguments: PlanArguments, rows: int) -> int:
    """Return the optimizer steps of a recipe's run on so many rows, of which it holds some out."""
    return max(1, math.ceil((rows - round(_HELD_OUT * rows)) / arguments.answers))


def cover_layers(lisa_config: LisaConfig, num_layers: int, steps: int) -> Coverage:
    """Return what a run of so many steps covers; embedding and head are taken to be always-trained."""
    config, file = lisa_config, lisa_config.lisa_weights_file
    weights = None if file is None else load_layer_weights(file, num_layers, config.lisa_activated_layers)
    sampled_by = config.lisa_sampler, num_layers, config.lisa_activated_layers, config.lisa_interval_steps
    found = coverage(*sampled_by, steps, weights)
    return replace(found, layers=None, interval=None) if config.by_module else found


def with_interval(chosen: Chosen, num_layers: int, steps: int) -> Chosen:
    """Return the choice with a smaller K where that many steps have too few periods to train every layer."""
    found = cover_layers(chosen.lisa_config, num_layers, steps)
    if found.layers is None or found.reaches_all or chosen.lisa_config.lisa_sampler == "fixed":
        return chosen
    interval = max(_SMALLEST_INTERVAL, found.interval or 0)
    return replace(chosen, lisa_config=replace(chosen.lisa_config, lisa_interval_steps=interval))


def format_recipe(
    chosen: Chosen, argv: Sequence[str], config: PretrainedConfig, rate: float, steps: int | None = None
) -> str:
    """Return the recipe's text, YAML with comments; `argv` is the command's, `steps` those of the run if known."""
    arguments, lisa_config, num_layers = chosen.arguments, chosen.lisa_config, number_of_decoder_layers(config)
    assert isinstance(arguments, InitArguments)
    shown = given_settings(lisa_config)
    for name in ("lisa_preset", "lisa_activated_layers", "lisa_interval_steps"):
        shown.pop(name, None)
    lines = [
        _head(chosen, arguments, argv),
        "# LISA: what trains.",
        "method: lisa",
        *_of_task(arguments),
        *_what_trains(lisa_config, num_layers, steps),
        *(f"{name}: {_as_yaml(value)}" for name, value in shown.items()),
        "",
        "# How it is run.",
        f"deepspeed: {chosen.plan.ds_config}",
        f"bf16: {str(arguments.precision == 'bf16').lower()}",
        f"optim: {_as_yaml(arguments.optim)}",
        *([f"gpu_memory: {arguments.budget / GIB:.2f}GiB"] if arguments.checkpointed_layers == AUTO else []),
        f"checkpointed_layers: {arguments.checkpointed_layers:<15}# auto: as few as fit, by a measured step; planned: "
        f"{chosen.plan.workload.checkpointed_layers}/{num_layers}",
        *([f"loss: {arguments.loss}"] if arguments.loss != AUTO else []),
        f"per_device_train_batch_size: {arguments.micro_batch_size}",
        f"global_batch_size: {arguments.answers:<17}# examples of a step, on any number of GPUs",
        f"max_length: {arguments.seq_length}",
        *([f"sequence_parallel: {arguments.sequence_parallel}"] if arguments.sequence_parallel > 1 else []),
        *(["activation_offloading: true"] if arguments.activation_offloading else []),
        *([_PACKING] if arguments.task == SFT else []),
        "",
        f"# The schedule. {_RATES[rate] if arguments.task in (SFT, REWARD) else _RATE_OF_PREFERENCES}",
        f"learning_rate: {f'{rate:.1e}':<21}# try half and twice of it; docs/choosing.md",
    ]
    return "\n".join([*lines, _END])


def _what_trains(lisa_config: LisaConfig, num_layers: int, steps: int | None) -> list[str]:
    """Return lines with the preset, and with the sampled layers and their periods if there are any."""
    preset, gamma = lisa_config.lisa_preset, lisa_config.lisa_activated_layers
    lines = [] if preset == NONE else [f"lisa_preset: {preset:<23}{_PRESETS[str(preset)]}"]
    if preset == NONE and not lisa_config.by_module:
        layers = (_ALL if gamma == num_layers else _LAYERS).format(num_layers)
        lines.append(f"lisa_activated_layers: {gamma:<13}{layers}")
    if not lisa_config.samples:
        return lines
    periods = ""
    if steps is not None:
        periods = f"# {describe_coverage(cover_layers(lisa_config, num_layers, steps), num_layers)}"
    return [*lines, f"lisa_interval_steps: {lisa_config.lisa_interval_steps:<15}{periods}".rstrip()]


def _head(chosen: Chosen, arguments: InitArguments, argv: Sequence[str]) -> str:
    """What the recipe is, how to start it, and its paths."""
    plan, way = chosen.plan, chosen.fallback.name
    here = min(arguments.gpus, arguments.gpus_per_host)
    more_hosts = "" if here == arguments.gpus else "\n# on one host; for several: docs/clusters.md"
    return f"""\
# LISA on {_join([arguments.model_name])}, {arguments.gpus} x {arguments.gpu_memory.strip()}, made by
#   {_join(["lisa-dist", "init", *argv])}
# {way[0].upper() + way[1:]}.
# Planned for {arguments.seq_length} tokens a sequence: {format_bytes(plan.gpu.needed)} on each GPU and \
{arguments.reserve.strip()} for CUDA, {format_bytes(max(plan.host_bytes, plan.start))} of host memory a rank.
# The parts of it: {_plan_command(arguments, plan)}
# Start it: lisa-dist train {_join([arguments.recipe or "recipe.yaml"])} --gpus {here}{more_hosts}

# The model, and the data: files (.jsonl, .json, .csv, .parquet, .txt), folders or datasets of the hub; docs/data.md.
model_name_or_path: {_as_yaml(name_or_folder(arguments.model))}
dataset_name: {_as_yaml(arguments.dataset_name)}
eval_rows: {_HELD_OUT}                     # this part of them is held out
output_dir: {_as_yaml(arguments.output_dir or f"runs/{arguments.model_name}")}
"""


def _of_task(arguments: InitArguments) -> list[str]:
    """Lines of a task other than sft."""
    lines = [f"task: {arguments.task}"] if arguments.task != SFT else []
    lines += [f"beta: {arguments.beta}"] if arguments.beta is not None else []
    return lines + (["precompute_ref_log_probs: true"] if arguments.precompute_ref_log_probs else [])


def _plan_command(arguments: InitArguments, plan: Plan) -> str:
    """The command of the plan that was chosen."""
    asked, defaults = vars(arguments), vars(PlanArguments(arguments.model))
    flags = {name: asked[name] for name in defaults if asked[name] != defaults[name] and name != "dataset_name"}
    flags["deepspeed"] = plan.ds_config
    flags |= given_settings(plan.lisa_config)
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return _join(["lisa-dist", "plan", "--model", arguments.model, *argv])


def _as_yaml(value: object) -> str:
    """A value in one line that YAML reads back as it is, with quotes where it needs them."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf)[1:-2]


def _join(argv: Sequence[str]) -> str:
    """A command in one line, as a comment holds it: what cannot be printed is written as in bash's $'...'."""
    quoted = []
    for word in argv:
        plain = word.replace("\\", "\\\\").replace("'", "\\'")
        escaped = "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in plain)
        quoted.append(shlex.quote(word) if word.isprintable() else f"$'{escaped}'")
    return " ".join(quoted)
