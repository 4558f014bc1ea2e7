"""What `lisa-dist plan` is asked, and the plan of one way of running that answers it."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lisa_dist.config import LisaConfig
from lisa_dist.core.checkpointing import AUTO, parse_checkpointed_layers
from lisa_dist.errors import UserError
from lisa_dist.loss.label_logits import check_loss
from lisa_dist.memory.parts import MemoryParts
from lisa_dist.memory.workload import Workload
from lisa_dist.presets import check_preset, reserved_bytes
from lisa_dist.tasks import GRPO, KTO, PAIRED, REWARD, SFT, WITH_REFERENCE, check_task
from lisa_dist.text import parse_bytes

METHODS = ("lisa", "full", "lora")
# From the fastest to the slowest: with offload a step waits for the host, and stage 3 gathers every weight twice.
NO_DATA = "DATA"  # what `--dataset_name` is where none is given
WAYS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
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
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters, for --method lora."})
    lisa_preset: str | None = field(default=None, metadata={"help": "As in training, and by the same rule."})
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
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: at least 1.")
        if self.precision not in DTYPES:
            raise UserError(f"--precision {self.precision}: unknown; choose bf16 or fp32.")
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: unknown; choose one of {', '.join(METHODS)}.")
        check_task(self.task)
        check_preset(self.lisa_preset)
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
        parse_checkpointed_layers(self.checkpointed_layers)
        check_loss(self.loss)
        if self.task != SFT and self.loss != AUTO:
            raise UserError(f"--loss {self.loss} with --task {self.task}: it is for --task {SFT}; leave it out.")
        of_gpu = parse_bytes("--gpu_memory", self.gpu_memory)
        parse_bytes("--host_memory", self.host_memory)
        if self.reserve == AUTO:  # NCCL has two communicators
            self.reserve = f"{(reserved_bytes(of_gpu) + (self.gpus > 1) * 2**30) / 2**30:.2f}GiB"
        parse_bytes("--reserve", self.reserve)

    @property
    def rows(self) -> int:
        """Sequences of a GPU in a forward pass: of a pair both are."""
        return self.micro_batch_size * (2 if self.task in PAIRED else 1)

    @property
    def answers(self) -> int:
        """Sequences of a step on all GPUs."""
        return self.micro_batch_size * self.gpus * self.gradient_accumulation_steps

    @property
    def has_reference(self) -> bool:
        """Whether the model as it was stands beside the one that trains; with adapters it is the one without them."""
        has_it = self.task in WITH_REFERENCE or (self.task == GRPO and bool(self.beta))
        return has_it and self.method != "lora" and not self.precompute_ref_log_probs

    @property
    def budget(self) -> int:
        """Bytes of a GPU that a run may take."""
        return parse_bytes("--gpu_memory", self.gpu_memory) - parse_bytes("--reserve", self.reserve)

    @property
    def host_budget(self) -> int:
        """Bytes of a host for each rank on it."""
        return parse_bytes("--host_memory", self.host_memory) // min(self.gpus, self.gpus_per_host)


@dataclass(frozen=True)
class Plan:
    """The memory that each rank needs under one DeepSpeed config; `lisa_config` with a number in the place of auto."""

    ds_config: str
    workload: Workload
    gpu: MemoryParts
    host: dict[str, int]
    lisa_config: LisaConfig

    @property
    def host_bytes(self) -> int:
        """Bytes on the host of one rank."""
        return sum(self.host.values())

    def lacks(self, arguments: PlanArguments) -> tuple[int, int]:
        """Bytes that a GPU, and a rank's share of its host, lack; 0 where the plan fits."""
        return (
            max(0, self.gpu.needed - arguments.budget),
            max(0, self.host_bytes - arguments.host_budget),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        workload = asdict(self.workload) | {"dtype": str(self.workload.dtype).removeprefix("torch.")}
        host = self.host | {"total": self.host_bytes}
        return {"ds_config": self.ds_config, "workload": workload, "gpu": self.gpu.to_dict(), "host": host}
