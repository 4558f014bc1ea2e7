"""DeepSpeed's two ZeRO optimizer classes: where each keeps its groups, masters and weights, and which release has them.

A name that DeepSpeed has renamed is reported when training starts, by `check_private_names` or, where it is replaced,
by `override`, and not at the first switch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import deepspeed
import torch
from packaging.version import Version

from lisa_dist.errors import UserError

# From, up to but not including. Before 0.19.8 resumes of ZeRO-3 on CPU ranks fail our tests; its sources wait for the
# last of several gathers alone. There is no 0.20 yet to be tried.
SUPPORTED_DEEPSPEED = ("0.19.8", "0.20")
_INSTALL = "pip install 'deepspeed>={},<{}'".format(*SUPPORTED_DEEPSPEED)


@dataclass(frozen=True)
class Stage:
    """One of DeepSpeed's ZeRO optimizer classes, and where its instances (`zero` below) keep what LISA needs."""

    module: str  # where the engine looks the class up when it constructs it
    class_name: str
    groups_name: str  # lists of the model's parameters, one a group
    masters_name: str  # this rank's master of each group, flat
    offload_name: str  # whether DeepSpeed keeps the optimizer states on the host
    private_names: tuple[str, ...]  # what else this package reads, calls or overrides
    offload_names: tuple[str, ...] = ()  # the same where DeepSpeed keeps the optimizer states on the host

    @property
    def is_stage_3(self) -> bool:
        return self is STAGE_3

    @property
    def number(self) -> int:
        """3, or 2 for stages 1 and 2, whose partitions are alike."""
        return 3 if self.is_stage_3 else 2

    @property
    def optimizer_class(self) -> Any:
        return getattr(import_module(self.module), self.class_name)

    def groups(self, zero: Any) -> list[list[torch.nn.Parameter]]:
        """The model's parameters of each group."""
        groups: list[list[torch.nn.Parameter]] = getattr(zero, self.groups_name)
        return groups

    def groups_as_laid_out(self, zero: Any) -> list[list[torch.nn.Parameter]]:
        """The same in the order in which a partition has them; round_robin_gradients changes it on stages 1 and 2."""
        return self.groups(zero) if self.is_stage_3 else zero.round_robin_bit16_groups

    def masters(self, zero: Any) -> list[torch.Tensor]:
        """This rank's master of each group, flat."""
        masters: list[torch.Tensor] = getattr(zero, self.masters_name)
        return masters

    def flat_weights(self, zero: Any, index: int) -> torch.Tensor:
        """This rank's weights of a group, flat, in the dtype of the model."""
        if self.is_stage_3:
            weights: torch.Tensor = zero.fp16_partitioned_groups_flat[index]
            return weights
        rank = torch.distributed.get_rank(zero.real_dp_process_group[index])
        # Of the plain list: in the middle of a step `WeightsOfStep` would return something else.
        weights = list.__getitem__(zero.parallel_partitioned_bit16_groups, index)[rank]
        return weights

    def master_is_weights(self, zero: Any, index: int) -> bool:
        """Whether the optimizer steps the weights of a group themselves, without a separate master."""
        return self.masters(zero)[index].data_ptr() == self.flat_weights(zero, index).data_ptr()

    def alignment(self, zero: Any) -> int:
        """Partitions of stages 1 and 2 begin at multiples of so many elements; stage 3 has no alignment."""
        return 1 if self.is_stage_3 else zero.nccl_start_alignment_factor

    def offloads_optimizer(self, zero: Any) -> bool:
        """Whether DeepSpeed keeps masters and moments on the host."""
        return bool(getattr(zero, self.offload_name))


STAGE_1_2 = Stage(
    module="deepspeed.runtime.engine",
    class_name="DeepSpeedZeroOptimizer",
    groups_name="bit16_groups",
    masters_name="single_partition_of_fp32_groups",
    offload_name="cpu_offload",
    private_names=(
        "round_robin_bit16_groups",
        "nccl_start_alignment_factor",
        "params_already_reduced",
        "reduction_stream",
        "params_in_partition",
        "communication_data_type",
        "gradient_accumulation_dtype",
        "gradient_predivide_factor",
        "gradient_average",
        "postscale_gradients",
        "sequence_parallel_size",
        "get_gradient_for_reduction",
        "reduce_bucket_size",
        "use_grad_accum_attribute",
        "parallel_partitioned_bit16_groups",
        "real_dp_process_group",
    ),
    offload_names=("grad_position", "norm_for_param_grads"),
)
STAGE_3 = Stage(
    module="deepspeed.runtime.zero.stage3",
    class_name="DeepSpeedZeroOptimizer_Stage3",
    groups_name="fp16_groups",
    masters_name="fp32_partitioned_groups_flat",
    offload_name="offload_optimizer",
    private_names=(
        "parameter_offload",
        "_leaf_module_hooks",
        "initialize_ds_offload",
        "offload_param_pin_memory",
        "fp16_partitioned_groups_flat",
    ),
)
# Names that must exist: on every ZeRO optimizer, on the engine, on stage 3's parameter coordinator.
_COMMON_NAMES = (
    "_grad_acc_hooks",
    "averaged_gradients",
    "get_param_id",
    "model_parallel_group",
    "dp_process_group",
)
_ENGINE_NAMES = ("_configure_zero_optimizer", "param_names")
_COORDINATOR_NAMES = ("_invalidate_trace", "is_invalid_trace", "_clean_inflight_param_registry")
left_out: set[str] = set()  # names that stay DeepSpeed's own on optimizers that are built now, to compare with


