"""The training arguments of each task: TRL's config with the flags that every task has, checked where they are made."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    is_azureml_available,
    is_flytekit_available,
)
from transformers.training_args import OptimizerNames
from transformers.utils import ExplicitEnum
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from lisa_dist.core.sequence_parallel import check_groups
from lisa_dist.definitions import setting
from lisa_dist.distributed.devices import check_accelerator, why_no_gpu
from lisa_dist.ds_config import MUST_MATCH, check_sections, find_ds_config, given_ds_config
from lisa_dist.errors import UserError
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.run_folder import hide_secrets
from lisa_dist.tasks import GRPO, KTO, REWARD, SFT
from lisa_dist.text import in_one_line

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns where it is imported
from trl.experimental.orpo import ORPOConfig

if TYPE_CHECKING:
    _Arguments: TypeAlias = TrainingArguments  # a config of TRL's, whichever it is
else:
    _Arguments = object
_NOT_GIVEN: Any = None
_POSITIVE = "1 or more", lambda value: value >= 1
_NOT_NEGATIVE = "0 or more", lambda value: value >= 0
_ABOVE_0 = "above 0", lambda value: value > 0
_BELOW_1 = "from 0 up to, not including, 1", lambda value: 0 <= value < 1
_LARGEST = 10**9  # more is a slip of the pen, and overflows in a plan
# Ranges of numbers that transformers and TRL do not check: the loading of rows, the first step or the first evaluation
# ends in a traceback, or a run trains or saves nothing without a word.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "per_device_train_batch_size": _POSITIVE,
    "per_device_eval_batch_size": _POSITIVE,
    "gradient_accumulation_steps": _POSITIVE,
    "sequence_parallel": _POSITIVE,
    "eval_accumulation_steps": _POSITIVE,
    "dataset_num_proc": _POSITIVE,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _POSITIVE,
    "num_iterations": _POSITIVE,
    "logging_steps": _ABOVE_0,
    "eval_steps": _ABOVE_0,
    "save_steps": _ABOVE_0,
    "max_grad_norm": _NOT_NEGATIVE,
    "beta": _NOT_NEGATIVE,
    "max_completion_length": _POSITIVE,
    "temperature": _ABOVE_0,
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_epsilon": _ABOVE_0,
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "num_train_epochs": _ABOVE_0,
    "max_steps": ("1 or more; -1 lets --num_train_epochs decide", lambda value: value == -1 or value >= 1),
    "max_length": ("1 or more; -1 is no limit", lambda value: value == -1 or value >= 1),
    "seed": ("from 0 to 4294967295", lambda value: 0 <= value < 2**32),  # as NumPy takes it
    # Of a run's other arguments.
    "hang_timeout": ("seconds are not negative; 0 turns it off", lambda value: value >= 0),
    "layer_norms": ("looks at every N-th step; 1 at each, 0 at none", lambda value: value >= 0),
    "lora_r": ("the rank of an adapter is at least 1", lambda value: value >= 1),
    "lora_alpha": ("adapters are scaled by it over the rank; it is above 0", lambda value: value > 0),
    "lora_dropout": ("a probability from 0 up to, not including, 1", lambda value: 0 <= value < 1),
}
# Objects that are taken as they are where a text does not begin as JSON does.
_OBJECTS = ("model_init_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
# Trackers that transformers does not list as available, and whether their package is there.
_NOT_LISTED = {"azure_ml": is_azureml_available, "flyte": is_flytekit_available}


class LisaOptimizerNames(ExplicitEnum):
    """Optimizers that the Trainer's OptimizerNames lacks."""

    LISA_ADAMW = LISA_ADAMW


