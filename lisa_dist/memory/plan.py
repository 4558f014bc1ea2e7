"""What `lisa-dist plan` is asked, by flags and by default, the plan that answers it, and how it is shown."""

import json
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.core.activation_checkpointing import AUTO, parse_checkpointed_layers
from lisa_dist.core.blocks import model_without_weights, why_not_trained
from lisa_dist.core.sequence_parallel import check_groups
from lisa_dist.ds_config import given_ds_config
from lisa_dist.errors import UserError
from lisa_dist.loss.label_logits import check_loss
from lisa_dist.memory.workload import LOGITS, Lora, MemoryParts, Workload
from lisa_dist.model_names import is_tuned, name_or_folder, nearest_name, shipped_model_configs, shipped_name
from lisa_dist.presets import NONE, optimizer_of_preset, reserved_bytes, trains_adapters_alone
from lisa_dist.run_folder import PLANNED_PARTS, REFERENCE
from lisa_dist.tasks import GRPO, KTO, PAIRED, REWARD, SFT, WITH_REFERENCE, check_task, has_reference
from lisa_dist.text import BYTE_UNITS, format_columns, no_such_model, parse_bytes, split_names

METHODS = ("lisa", "full", "lora")
# Planning time grows with the tokens of a pass, and with the square of the number of GPUs: 64 take a minute.
MANY_GPUS, MOST_GPUS = 64, 1024
MANY_TOKENS, MOST_TOKENS = 2**17, 2**20
NO_DATA = "DATA"  # what `--dataset_name` is where none is given
# From the fastest to the slowest: with offload a step waits for the host, and stage 3 gathers every weight twice.
SHARING = "zero3_hpz"  # of several hosts
WAYS = ("zero1", "zero2", SHARING, "zero3", "zero2_offload", "zero3_offload")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class PlanArguments:
    """The flags of `lisa-dist plan`."""

    model: str = field(
        metadata={
            "aliases": ["--model_name_or_path"],
            "help": "Shipped name (llama3.1-8b, ...), folder, config.json, or hub id.",
        }
    )
    gpus: int = field(default=1, metadata={"help": "GPUs of the run."})
    gpu_memory: str = field(default="80GiB", metadata={"help": "Memory of a GPU, such as 24GiB or 80GB."})
    host_memory: str = field(default="1TiB", metadata={"help": "Memory of a host."})
    gpus_per_host: int = field(
        default=8, metadata={"aliases": ["--gpus_per_node"], "help": "GPUs that share a host's memory."}
    )
    seq_length: int = field(default=1024, metadata={"aliases": ["--max_length"], "help": "Tokens of an example."})
    sequence_parallel: int = field(default=1, metadata={"help": "GPUs that share each example, as in training."})
    activation_offloading: bool = field(default=False, metadata={"help": "As in training."})
    micro_batch_size: int = field(
        default=1,
        metadata={"aliases": ["--per_device_train_batch_size"], "help": "Examples of a GPU in a forward pass."},
    )
    method: str = field(default="lisa", metadata={"help": "lisa, full or lora."})
    task: str = field(default=SFT, metadata={"help": "As in training; of grpo a step is planned, not what generates."})
    beta: float | None = field(
        default=None,
        metadata={"help": "As in training, with dpo, kto, orpo or grpo, which above 0 has a reference model."},
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "As in training, with --task dpo or kto: no reference model stays."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.0,
        metadata={"help": "With --task grpo: of a GPU, what vLLM takes in the run's processes, such as 0.3."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters, for --method lora."})
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that train whole next to the adapters, such as embed_tokens,lm_head."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "As in training, with --method lora: QLoRA."})
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "As in training, with --load_in_4bit: scales in 8 bits."}
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "As in training."})
    precision: str = field(default="bf16", metadata={"help": "bf16 or fp32."})
    deepspeed: str | None = field(default=None, metadata={"help": "Plan this config alone: short name or path."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of a step."})
    checkpointed_layers: str = field(
        default=AUTO,
        metadata={
            "help": "none, all, a number of decoder layers, or auto for the fewest that fit; with "
            "another method than lisa none or all."
        },
    )
    loss: str = field(
        default=AUTO,
        metadata={"help": "As in training; auto is for logits where they fit, else chunked."},
    )
    reserve: str = field(
        default=AUTO,
        metadata={
            "help": "Of a GPU, for the CUDA context, NCCL and fragments: auto is 1.5GiB, or 6 hundredths of it if that "
            "is more; of several GPUs 1GiB more."
        },
    )
    dataset_name: str = field(default=NO_DATA, metadata={"help": "Data to train on, for the command of the run."})
    json: str | None = field(default=None, metadata={"help": "Write the plans to this file."})
    plot: str | None = field(default=None, metadata={"help": "Draw them as bars to this .png."})

    def __post_init__(self) -> None:
        counts = ("gpus", "gpus_per_host", "seq_length", "micro_batch_size", "gradient_accumulation_steps", "lora_r")
        for name in (*counts, "sequence_parallel"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: at least 1.")
        check_groups(self.sequence_parallel, self.gpus)
        if self.precision not in DTYPES:
            raise UserError(f"--precision {self.precision}: unknown; choose bf16 or fp32.")
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: unknown; choose one of {', '.join(METHODS)}.")
        self.lora_modules_to_save = split_names(self.lora_modules_to_save)
        if self.load_in_4bit and self.precision != "bf16":
            rule = "adapters of weights in 4 bits train in bf16. Use `--precision bf16`"
            raise UserError(f"--precision {self.precision} with --load_in_4bit: {rule}.")
        check_task(self.task)
        if self.task == KTO and self.micro_batch_size < 2:
            raise UserError("--micro_batch_size 1 with --task kto: it compares the rows of a batch; give 2 or more.")
        if self.task == GRPO and self.answers < 2:
            raise UserError("--micro_batch_size 1 with --task grpo: it compares answers of a step; give 2 or more.")
        if self.precompute_ref_log_probs and self.task not in WITH_REFERENCE:
            raise UserError(
                f"--precompute_ref_log_probs with --task {self.task}: it is for those with a reference model, "
                f"{' and '.join(WITH_REFERENCE)}; leave it out."
            )
        if self.beta is not None and self.task in (SFT, REWARD):
            raise UserError(
                f"--beta {self.beta} with --task {self.task}: it is for dpo, kto, orpo and grpo; leave it out."
            )
        if not 0 <= (share := self.vllm_gpu_memory_utilization) < 1 or (share and self.task != GRPO):
            rule = f"it is a part of a GPU, below 1, of --task {GRPO}"
            raise UserError(f"--vllm_gpu_memory_utilization {share} with --task {self.task}: {rule}.")
        parse_checkpointed_layers(self.checkpointed_layers)
        check_loss(self.loss)
        if self.task != SFT and self.loss != AUTO:
            raise UserError(f"--loss {self.loss} with --task {self.task}: it is for --task {SFT}; leave it out.")
        of_gpu = parse_bytes("--gpu_memory", self.gpu_memory)
        parse_bytes("--host_memory", self.host_memory)
        if self.reserve == AUTO:  # NCCL has two communicators
            self.reserve = f"{(reserved_bytes(of_gpu) + (self.gpus > 1) * 2**30) / 2**30:.2f}GiB"
        parse_bytes("--reserve", self.reserve)

    def check_bounds(self) -> None:
        """Raise UserError for a run so large that planning it would take minutes or hours."""
        if self.gpus > MOST_GPUS:
            raise UserError(f"--gpus {self.gpus}: plans are made for at most {MOST_GPUS} GPUs. Give fewer.")
        tokens = self.tokens
        if tokens > MOST_TOKENS:
            raise UserError(
                f"--seq_length {self.seq_length} with --micro_batch_size {self.micro_batch_size}: a GPU would have "
                f"{tokens} tokens in a forward pass, and plans are made for at most {MOST_TOKENS}. Give less of one "
                "of them, or share sequences between GPUs by --sequence_parallel."
            )

    @property
    def rows(self) -> int:
        """Sequences of a GPU in a forward pass: of a pair both are."""
        return self.micro_batch_size * (2 if self.task in PAIRED else 1)

    @property
    def tokens(self) -> int:
        """Tokens of a GPU in a forward pass."""
        return self.rows * self.seq_length // self.sequence_parallel

    @property
    def takes_minutes(self) -> bool:
        """Whether planning takes so long that a user should be told."""
        return self.gpus > MANY_GPUS or self.tokens > MANY_TOKENS

    @property
    def answers(self) -> int:
        """Sequences of a step on all GPUs."""
        return self.micro_batch_size * self.gpus // self.sequence_parallel * self.gradient_accumulation_steps

    @property
    def lora(self) -> Lora | None:
        """The adapters of `--method lora`; None with another method."""
        if self.method != "lora":
            return None
        names = tuple(self.lora_modules_to_save or ())
        return Lora(self.lora_r, names, self.load_in_4bit, self.load_in_4bit and self.use_bnb_nested_quant)

    @property
    def has_reference(self) -> bool:
        """Whether the model as it was stands beside the one that trains."""
        return has_reference(self.task, self.method, self.beta, self.precompute_ref_log_probs)

    @property
    def ranks_of_hosts(self) -> list[int]:
        """How many ranks each host has; the last may have fewer."""
        whole, rest = divmod(self.gpus, self.gpus_per_host)
        return [self.gpus_per_host] * whole + ([rest] if rest else [])

    @property
    def budget(self) -> int:
        """Bytes of a GPU that a run may take."""
        of_run = parse_bytes("--gpu_memory", self.gpu_memory) * (1 - self.vllm_gpu_memory_utilization)
        return int(of_run) - parse_bytes("--reserve", self.reserve)

    @property
    def host_budget(self) -> int:
        """Bytes of a host for each rank on it."""
        return parse_bytes("--host_memory", self.host_memory) // max(self.ranks_of_hosts)


@dataclass(frozen=True)
class Plan:
    """The memory that each rank needs under one DeepSpeed config; `lisa_config` with a number in the place of auto."""

    ds_config: str
    workload: Workload
    gpu: MemoryParts
    host: dict[str, int]
    lisa_config: LisaConfig
    bus: tuple[float, float] | None = None  # seconds of a micro-batch that copies of frozen layers and products take
    start: int = 0  # bytes of a rank on the host while the model is loaded

    @property
    def host_bytes(self) -> int:
        """Bytes on the host of one rank."""
        return sum(self.host.values())

    def lacks(self, arguments: PlanArguments) -> tuple[int, int]:
        """Bytes that a GPU, and a rank's share of its host, lack; 0 where the plan fits."""
        return (
            max(0, self.gpu.needed - arguments.budget),
            max(0, max(self.host_bytes, self.start) - arguments.host_budget),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        workload = asdict(self.workload) | {"dtype": str(self.workload.dtype).removeprefix("torch.")}
        host = self.host | {"total": self.host_bytes}
        found = {"ds_config": self.ds_config, "workload": workload, "gpu": self.gpu.to_dict(), "host": host}
        return found | {"bus": self.bus, "start": self.start}


GLOBAL_BATCH = 16  # examples of a step on all ranks: the paper's
SMALL_MODEL = 10**9  # parameters, below which a rate is ten times as high

Arguments = TypeVar("Arguments", bound=PlanArguments)


def with_accumulation(arguments: Arguments, given: Collection[str]) -> Arguments:
    """The same with as many micro-batches as make a global batch of 16; of grpo, whose answers they bound, as given."""
    if "gradient_accumulation_steps" in given or arguments.task == GRPO:
        return arguments
    at_once = replace(arguments, gradient_accumulation_steps=1).answers
    return replace(arguments, gradient_accumulation_steps=max(1, GLOBAL_BATCH // at_once))


def preset_settings(arguments: PlanArguments, lisa_config: LisaConfig, given: Collection[str]) -> dict[str, Any]:
    """Return the optimizer that the preset sets in a run of these flags, and the settings of its states."""
    if arguments.method != "lisa":
        return {}
    return optimizer_of_preset(
        str(lisa_config.lisa_preset),
        given,
        optim=arguments.optim,
        ds_config=given_ds_config(arguments.deepspeed),
        offloaded=lisa_config.offloaded,
        in_bf16=arguments.precision == "bf16",
    )


def with_settings(
    arguments: Arguments, lisa_config: LisaConfig, settings: dict[str, Any]
) -> tuple[Arguments, LisaConfig]:
    """Both with what a preset sets."""
    of_lisa = {name: value for name, value in settings.items() if name != "optim"}
    return replace(arguments, optim=settings.get("optim", arguments.optim)), replace(lisa_config, **of_lisa)


def learning_rate(model: str, config: PretrainedConfig, lisa_config: LisaConfig, task: str = SFT) -> float:
    """Return a rate to begin with (docs/choosing.md).

    It depends on the size of the model, whether it is tuned already, what trains, and the task.
    """
    is_small = sum(parameter.numel() for parameter in model_without_weights(config).parameters()) < SMALL_MODEL
    if trains_adapters_alone(vars(lisa_config)):
        rate = 1e-3 if is_small else 2e-4
    elif is_small:
        rate = 1e-4
    else:
        rate = 1e-5 if is_tuned(model) else 2e-5
    return rate if task in (SFT, REWARD) else rate / 10


def load_model_config(model: str) -> PretrainedConfig:
    """The config of a shipped name, a folder, a config.json, or a model of the hub.

    The hub is not asked for models whose config is shipped. Raises UserError, with the nearest shipped name, where
    there is none, and for a model that LISA cannot train.
    """
    config = _find_config(model)
    if (why := why_not_trained(config, REWARD)) is not None:
        raise UserError(f"--model {model}: {why}.")
    return config


def _find_config(model: str) -> PretrainedConfig:
    path = Path(model)
    name = None if path.exists() else shipped_name(model)
    if name is not None:
        text = (resources.files("lisa_dist") / "model_configs" / f"{name}.json").read_text(encoding="utf-8")
    elif path.is_file():
        text = None
    else:
        return _of_folder_or_hub(model)
    try:
        return AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8") if text is None else text))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"--model {model}: is no model's config.json ({error}).") from error


def _of_folder_or_hub(model: str) -> PretrainedConfig:
    is_here = Path(model).exists()
    nearest = None if is_here else nearest_name(model)
    if nearest and "/" not in model:
        raise UserError(f"--model {model}: no such folder, and no shipped name; did you mean {nearest}?")
    if nearest:  # the hub may take its time to answer
        print(f"asking the hub for {model}; a shipped name like it is {nearest}", file=sys.stderr, flush=True)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        meant = f"Did you mean {nearest}? " if nearest else ""
        raise UserError(
            f"{no_such_model(f'--model {model}', error)} {meant}Give the path of its config.json, or one of the "
            f"shipped names: {', '.join(shipped_model_configs())}."
        ) from error


_PREFERENCES = {"dataset_name": "trl-lib/ultrafeedback_binarized"}
# Data of the hub that a run of each task takes as they are.
_EXAMPLES: dict[str, dict[str, str]] = {
    SFT: {"dataset_name": "openai/gsm8k", "dataset_config": "main"},
    "dpo": _PREFERENCES,
    "kto": {"dataset_name": "trl-lib/kto-mix-14k"},
    "orpo": _PREFERENCES,
    "reward": _PREFERENCES,
    "grpo": {"dataset_name": "trl-lib/tldr"},
}


def given_settings(lisa_config: LisaConfig) -> dict[str, Any]:
    """Return the settings that differ from those of their preset; of no preset also the number of layers."""
    preset = lisa_config.lisa_preset
    defaults = LisaConfig(lisa_preset=preset).to_dict()
    always = "lisa_preset" if preset != NONE else "" if lisa_config.by_module else "lisa_activated_layers"
    return {name: one for name, one in lisa_config.to_dict().items() if name == always or one != defaults[name]}


def command_for(plan: Plan, arguments: PlanArguments, learning_rate: float | None = None) -> str:
    """The command that starts the run of a plan; where no data were given, on those of the hub for its task."""
    is_example = arguments.dataset_name == NO_DATA
    flags: dict[str, Any] = {
        "model_name_or_path": name_or_folder(arguments.model),
        **(_EXAMPLES[arguments.task] if is_example else {"dataset_name": arguments.dataset_name}),
        "output_dir": f"runs/{Path(name_or_folder(arguments.model)).name}",
        "method": arguments.method,
        "deepspeed": plan.ds_config,
        "task": None if arguments.task == SFT else arguments.task,
        "precompute_ref_log_probs": arguments.precompute_ref_log_probs or None,
        "beta": arguments.beta,
        "per_device_train_batch_size": arguments.micro_batch_size,
        "max_length": arguments.seq_length,
        "sequence_parallel": arguments.sequence_parallel if arguments.sequence_parallel > 1 else None,
        "activation_offloading": arguments.activation_offloading or None,
        "optim": arguments.optim,
        "bf16": arguments.precision == "bf16",
    }
    if arguments.task == GRPO:  # seq_length is of a prompt and its answer
        answers = arguments.answers
        flags["max_completion_length"] = flags.pop("max_length") // 2
        flags["reward_funcs"] = "think_format_reward" if is_example else "rewards.py"
        if arguments.vllm_gpu_memory_utilization:
            flags |= {"use_vllm": True, "vllm_gpu_memory_utilization": arguments.vllm_gpu_memory_utilization}
        flags["num_generations"] = next((size for size in range(8, 1, -1) if answers % size == 0), answers)
    if arguments.loss != AUTO or plan.workload.loss == LOGITS:
        flags["loss"] = LOGITS if arguments.loss == AUTO else arguments.loss
    if arguments.gradient_accumulation_steps > 1:
        flags["gradient_accumulation_steps"] = arguments.gradient_accumulation_steps
    if arguments.method == "lora":
        flags |= {"lora_r": arguments.lora_r, "lora_dropout": 0.0}  # whose masks the plan does not count
        flags["load_in_4bit"] = arguments.load_in_4bit or None
        flags["use_bnb_nested_quant"] = (arguments.load_in_4bit and arguments.use_bnb_nested_quant) or None
        flags["lora_modules_to_save"] = ",".join(arguments.lora_modules_to_save or ()) or None
    flags["checkpointed_layers"] = plan.workload.checkpointed_layers
    if arguments.method != "lisa":
        flags["checkpointed_layers"] = "all" if plan.workload.checkpointed_layers else "none"
    else:
        flags |= given_settings(plan.lisa_config)
    flags["learning_rate"] = learning_rate
    words = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None)
    hosts = len(arguments.ranks_of_hosts)
    if hosts == 1:
        return f"lisa-dist train --gpus {arguments.gpus} {words}"
    several = f"--hostfile hostfile --num_nodes {hosts} --num_gpus {arguments.gpus_per_host}"
    return f"deepspeed {several} --no_local_rank --module lisa_dist.cli train {words}"


def format_plans(plans: Sequence[Plan], arguments: PlanArguments) -> str:
    """The table: a row for each part, a column for each DeepSpeed config."""
    unit, name = unit_of(plans)

    def shown(size: int) -> str:
        return f"{size / unit:.2f}" if size else "-"

    checkpointed = [f"{plan.workload.checkpointed_layers} checkpointed" for plan in plans]
    lines = [[f"{name} on each GPU", *(plan.ds_config for plan in plans)], ["layers", *checkpointed]]
    if arguments.method == "lisa" and plans[0].lisa_config.samples and not plans[0].lisa_config.by_module:
        lines.append(["", *(f"{plan.lisa_config.lisa_activated_layers} active" for plan in plans)])
    lines.append(["loss", *(plan.workload.loss for plan in plans)])
    for title, fields in PLANNED_PARTS:
        if title == REFERENCE[0] and not arguments.has_reference:
            continue
        lines.append([title, *(shown(sum(plan.gpu.to_dict()[name] for name in fields)) for plan in plans)])
    lines.append(["peak", *(shown(plan.gpu.peak) for plan in plans)])
    lines.append(["and held by other streams", *(shown(plan.gpu.pool) for plan in plans)])
    lines.append([f"{name} on the host, a rank", *(shown(plan.host_bytes) for plan in plans)])
    for title in dict.fromkeys(title for plan in plans for title in plan.host):
        lines.append([f"  {title}", *(shown(plan.host.get(title, 0)) for plan in plans)])
    lines.append(["  while the model is loaded", *(shown(plan.start) for plan in plans)])
    if any(plan.bus for plan in plans):
        seconds = [plan.bus or (0.0, 0.0) for plan in plans]
        lines.append(["bus, seconds a micro-batch", *(f"{bus:.1f}" for bus, _ in seconds)])
        products = (f"{time:.1f}, {'hidden' if bus <= time else 'waited for'}" for bus, time in seconds)
        lines.append(["  behind products", *products])
    lines.append(["fits", *("yes" if not any(plan.lacks(arguments)) else "no" for plan in plans)])
    return format_columns(lines)


def unit_of(plans: Sequence[Plan]) -> tuple[int, str]:
    """The largest unit of which every plan's peak has a tenth at least."""
    smallest = min(plan.gpu.peak for plan in plans)
    return next((unit, name) for unit, name in BYTE_UNITS if smallest >= unit / 10 or name == "KiB")
