"""A recipe for a model and a budget of memory: the first rung of a ladder of settings that fits, with comments."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lisa_dist.config import LisaConfig
from lisa_dist.core.checkpointing import AUTO
from lisa_dist.errors import UserError
from lisa_dist.memory.plan import WAYS, Plan, PlanArguments
from lisa_dist.memory.planner import load_model_config, make_plans, what_fits
from lisa_dist.text import GIB, format_bytes
from lisa_dist.train.arguments import HUB_IDS

# What is tried until something fits, from the method as it was published to what gives most of it up for memory.
LADDER: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("AdamW in 32 bits, as published", {}, False),
    ("moments of embeddings and head in 8 bits", {"lisa_state_bits": "embed=8,head=8"}, False),
    ("AdamW in 32 bits, as published; optimizer states on the host", {}, True),
    ("embeddings and head sampled like layers", {"lisa_always_on": "rest"}, False),
    (
        "embeddings and head sampled like layers, moments in 8 bits",
        {"lisa_always_on": "rest", "lisa_state_bits": "embed=8,head=8,layers=8"},
        False,
    ),
    ("embeddings and head sampled like layers, optimizer states on the host", {"lisa_always_on": "rest"}, True),
)
RECIPE = """\
# LISA on {model}, {gpus} x {gpu_memory}, made by
#   {command}
# {way}.
# Planned for {seq_length} tokens a sequence: {gpu} on each GPU and {reserve} for CUDA, {host} of host memory a rank.
# The parts of it: {plan_command}
# Start it: lisa-dist train --gpus {gpus_here} --config {recipe}{more_hosts}

# The model, and the data: files (.jsonl, .json, .csv, .parquet, .txt), folders or datasets of the hub; docs/data.md.
model_name_or_path: {model_name_or_path}
dataset_name: {dataset_name}
eval_rows: 0.02                     # this part of them is held out
output_dir: {output_dir}

# LISA: what trains in a period, and optimizer steps in it.
method: lisa
{active}lisa_interval_steps: {interval}
{lisa}
# How it is run.
deepspeed: {deepspeed}
bf16: {bf16}
optim: {optim}
{budget}checkpointed_layers: {checkpointed:<15}# auto: as few as fit, by a measured step; planned: {fewest}/{num_layers}
{loss}{gradient_accumulation}per_device_train_batch_size: {micro_batch_size}
max_length: {seq_length}
# packing: true                     # several short examples in one sequence, which never see each other

# The schedule. Lower the rate for more layers at a time, or for a model that is tuned already.
learning_rate: 1.0e-5
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


_MORE = "# decoder layers; more is nearer to full training, and takes more memory"


