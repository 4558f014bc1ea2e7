"""What a DeepSpeed config, a model and an engine must be for LISA; UserError with the setting and the way out."""

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from lisa_dist.config import LisaConfig
from lisa_dist.core.adapters import adapter_config
from lisa_dist.core.blocks import Blocks
from lisa_dist.ds_config import check_ds_config, cuts_weights, keep_no_master, offload_by_block, uses_optimizer_offload
from lisa_dist.errors import UserError
from lisa_dist.optim.adamw import LisaAdamW
from lisa_dist.optim.build import check_optim
from lisa_dist.optim.states import PartitionKey
from lisa_dist.zero.parameters import is_in_an_engine, original_of
from lisa_dist.zero.partitions import ZeroPartitions


def prepare_ds_config(ds_config: dict[str, Any], config: LisaConfig, optim: str, precision: str) -> None:
    """Check a DeepSpeed config against the settings of a run, and change it in place to what they ask for.

    `precision` is that of the weights, "bf16", "fp16" or "fp32".
    """
    check_ds_config(ds_config)
    offload_by_block(ds_config, config.offloaded)
    _check_frozen(ds_config, config, precision)
    check_optim(optim, uses_optimizer_offload(ds_config), config, precision)
    if config.lisa_master != "fp32":
        keep_no_master(ds_config)


def _check_frozen(ds_config: dict[str, Any], config: LisaConfig, precision: str) -> None:
    flags = config.frozen_flags
    if not flags:
        return
    if cuts_weights(ds_config):
        raise UserError(
            f"{flags[0]} on ZeRO stage 3: it cuts frozen layers between the ranks, where each has its part in 16 bits; "
            "use --deepspeed zero2, or leave the flag out."
        )
    if precision == "fp16" and config.frozen_form == "fp8":
        raise UserError(f"{flags[0]} with weights in fp16: GPUs give products of fp8 in bf16; give --bf16 true.")
    if precision == "fp32":
        raise UserError(f"{flags[0]} with weights in fp32: what is frozen is 16 bits wide; give --bf16 true.")


def check_eval_frozen_bits(bits: int | None, config: LisaConfig) -> None:
    """Raise UserError for bits that frozen layers do not have in an evaluation (`--eval_frozen_bits`)."""
    if bits not in (None, 16, config.frozen_form):
        allowed = " or ".join(sorted({"16", config.lisa_frozen_bits} - {"fp8"}, key=int))
        raise UserError(
            f"--eval_frozen_bits {bits}: frozen layers are evaluated as they are quantized, or with their originals: "
            f"with --lisa_frozen_bits {config.lisa_frozen_bits} give {allowed}."
        )


def check_no_adapters(model: nn.Module, rank: int | None = None) -> None:
    """Raise UserError for a model of peft's, or with other adapters in it than --lisa_adapters of this rank gives."""
    if rank is not None and adapter_config(model).get("r") == rank:
        return
    peft = sys.modules.get("peft")  # which has been imported where there are any
    if peft is not None:
        kinds = (peft.tuners.tuners_utils.BaseTunerLayer, peft.PeftModel)
        if any(isinstance(module, kinds) for module in model.modules()):
            raise UserError(
                f"{type(model).__name__} has adapters (peft): LISA trains the model's own weights; give it the model "
                "without them, saved and loaded anew, and --lisa_adapters for new ones beside its layers; --method "
                "lora trains adapters alone."
            )


def check_not_quantized(model: nn.Module) -> None:
    """Raise UserError for a model that another run has: trains still, or has left with frozen layers in fewer bits."""
    if any(is_in_an_engine(parameter) for parameter in model.parameters()):
        raise UserError(
            f"this {type(model).__name__} is in a DeepSpeed engine of another trainer or loop that has not ended: end "
            "it, by close() of its controller or destroy() of its engine, or load the model anew."
        )
    if any(original_of(parameter) is not None for parameter in model.parameters()):
        raise UserError(
            f"the frozen layers of this {type(model).__name__} are quantized by an earlier run "
            "(--lisa_frozen_bits): load the model anew."
        )


def check_weights(blocks: Blocks) -> None:
    """Raise UserError for quantized weights, or of 8 bits, in any block that LISA may train."""
    for block in (one for one in blocks if one is not blocks.outside):
        for name, parameter in block.parameters.items():
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                raise UserError(
                    f"{name} is {str(parameter.dtype).removeprefix('torch.')}: LISA trains the weights themselves, in "
                    "16 or 32 bits; load the model in bf16."
                )


def check_engine(partitions: ZeroPartitions, config: LisaConfig, expected_keys: Sequence[PartitionKey]) -> None:
    """Raise UserError for an engine whose groups, masters or gradients do not fit; `expected_keys` are the groups'."""
    if config.lisa_state == "keep" and partitions.engine.zero_round_robin_gradients():
        raise UserError(
            "the DeepSpeed config has round_robin_gradients = true: with --lisa_state keep it must be false."
        )
    _check_masters(partitions, config)
    keys = partitions.keys()
    if list(expected_keys) != keys:
        raise UserError(
            f"The engine optimizes {len(keys)} groups of parameters, but the active blocks have {len(expected_keys)}. "
            "If the DeepSpeed config has zero_optimization.sub_group_size, leave it out or make it larger than a "
            "block. In a training loop of your own, build the optimizer from the controller's param_groups()."
        )


def _check_masters(partitions: ZeroPartitions, config: LisaConfig) -> None:
    keys = "bf16_master_weights_and_grads and bf16_optimizer_states in the bf16 section of the DeepSpeed config"
    without_masters = config.lisa_master == "bf16_sr"
    if without_masters and not (partitions.keeps_no_masters and isinstance(partitions.optimizer, LisaAdamW)):
        raise UserError(
            f"--lisa_master bf16_sr: the engine was built with masters, or with another optimizer; set {keys}, and "
            'take build_optimizer(..., "lisa_adamw"), as lisa_dist.initialize does.'
        )
    if partitions.keeps_no_masters and not without_masters:
        raise UserError(
            f"--lisa_master fp32: the engine keeps no masters in fp32, by {keys}; leave them out, or use "
            "--lisa_master bf16_sr with --optim lisa_adamw."
        )
