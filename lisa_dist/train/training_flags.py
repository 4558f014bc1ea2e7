"""Flags of training that every task has, whatever config of TRL's they stand in, checked where they are made."""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
from transformers.utils import ExplicitEnum

from lisa_dist.distributed.devices import check_accelerator, why_no_gpu
from lisa_dist.ds_config import check_sections, find_ds_config, given_ds_config
from lisa_dist.errors import UserError
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.train.argument_checks import check_trackers
from lisa_dist.train.ranges import check_objects, check_ranges

if TYPE_CHECKING:
    _Arguments: TypeAlias = TrainingArguments  # a config of TRL's, whichever it is
else:
    _Arguments = object
_NOT_GIVEN: Any = None


class LisaOptimizerNames(ExplicitEnum):
    """Optimizers that the Trainer's OptimizerNames lacks."""

    LISA_ADAMW = LISA_ADAMW


@dataclass
class TrainingFlags(_Arguments):
    """Put before one of TRL's configs: `--deepspeed` takes the short name of a shipped config, and CPU ranks work."""

    deepspeed: dict | str | None = field(
        default="zero2", metadata={"help": "Short name (zero1, zero2, zero3, zero2_offload, ...), path, or JSON."}
    )
    optim: str = field(
        default="adamw_torch_fused", metadata={"help": f"The Trainer's names, and {LISA_ADAMW} with --method lisa."}
    )
    torch_compile: bool = field(
        default=False,
        metadata={
            "help": "Compile each decoder layer by itself, on ZeRO stages 1 and 2: a graph for active, one for frozen "
            "layers."
        },
    )
    use_liger_kernel: bool = field(
        default=_NOT_GIVEN,
        metadata={
            "help": "Liger's norms, rotary embedding and MLP; left out, --method lisa takes them on a GPU where "
            "liger-kernel is installed and knows the model."
        },
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 - the parser goes by the second
        default="tensorboard",
        metadata={"help": "Trackers: tensorboard, wandb, ..., several as wandb,tensorboard, all, or none."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples of a step on all ranks together, for a run to be the same on any number of GPUs; "
            "--gradient_accumulation_steps follows from it."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        check_objects(self)
        if getattr(self, "max_length", None) == -1:  # which TRL's null is on a command line
            vars(self)["max_length"] = None  # it would cut the last token off
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = accumulation_steps(
                self.global_batch_size,
                micro_batch_size=self.per_device_train_batch_size,
                given=self.gradient_accumulation_steps,
                world_size=int(os.environ.get("WORLD_SIZE", 1)),
            )
        if isinstance(self.deepspeed, str) and not self.deepspeed.lstrip().startswith("{"):
            self.deepspeed = find_ds_config(self.deepspeed)
        check_sections(given_ds_config(self.deepspeed))
        if not self.use_cpu and (why := why_no_gpu()):
            raise UserError(f"{why}; --use_cpu true trains on CPUs.")
        check_accelerator()
        if not torch.cuda.is_available():
            self.use_cpu = True  # has Accelerate start gloo
            self.bf16 = bool(self.bf16)  # asked for, not by default: few CPUs multiply in bf16
        if isinstance(self.report_to, str) and "," in self.report_to:
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        if unknown := [name for name in trackers if name not in ("all", "none", *INTEGRATION_TO_CALLBACK)]:
            raise UserError(
                f"--report_to {unknown[0]}: unknown; choose all, none, or of {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        check_trackers([name for name in trackers if name not in ("all", "none")])
        if self.fsdp:
            raise UserError(f"--fsdp {self.fsdp}: training is sharded by DeepSpeed's ZeRO; leave it out.")
        optim = getattr(self.optim, "value", self.optim)
        ours, known = optim == LISA_ADAMW, [name.value for name in OptimizerNames]
        if not ours and optim not in known:
            raise UserError(f"--optim {optim}: unknown; choose {LISA_ADAMW} or one of {', '.join(known)}.")
        if ours:  # which the Trainer's arguments do not know
            self.optim = "adamw_torch_fused"
        super().__post_init__()
        if ours:
            self.optim = LisaOptimizerNames.LISA_ADAMW


def accumulation_steps(global_batch_size: int, micro_batch_size: int, given: int, world_size: int) -> int:
    """Micro-batches of a rank in a global batch; `given` are --gradient_accumulation_steps, where 1 stands for none."""
    at_once = micro_batch_size * world_size
    if global_batch_size < 1 or global_batch_size % at_once:
        raise UserError(
            f"--global_batch_size {global_batch_size}: must be a multiple of {at_once}, which "
            f"--per_device_train_batch_size {micro_batch_size} is on {world_size} ranks."
        )
    steps = global_batch_size // at_once
    if given not in (1, steps):
        raise UserError(
            f"--global_batch_size {global_batch_size} and --gradient_accumulation_steps {given}: give one of them; on "
            f"{world_size} ranks it is {steps}."
        )
    return steps