@dataclass
class InitArguments(PlanArguments):
    """What is asked of `lisa-dist init`: a plan's questions, and where things are."""

    dataset_name: str = field(default="DATA", metadata={"help": "Data to train on; to be filled in if left out."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Of the run; by default runs/ and the model's name."}
    )
    recipe: str | None = field(default=None, metadata={"help": "The file to write; left out, it is printed."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "lisa":
            raise UserError(f"--method {self.method}: init writes recipes of LISA.")
        for flag in ("json", "plot", "deepspeed"):
            if getattr(self, flag) is not None:
                raise UserError(f"--{flag} {getattr(self, flag)}: it is for lisa-dist plan.")
        if self.recipe is not None and Path(self.recipe).exists():
            raise UserError(f"--recipe {self.recipe}: is there already; move it away, or give another name.")

    @property
    def model_name(self) -> str:
        """The model's name without its folder or owner."""
        path = Path(self.model)
        return (path.parent if path.name == "config.json" else path).name


def choose(arguments: InitArguments, lisa_config: LisaConfig) -> tuple[str, Plan, LisaConfig]:
    """The first rung of the ladder that fits, what it is, and its settings; those that were given stay as they are.

    Raises ValueError with what is lacking where nothing fits.
    """
    config, given = load_model_config(arguments.model), lisa_config.to_dict()
    problem, defaults = UserError("no way of running fits the settings"), LisaConfig().to_dict()
    for way, settings, offloads in LADDER:
        for_offload = offloads or "lisa_state_bits" in settings  # which goes with no states on the host
        if any(given[name] != defaults[name] for name in settings) or (for_offload and lisa_config.offloaded):
            continue  # it would change what was given
        if "lisa_always_on" in settings and (lisa_config.lisa_activated_layers == 0 or lisa_config.by_module):
            continue  # nothing can be sampled in the place of layers
        tried = LisaConfig(**given | settings)
        try:
            ways = [name for name in WAYS if name.endswith("_offload") == offloads]
            return way, what_fits(make_plans(config, arguments, tried, ways), arguments), tried
        except UserError as error:
            problem = error
    raise problem


def format_recipe(arguments: InitArguments, way: str, plan: Plan, lisa_config: LisaConfig, words: Sequence[str]) -> str:
    """The recipe's text, YAML with comments."""
    defaults = LisaConfig().to_dict()
    shown = {name: value for name, value in lisa_config.to_dict().items() if value != defaults[name]}
    gamma, interval = (shown.pop(name, defaults[name]) for name in ("lisa_activated_layers", "lisa_interval_steps"))
    path = Path(arguments.model)
    here = min(arguments.gpus, arguments.gpus_per_host)
    accumulation = arguments.gradient_accumulation_steps
    return RECIPE.format(
        model=_join([arguments.model_name]),
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory.strip(),
        command=_join(["lisa-dist", "init", *words]),
        way=way[0].upper() + way[1:],
        gpu=format_bytes(plan.gpu.peak),
        reserve=arguments.reserve.strip(),
        host=format_bytes(plan.host_bytes),
        plan_command=_plan_command(arguments, plan),
        gpus_here=here,
        more_hosts="" if here == arguments.gpus else "\n# on one host; for several: docs/clusters.md",
        recipe=_join([arguments.recipe or "recipe.yaml"]),
        model_name_or_path=_as_yaml(
            HUB_IDS.get(arguments.model, str(path.parent if path.name == "config.json" else path))
        ),
        dataset_name=_as_yaml(arguments.dataset_name),
        output_dir=_as_yaml(arguments.output_dir or f"runs/{arguments.model_name}"),
        active="" if lisa_config.by_module else f"lisa_activated_layers: {gamma:<13}{_MORE}\n",
        interval=interval,
        lisa="".join(f"{name}: {_as_yaml(value)}\n" for name, value in shown.items()),
        deepspeed=plan.ds_config,
        bf16=str(arguments.precision == "bf16").lower(),
        checkpointed=arguments.checkpointed_layers,
        budget=f"gpu_memory: {arguments.budget / GIB:.2f}GiB\n" if arguments.checkpointed_layers == AUTO else "",
        loss=f"loss: {arguments.loss}\n" if arguments.loss != AUTO else "",
        optim=_as_yaml(arguments.optim),
        fewest=plan.workload.checkpointed_layers,
        num_layers=load_model_config(arguments.model).get_text_config().num_hidden_layers,
        gradient_accumulation=f"gradient_accumulation_steps: {accumulation}\n" if accumulation > 1 else "",
        micro_batch_size=arguments.micro_batch_size,
        seq_length=arguments.seq_length,
    )


def _plan_command(arguments: InitArguments, plan: Plan) -> str:
    """The command of the plan that was chosen."""
    asked, defaults = vars(arguments), vars(PlanArguments(arguments.model))
    flags = {name: asked[name] for name in defaults if asked[name] != defaults[name]} | {"deepspeed": plan.ds_config}
    unlike = LisaConfig().to_dict()
    flags |= {name: value for name, value in plan.lisa_config.to_dict().items() if value != unlike[name]}
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