def override(owner: Any, name: str, replacement: Any) -> None:
    """Put `replacement` in the place of an attribute that `owner`, an optimizer, a class or a module, must have."""
    if not hasattr(owner, name):
        raise _lacks(f"{getattr(owner, '__name__', type(owner).__name__)}.{name}")
    if name not in left_out:
        setattr(owner, name, replacement)


def check_deepspeed() -> None:
    """Raise ValueError when the installed DeepSpeed is outside the supported range."""
    version = Version(metadata.version("deepspeed"))
    lowest, below = SUPPORTED_DEEPSPEED
    if not Version(lowest) <= version < Version(below):
        raise UserError(
            f"DeepSpeed {version} is installed; LISA re-partitions its optimizer and supports {lowest} up to, not "
            f"including, {below}: {_INSTALL}."
        )


def check_pin_memory_backend() -> None:
    """Raise ValueError for the pinned-memory backend whose buffers do not outlive the optimizer that made them."""
    if os.environ.get("DS_PIN_MEMORY_BACKEND", "").lower() == "native":
        raise UserError(
            "DS_PIN_MEMORY_BACKEND=native: this backend frees buffers that a switch moves over; unset the variable."
        )


def stage_of(engine: deepspeed.DeepSpeedEngine) -> Stage:
    """The stage of an engine; ValueError for what LISA cannot re-partition."""
    if engine.zero_optimization_stage() == 0:
        raise UserError(
            "the DeepSpeed engine runs ZeRO stage 0: LISA re-partitions ZeRO states; set zero_optimization.stage to 1, "
            "which costs nothing more on one GPU (--deepspeed zero1)."
        )
    class_name = type(engine.optimizer).__name__
    for stage in (STAGE_1_2, STAGE_3):
        if class_name == stage.class_name:
            return stage
    if class_name == "BF16_Optimizer":
        raise UserError(
            "the DeepSpeed config has data_types.grad_accum_dtype = fp32 with bf16 at ZeRO stage 1, for which "
            "DeepSpeed takes an optimizer that LISA cannot re-partition: use stage 2, or leave grad_accum_dtype out."
        )
    raise UserError(f"DeepSpeed built a {class_name}, which LISA cannot re-partition: use plain ZeRO stage 1, 2 or 3.")


def check_private_names(engine: deepspeed.DeepSpeedEngine, stage: Stage, more: Sequence[str] = ()) -> None:
    """Raise ValueError naming what this DeepSpeed lacks of what the package uses; `more` names of the optimizer."""
    zero = engine.optimizer
    names = (*_COMMON_NAMES, *stage.private_names, stage.groups_name, stage.masters_name, stage.offload_name, *more)
    missing = [name for name in names if not hasattr(zero, name)]
    if not missing and stage.offloads_optimizer(zero):
        missing = [name for name in stage.offload_names if not hasattr(zero, name)]
    if getattr(import_module(stage.module), stage.class_name, None) is not type(zero):
        missing.append(f"{stage.module}.{stage.class_name}")
    missing += [f"engine.{name}" for name in _ENGINE_NAMES if not hasattr(engine, name)]
    if stage.is_stage_3:
        coordinator = zero.parameter_offload.get_param_coordinator()
        missing += [name for name in _COORDINATOR_NAMES if not hasattr(coordinator, name)]
        missing += [] if hasattr(import_module(stage.module), "defragment") else ["defragment"]
    if missing:
        raise _lacks(", ".join(missing), f"re-partition its {stage.class_name}")


def _lacks(names: str, purpose: str = "train under it") -> UserError:
    return UserError(
        f"DeepSpeed {metadata.version('deepspeed')} lacks {names}, which LISA needs to {purpose}: {_INSTALL}."
    )
