"""Parameters of a model, whole or cut by ZeRO-3: their sizes, and what this rank holds of them."""

import math
import re
from collections.abc import Callable
from typing import Any, Protocol

import torch

from lisa_dist.errors import UserError


class Original(Protocol):
    """Where the weights of a frozen parameter are that the device has in fewer bits, and nothing of in itself."""

    @property
    def original(self) -> torch.Tensor:
        """The weights, on the host."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the device has of them."""

    def load(self, value: torch.Tensor) -> None:
        """Take other weights."""


_ORIGINAL = "lisa_original"  # on a parameter
ADAPTER_PREFIX = "base_model.model."  # of the names in PEFT's files
OUR_ADAPTERS = "lisa_dist_adapters"  # on a model, PEFT's config of those of --lisa_adapters
_ADAPTER = re.compile(r"\.(lora_[AB])\.default\.weight$")


def naming_of(model: torch.nn.Module) -> Callable[[str], str]:
    """How the files of a model call its parameters: as it does, without the modules of --lisa_adapters."""
    return file_name if OUR_ADAPTERS in vars(model) else str


def file_name(name: str) -> str:
    """The name that the model's files have a parameter by, or PEFT's an adapter; without adapters its own."""
    adapter, found = _ADAPTER.subn(r".\1.weight", name)
    return ADAPTER_PREFIX + adapter if found else name.replace(".base_layer.", ".")


def set_original(parameter: torch.nn.Parameter, original: Original | None) -> None:
    """Say where the weights are of a parameter whose data is empty; None where they are in it again."""
    setattr(parameter, _ORIGINAL, original)


def original_of(parameter: torch.Tensor) -> Original | None:
    """Where the weights of a parameter are that is empty itself; None where they are in it, or in ranks' parts."""
    return getattr(parameter, _ORIGINAL, None)


def is_in_an_engine(parameter: torch.Tensor) -> bool:
    """Whether an engine has hooks of DeepSpeed's on the parameter's gradient."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return any(hook.__module__.startswith("deepspeed.") for hook in hooks.values())


def whole_weights(parameter: torch.Tensor) -> torch.Tensor:
    """The weights of a parameter, on the device or as their original on the host; ZeRO-3 must have gathered it."""
    quantized = original_of(parameter)
    return parameter.detach() if quantized is None else quantized.original


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has taken the parameter over: it is whole only while it is gathered."""
    return hasattr(parameter, "ds_id")


def parameter_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter; ZeRO-3, and fewer bits, leave [0] in `shape`."""
    quantized = original_of(parameter)
    return tuple(getattr(parameter, "ds_shape", parameter.shape) if quantized is None else quantized.original.shape)


def parameter_numel(parameter: torch.Tensor) -> int:
    """Elements of the whole parameter; ZeRO-3, and fewer bits, leave 0 in `numel()`."""
    return math.prod(parameter_shape(parameter))


def local_weights(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter: its part on ZeRO-3, padded (empty while on NVMe), else all of it.

    That is on the host where the device has it in fewer bits.
    """
    return parameter.ds_tensor.data if is_partitioned(parameter) else whole_weights(parameter)


def rows_of(parameter: Any, rows: slice) -> torch.Tensor:
    """Rows of a parameter that is whole; where ZeRO-3 has gathered it, they say so too."""
    found: torch.Tensor = parameter.detach()[rows]
    if is_partitioned(parameter):
        vars(found)["ds_status"] = parameter.ds_status
    return found


def local_tensors(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """What this rank's memory has of a parameter: its weights, or the codes that stand for them."""
    quantized = original_of(parameter)
    return [local_weights(parameter)] if quantized is None else quantized.tensors


def local_shard(parameter: Any) -> tuple[int, torch.Tensor]:
    """The first element of this rank's part of a parameter, and the part, flat, without padding.

    Without ZeRO-3 that is 0 and the whole parameter; under it a rank may have nothing. Raises ValueError where stage 3
    does not hold the weights as they are, as a run of another method may: on NVMe, or quantized.
    """
    if not hasattr(parameter, "ds_tensor"):
        return 0, whole_weights(parameter).to(parameter.device).reshape(-1)
    part = parameter.ds_tensor
    if part.status.name != "AVAILABLE" or not part.is_floating_point():
        raise UserError(
            "the DeepSpeed config keeps weights on NVMe (offload_param) or quantized "
            "(zero_quantized_nontrainable_weights), where they cannot be looked at; take a config without, such as "
            "zero3 or zero3_offload."
        )
    begin = torch.distributed.get_rank(parameter.ds_process_group) * part.ds_numel
    length = min(max(parameter.ds_numel - begin, 0), part.ds_numel)
    return begin, part.detach().reshape(-1)[:length]
