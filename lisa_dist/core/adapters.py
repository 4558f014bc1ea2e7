"""Adapters beside LISA's layers (`--lisa_adapters`): in every period every decoder layer learns at least by its own.

They are PEFT's LoRA, without dropout, on the linear modules of all decoder layers, and one more always-trained block.
A sampled layer trains whole, and its adapters go on beside it. The blocks keep the names that the model's files have,
as if there were no adapters; the adapters' own are those of PEFT's files.

Source: Hu et al., "LoRA" (arXiv 2106.09685), section 4.1: W x + alpha / r B A x, B = 0 at the start.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from lisa_dist.core.blocks import Blocks
from lisa_dist.core.matrices import quantizable_matrices
from lisa_dist.errors import UserError
from lisa_dist.zero.parameters import ADAPTER_PREFIX, file_name, parameter_shape

ADAPTER_FILE = "adapter/adapter_model.safetensors"  # of a checkpoint or an exported model
SCALE = 2  # alpha over r, as most recipes have it
_A, _B = ".lora_A.weight", ".lora_B.weight"


def add_adapters(model: Any, blocks: Blocks, rank: int, seed: int = 0) -> None:
    """Put adapters of a rank beside the linear modules of all decoder layers; their parameters go to their block.

    What else trains or not stays as it was. All ranks get the same adapters, and a later run of the model goes on with
    them. Raises UserError for a rank that is larger than a matrix, and where no linear module is used by its own
    forward alone.
    """
    if blocks.adapters.parameters:  # of an earlier run of this model
        return
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    of_layers = quantizable_matrices(model, [layer.parameters for layer in blocks.layers])
    linear = {name: one for layer in of_layers for name, one in layer.items() if one.is_linear}
    flag = f"--lisa_adapters {rank}"
    if not linear:
        raise UserError(f"{flag}: the decoder layers of {type(model).__name__} have no linear modules; leave it out.")
    smallest = min(linear, key=lambda name: min(parameter_shape(linear[name].parameter)))
    if rank > (size := min(parameter_shape(linear[smallest].parameter))):
        raise UserError(f"{flag}: {smallest} has {size} rows or columns; an adapter's rank is at most that.")
    prefix = f"{blocks.layers_path}."
    ends = sorted({name.removeprefix(prefix).partition(".")[2].removesuffix(".weight") for name in linear})
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        target_modules=rf"{re.escape(prefix)}\d+\.(?:{'|'.join(map(re.escape, ends))})",
        fan_in_fan_out=any(isinstance(one.module, Conv1D) for one in linear.values()),
        task_type="CAUSAL_LM",
    )
    blocks.adapters.decaying = None  # all of them do: they are matrices
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    before = set(map(id, model.parameters()))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if id(parameter) in before:
            parameter.requires_grad_(id(parameter) in trained)
        else:
            parameter.data = parameter.data.to(next(iter(linear.values())).parameter.dtype)
            blocks.adapters.parameters[file_name(name)] = parameter
    vars(model)["lisa_dist_adapters"] = rank


def adapter_config(model: Any) -> dict[str, Any]:
    """PEFT's of a model with adapters, as adapter_config.json has it; nothing of one without."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    return configs["default"].to_dict() if configs else {}


def weight_of(adapter: str) -> str:
    """The name of the weight that an adapter's matrix, A or B, is beside."""
    return f"{adapter.removeprefix(ADAPTER_PREFIX).removesuffix(_A).removesuffix(_B)}.weight"


def merge(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Weights by name, and the adapters that are among them added, in fp32; `config` is PEFT's of these."""
    merged = {name: value for name, value in tensors.items() if not name.endswith((_A, _B))}
    for name in tensors.keys() - merged.keys():
        if name.endswith(_A):
            value, of_outputs = merged[weight_of(name)], tensors[name.removesuffix(_A) + _B]
            change = config["lora_alpha"] / config["r"] * (of_outputs.float() @ tensors[name].float())
            change = change.t() if config["fan_in_fan_out"] else change  # as GPT-2 has its matrices
            merged[weight_of(name)] = (value.float() + change).to(value.dtype)
    return merged