@dataclass
class TrainingFlags(_Arguments):
    """Put before one of TRL's configs: `--deepspeed` takes the short name of a shipped config, and CPU ranks work."""

    deepspeed: dict | str | None = setting(
        "zero2", "Short name (zero1, zero2, zero3, zero2_offload, ...), path, or JSON."
    )
    optim: str = setting("adamw_torch_fused", f"The Trainer's names, and {LISA_ADAMW} with --method lisa.")
    torch_compile: bool = setting(
        False,
        "Compile each decoder layer by itself, on ZeRO stages 1 and 2: a graph for active, one for frozen layers.",
    )
    use_liger_kernel: bool = setting(
        _NOT_GIVEN,
        "Liger's norms, rotary embedding and MLP; left out, --method lisa takes them on a GPU where "
        "liger-kernel is installed and knows the model.",
    )
    report_to: None | str | list[str] = setting(  # noqa: RUF036 - the parser goes by the second
        "tensorboard", "Trackers: tensorboard, wandb, ..., several as wandb,tensorboard, all, or none."
    )
    global_batch_size: int | None = setting(
        None,
        "Examples of a step on all ranks together, for a run to be the same on any number of GPUs; "
        "--gradient_accumulation_steps follows from it.",
    )

    sequence_parallel: int = setting(
        1, "Ranks that share each row, a part of its tokens each, for rows that one rank has no memory for."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if getattr(self, "max_length", None) == -1:  # which TRL's null is on a command line
            vars(self)["max_length"] = None  # it would cut the last token off
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        check_groups(self.sequence_parallel, ranks)
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = accumulation_steps(
                self.global_batch_size,
                micro_batch_size=self.per_device_train_batch_size,
                given=self.gradient_accumulation_steps,
                world_size=ranks // self.sequence_parallel,
            )
        if isinstance(self.deepspeed, str) and not self.deepspeed.lstrip().startswith("{"):
            self.deepspeed = find_ds_config(self.deepspeed)
        ds_config = given_ds_config(self.deepspeed)
        check_sections(ds_config)
        if ds_config and not {"train_batch_size", MUST_MATCH[0]} & ds_config.keys():  # DeepSpeed needs one of the two
            self.deepspeed = dict.fromkeys(MUST_MATCH, "auto") | ds_config
        if not self.use_cpu and (why := why_no_gpu()):
            raise UserError(f"{why}; --use_cpu true trains on CPUs.")
        check_accelerator()
        if not torch.cuda.is_available():
            self.use_cpu = True  # has Accelerate start gloo
            self.bf16 = bool(self.bf16)  # asked for, not by default: few CPUs multiply in bf16
        if self.use_cpu and getattr(self, "activation_offloading", False):
            raise UserError("--activation_offloading true: without a GPU all is on the host; leave it out.")
        if isinstance(self.report_to, str) and "," in self.report_to:
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        known_trackers = ["all", "none", *get_available_reporting_integrations()]
        known_trackers += [name for name, is_there in _NOT_LISTED.items() if is_there()]
        if unknown := [name for name in trackers if name not in known_trackers]:
            raise UserError(
                f"--report_to {unknown[0]}: unknown, or its package is not installed; installed are "
                f"{', '.join(known_trackers[2:])}; or give none."
            )
        if self.fsdp:
            raise UserError(f"--fsdp {self.fsdp}: training is sharded by DeepSpeed's ZeRO; leave it out.")
        optim = getattr(self.optim, "value", self.optim)
        ours, known = optim == LISA_ADAMW, [name.value for name in OptimizerNames]
        if not ours and optim not in known:
            raise UserError(f"--optim {optim}: unknown; choose {LISA_ADAMW} or one of {', '.join(known)}.")
        if ours:  # which the Trainer's arguments do not know
            self.optim = "adamw_torch_fused"
        try:
            super().__post_init__()
        except (ValueError, ImportError, OSError, OverflowError) as error:
            raise refused_upstream(error, self) from error
        if ours:
            self.optim = LisaOptimizerNames.LISA_ADAMW


def check_ranges(arguments: Any) -> None:
    """Raise UserError for a number of one of a run's dataclasses that is out of its range."""
    for name, (rule, holds) in _RANGES.items():
        value = getattr(arguments, name, None)  # one that a task lacks is not given
        if value is not None and not holds(value):
            raise UserError(f"--{name} {value}: {rule}.")
        if value is not None and value > _LARGEST and name not in ("seed", "hang_timeout"):
            raise UserError(f"--{name} {value}: at most 1e9.")
    for name in _OBJECTS:
        value = getattr(arguments, name, None)
        if isinstance(value, str) and not value.startswith("{"):
            raise UserError(f'--{name} {value}: give an object in JSON, such as {{"name": 1}}.')


def refused_upstream(error: Exception, arguments: Any) -> UserError:
    """What transformers or TRL refuse, in one line, with the flag that they name or whose value alone they quote."""
    text, fields = in_one_line(error), type(arguments).__dataclass_fields__
    given = {name: value for name, value in vars(arguments).items() if name in fields and value != fields[name].default}
    given = hide_secrets(given)

    def is_quoted(value: object) -> bool:
        return isinstance(value, str) and any(f"{quote}{value}{quote}" in text for quote in "'\"`")

    named = [name for name in given if re.search(rf"(?<!\w){name}(?!\w)", text)]
    named = named or [name for name in given if is_quoted(given[name])]
    is_clear = len(named) == 1 and not text.startswith("--")
    return UserError(f"--{named[0]} {given[named[0]]}: {text}" if is_clear else text)


def accumulation_steps(global_batch_size: int, micro_batch_size: int, given: int, world_size: int) -> int:
    """Micro-batches of a rank in a global batch; `given` are --gradient_accumulation_steps, where 1 stands for none."""
    at_once = micro_batch_size * world_size
    flag, steps = f"--global_batch_size {global_batch_size}", global_batch_size // at_once
    if global_batch_size < 1 or global_batch_size % at_once:
        one = f"--per_device_train_batch_size {micro_batch_size}"
        raise UserError(f"{flag}: must be a multiple of {at_once}, which {one} is on {world_size} ranks.")
    if given not in (1, steps):
        both = f"{flag} and --gradient_accumulation_steps {given}"
        raise UserError(f"{both}: give one of them; on {world_size} ranks it is {steps}.")
    return steps


@dataclass
class LisaSFTConfig(TrainingFlags, SFTConfig):
    """TRL's SFTConfig, with the flags of every task."""


@dataclass
class LisaDPOConfig(TrainingFlags, DPOConfig):
    """TRL's DPOConfig, with the flags of every task."""


@dataclass
class LisaKTOConfig(TrainingFlags, KTOConfig):
    """TRL's KTOConfig, with the flags of every task."""


@dataclass
class LisaORPOConfig(TrainingFlags, ORPOConfig):
    """TRL's ORPOConfig, with the flags of every task."""


@dataclass
class LisaRewardConfig(TrainingFlags, RewardConfig):
    """TRL's RewardConfig, with the flags of every task."""


@dataclass
class LisaGRPOConfig(TrainingFlags, GRPOConfig):
    """TRL's GRPOConfig, with the flags of every task."""


CONFIGS: dict[str, Any] = {
    SFT: LisaSFTConfig,
    "dpo": LisaDPOConfig,
    KTO: LisaKTOConfig,
    "orpo": LisaORPOConfig,
    REWARD: LisaRewardConfig,
    GRPO: LisaGRPOConfig,
}
