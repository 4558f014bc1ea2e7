"""A recipe for a model and a budget of memory, with comments."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.core.blocks import number_of_decoder_layers
from lisa_dist.core.checkpointing import AUTO
from lisa_dist.errors import UserError
from lisa_dist.files import check_new_file
from lisa_dist.memory.plan import Plan, PlanArguments, given_settings
from lisa_dist.memory.planner import Chosen
from lisa_dist.model_names import name_or_folder
from lisa_dist.tasks import GRPO, REWARD, SFT
from lisa_dist.text import GIB, format_bytes

RECIPE = """\
# LISA on {model}, {gpus} x {gpu_memory}, made by
#   {command}
# {way}.
# Planned for {seq_length} tokens a sequence: {gpu} on each GPU and {reserve} for CUDA, {host} of host memory a rank.
# The parts of it: {plan_command}
# Start it: lisa-dist train {recipe} --gpus {gpus_here}{more_hosts}

# The model, and the data: files (.jsonl, .json, .csv, .parquet, .txt), folders or datasets of the hub; docs/data.md.
model_name_or_path: {model_name_or_path}
dataset_name: {dataset_name}
eval_rows: 0.02                     # this part of them is held out
output_dir: {output_dir}

# LISA: what trains in a period, and optimizer steps in it.
method: lisa
{task}{active}lisa_interval_steps: {interval}
{lisa}
# How it is run.
deepspeed: {deepspeed}
bf16: {bf16}
optim: {optim}
{budget}checkpointed_layers: {checkpointed:<15}# auto: as few as fit, by a measured step; planned: {fewest}/{num_layers}
{loss}per_device_train_batch_size: {micro_batch_size}
global_batch_size: {batch:<17}# examples of a step, on any number of GPUs
max_length: {seq_length}
{packing}
# The schedule. {rate_says}
learning_rate: {rate:<21}# try half and twice of it; docs/choosing.md
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


_PACKING = "# packing: true                     # several short examples in one sequence, which never see each other\n"
_LAYERS = "# of {} decoder layers; fewer are faster, and auto is as many as fit"
_ALL = "# of {} decoder layers, which are all: full training"
_RATE_OF_PREFERENCES = "This rate is for training by preferences: a tenth of that of fine-tuning."
_RATES = {
    1e-4: "This rate is for models below 1B.",
    1e-5: "This rate is for a model that is tuned already; a base model takes 2 to 4 times as much.",
    2e-5: "This rate is for a base model; one that is tuned already takes 1e-5.",
}


@dataclass
class InitArguments(PlanArguments):
    """What is asked of `lisa-dist init`: a plan's questions, and where things are."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Of the run; by default runs/ and the model's name."}
    )
    recipe: str | None = field(default=None, metadata={"help": "The file to write; left out, it is printed."})

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


def format_recipe(chosen: Chosen, words: Sequence[str], config: PretrainedConfig, rate: float) -> str:
    """The recipe's text, YAML with comments; `words` are those of the command."""
    arguments, plan, lisa_config = chosen.arguments, chosen.plan, chosen.lisa_config
    assert isinstance(arguments, InitArguments)
    defaults = LisaConfig().to_dict()
    shown = {name: value for name, value in lisa_config.to_dict().items() if value != defaults[name]}
    gamma, interval = (shown.pop(name, defaults[name]) for name in ("lisa_activated_layers", "lisa_interval_steps"))
    here, num_layers = min(arguments.gpus, arguments.gpus_per_host), number_of_decoder_layers(config)
    layers = (_ALL if gamma == num_layers else _LAYERS).format(num_layers)
    batch = arguments.gpus * arguments.micro_batch_size * arguments.gradient_accumulation_steps
    return RECIPE.format(
        model=_join([arguments.model_name]),
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory.strip(),
        command=_join(["lisa-dist", "init", *words]),
        way=chosen.fallback.name[0].upper() + chosen.fallback.name[1:],
        gpu=format_bytes(plan.gpu.needed),
        reserve=arguments.reserve.strip(),
        host=format_bytes(plan.host_bytes),
        plan_command=_plan_command(arguments, plan),
        gpus_here=here,
        more_hosts="" if here == arguments.gpus else "\n# on one host; for several: docs/clusters.md",
        recipe=_join([arguments.recipe or "recipe.yaml"]),
        model_name_or_path=_as_yaml(name_or_folder(arguments.model)),
        dataset_name=_as_yaml(arguments.dataset_name),
        output_dir=_as_yaml(arguments.output_dir or f"runs/{arguments.model_name}"),
        active="" if lisa_config.by_module else f"lisa_activated_layers: {gamma:<13}{layers}\n",
        packing=_PACKING if arguments.task == SFT else "",
        task=_task(arguments),
        interval=interval,
        lisa="".join(f"{name}: {_as_yaml(value)}\n" for name, value in shown.items()),
        deepspeed=plan.ds_config,
        bf16=str(arguments.precision == "bf16").lower(),
        checkpointed=arguments.checkpointed_layers,
        budget=f"gpu_memory: {arguments.budget / GIB:.2f}GiB\n" if arguments.checkpointed_layers == AUTO else "",
        loss=f"loss: {arguments.loss}\n" if arguments.loss != AUTO else "",
        optim=_as_yaml(arguments.optim),
        fewest=plan.workload.checkpointed_layers,
        num_layers=num_layers,
        batch=batch,
        rate=f"{rate:.1e}",
        rate_says=_RATES[rate] if arguments.task in (SFT, REWARD) else _RATE_OF_PREFERENCES,
        micro_batch_size=arguments.micro_batch_size,
        seq_length=arguments.seq_length,
    )


def _task(arguments: InitArguments) -> str:
    """Lines of a task other than sft."""
    task = f"task: {arguments.task}\n" if arguments.task != SFT else ""
    task += f"beta: {arguments.beta}\n" if arguments.beta is not None else ""
    return task + ("precompute_ref_log_probs: true\n" if arguments.precompute_ref_log_probs else "")


def _plan_command(arguments: InitArguments, plan: Plan) -> str:
    """The command of the plan that was chosen."""
    asked, defaults = vars(arguments), vars(PlanArguments(arguments.model))
    flags = {name: asked[name] for name in defaults if asked[name] != defaults[name] and name != "dataset_name"} | {
        "deepspeed": plan.ds_config
    }
    flags |= given_settings(plan.lisa_config)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return _join(["lisa-dist", "plan", "--model", arguments.model, *words])


def _as_yaml(value: object) -> str:
    """A value in one line that YAML reads back as it is, with quotes where it needs them."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf)[1:-2]


def _join(words: Sequence[str]) -> str:
    """A command in one line, as a comment holds it: what cannot be printed is written as in bash's $'...'."""
    quoted = []
    for word in words:
        if word.isprintable():
            quoted.append(shlex.quote(word))
            continue
        plain = word.replace("\\", "\\\\").replace("'", "\\'")
        quoted.append("$'" + "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in plain) + "'")
    return " ".join(quoted)
