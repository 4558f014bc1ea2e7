"""Adapters beside LISA's layers (`--lisa_adapters`): in every period every decoder layer learns at least by its own.

They are PEFT's LoRA, without dropout, on the linear modules of all decoder layers, and one more always-trained block.
A sampled layer trains whole, and its adapters go on beside it. The blocks keep the names that the model's files have,
as if there were no adapters; the adapters' own are those of PEFT's files.

Source: Hu et al., "LoRA" (arXiv 2106.09685), section 4.1: W x + alpha / r B A x, B = 0 at the start.
"""

import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from lisa_dist.core.blocks import Blocks
from lisa_dist.core.matrices import quantizable_matrices
from lisa_dist.errors import UserError
from lisa_dist.run_folder import ADAPTER_FILE
from lisa_dist.zero.parameters import ADAPTER_PREFIX, OUR_ADAPTERS, file_name, is_partitioned, parameter_shape

MODULES_TO_SAVE = "--lora_modules_to_save"
SCALE = 2  # alpha over r, as most recipes have it
_A, _B = ".lora_A.weight", ".lora_B.weight"


def check_modules_to_save(model: Any, names: Iterable[str]) -> None:
    """Raise UserError for a name that no module of the model ends in: peft would train no copy, without a warning."""
    modules = [name for name, _ in model.named_modules() if name]
    for given in names:
        if not any(name.endswith(given) for name in modules):
            raise UserError(
                f"{MODULES_TO_SAVE} {given}: {type(model).__name__} has no module whose name ends in {given}. Give a "
                "name of its modules, such as embed_tokens or lm_head."
            )


def add_adapters(model: Any, blocks: Blocks, rank: int, seed: int = 0) -> None:
    """Put adapters of a rank beside the linear modules of all decoder layers; their parameters go to their block.

    What else trains or not stays as it was. All ranks get the same adapters, and a later run of the model goes on with
    them. Linear modules of one row or column, which are gates, have none. As in PEFT, the rank may be larger than a
    small matrix.

    Raises:
        UserError: No linear module is used by its own forward alone.
    """
    blocks.adapters.decaying = None  # all of them do: they are matrices
    if blocks.adapters.parameters:  # of an earlier run of this model
        return
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    of_layers = quantizable_matrices(model, [layer.parameters for layer in blocks.layers])
    linear = {name: one for layer in of_layers for name, one in layer.items() if one.is_linear}
    linear = {name: one for name, one in linear.items() if min(parameter_shape(one.parameter)) > 1}
    if not linear:
        raise UserError(
            f"--lisa_adapters {rank}: the decoder layers of {type(model).__name__} have no linear modules. Give "
            "--lisa_preset none, which samples layers."
        )
    prefix = f"{blocks.layers_path}."
    paths = [name.removeprefix(prefix).removesuffix(".weight") for name in linear]
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        target_modules=paths,
        fan_in_fan_out=any(isinstance(one.module, Conv1D) for one in linear.values()),
    )
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    before = set(map(id, model.parameters()))
    with torch.random.fork_rng(devices=()), torch.device("meta" if next(model.parameters()).is_meta else "cpu"):
        torch.random.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model.get_submodule(blocks.layers_path))  # of a whole model PEFT changes names
    for name, parameter in model.named_parameters():
        if id(parameter) in before:
            parameter.requires_grad_(id(parameter) in trained)
        else:
            parameter.data = parameter.data.to(next(iter(linear.values())).parameter.dtype)
            blocks.adapters.parameters[file_name(name)] = parameter
    ends = sorted({path.partition(".")[2] for path in paths})
    config.target_modules = rf"{re.escape(prefix)}\d+\.(?:{'|'.join(map(re.escape, ends))})"
    vars(model)[OUR_ADAPTERS] = config


def adapter_config(model: Any) -> dict[str, Any]:
    """PEFT's of a model with adapters, as adapter_config.json has it; nothing of one without."""
    config = vars(model).get(OUR_ADAPTERS)
    return {} if config is None else config.to_dict()


def save_config(model: Any, folder: Path) -> None:
    """Write adapter_config.json of a model with adapters into the folder that `ADAPTER_FILE` has."""
    vars(model)[OUR_ADAPTERS].save_pretrained(str((folder / ADAPTER_FILE).parent))


def loads_adapter(model: Any, folder: Path) -> bool:
    """Whether PEFT puts the adapter that a folder has on this model by the names that it has there."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    path = folder / ADAPTER_FILE
    with safe_open(path, framework="pt") as file:
        names = {*file.keys()}
    adapted: Any = get_peft_model(model, LoraConfig.from_pretrained(str(path.parent)))
    return names == set(get_peft_model_state_dict(adapted))


def merge_in_state(module: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Whoever saves a model by its state dict has adapters merged; a hook of torch's. Of ZeRO-3 nobody can."""
    if not any(is_partitioned(parameter) for parameter in module.parameters()):
        named = {file_name(key.removeprefix(prefix)): state.pop(key) for key in [*state] if key.startswith(prefix)}
        state |= {prefix + name: value for name, value in merge(named, adapter_config(module)).items()}


def weight_of(adapter: str) -> str:
    """The name of the weight that an adapter's matrix, A or B, is beside."""
    return f"{adapter.removeprefix(ADAPTER_PREFIX).removesuffix(_A).removesuffix(_B)}.weight"


def beside(weights: Container[str], blocks: Blocks) -> dict[str, torch.Tensor]:
    """The adapters of these weights, by name."""
    return {name: value for name, value in blocks.adapters.parameters.items() if weight_of(name) in weights}


def merge(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Weights by name, adapters among them added in fp32; `config` is PEFT's of these, empty where there are none."""
    if not config:
        return {**tensors}
    merged = {name: value for name, value in tensors.items() if not name.endswith((_A, _B))}
    for name in tensors.keys() - merged.keys():
        if name.endswith(_A):
            value, of_outputs = merged[weight_of(name)], tensors[name.removesuffix(_A) + _B]
            change = config["lora_alpha"] / config["r"] * (of_outputs.float() @ tensors[name].float())
            change = change.t() if config["fan_in_fan_out"] else change  # as GPT-2 has its matrices
            merged[weight_of(name)] = (value.float() + change).to(value.dtype)
    return merged
