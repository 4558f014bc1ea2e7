"""Checks of a trainer's arguments: what LISA cannot train with is refused before anything is built."""

import os
from collections.abc import Sized
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, TrainingArguments

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import PLANNED_LAYERS
from lisa_dist.core.blocks import find_blocks, split_into_modules
from lisa_dist.core.engine_config import prepare_ds_config
from lisa_dist.core.meta_model import model_without_weights
from lisa_dist.core.selection import unit_budget
from lisa_dist.distributed.health import check_same_everywhere
from lisa_dist.errors import UserError
from lisa_dist.train.compiled_layers import check_compile

# Arguments that LISA does without, and why.
_REFUSED = {
    "auto_find_batch_size": "a smaller batch would need a new run",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 save a checkpoint anyway",
    "save_only_model": "a LISA checkpoint holds what a resume needs, which is little",
    "save_on_each_node": "all ranks write one checkpoint together, in a folder that every node sees",
}


def precision_of_arguments(args: TrainingArguments) -> str:
    """ "bf16", "fp16" or "fp32"."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def check_numbers_of_examples(training: object, evaluation: object) -> None:
    """Raise UserError on ranks that have other numbers of examples: they would wait for each other at the end."""
    datasets = {"training": training, "evaluation": evaluation}
    sizes = {f"the number of {name} examples": len(one) for name, one in datasets.items() if isinstance(one, Sized)}
    check_same_everywhere(sizes, "give every rank the same datasets: each takes its share of them")


def check_precision(args: TrainingArguments) -> None:
    """Raise UserError for 8-bit arithmetic, which only Accelerate's environment can ask for."""
    if precision_of_arguments(args) == "fp32" and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise UserError(
            "ACCELERATE_MIXED_PRECISION=fp8: the layers that it puts in the model keep scales of their own, which no "
            "switch moves; unset it and give --bf16 True."
        )


def check_quantization(model: str, config: PretrainedConfig) -> None:
    """Raise UserError for a model whose weights are stored quantized, before it is loaded."""
    given = getattr(config, "quantization_config", None)
    if given is not None:
        how = given if isinstance(given, dict) else given.to_dict()
        raise UserError(
            f"--model_name_or_path {model}: its weights are quantized (quant_method {how.get('quant_method')}), and "
            "they are what trains; give a model in bf16, or save this one dequantized."
        )


def check_parallelism(args: TrainingArguments) -> None:
    """Raise UserError where ranks would share layers or rows, as a script or Accelerate's environment can ask for."""
    given = args.parallelism_config
    if given is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        given = ParallelismConfig()  # of the environment, as Accelerate makes it
    for name in ("tp_size", "cp_size", "sp_size"):
        if (size := getattr(given, name, 1)) > 1:
            raise UserError(
                f"parallelism_config has {name} = {size}: ranks share the model by ZeRO alone, each with rows of its "
                "own; make it 1."
            )


def check_compiled_layers(args: TrainingArguments, lisa_config: LisaConfig) -> None:
    """Raise UserError where two graphs do not serve all periods: for modules, and for matrices in fewer bits."""
    if args.torch_compile and lisa_config.by_module:
        raise UserError(
            "--torch_compile True with --lisa_unit module: a layer has a graph for each set of its modules; give one "
            "of the two."
        )
    if args.torch_compile and lisa_config.lisa_frozen_bits != 16:
        raise UserError(
            f"--torch_compile True with --lisa_frozen_bits {lisa_config.lisa_frozen_bits}: a graph ends where "
            "bitsandbytes makes a matrix of a frozen layer whole; give one of the two."
        )


def check_sampling(config: LisaConfig, model_config: PretrainedConfig, num_layers: int) -> None:
    """Raise UserError for layers or modules that this model cannot have.

    Modules of models that come with their own code, or see and hear too, are
    checked once they are loaded.
    """
    if config.lisa_activated_layers not in PLANNED_LAYERS:
        config.check_num_layers(num_layers)
    if config.by_module and type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model = model_without_weights(model_config)
        modules = split_into_modules(model, find_blocks(model, config.lisa_layers_attribute)).layers
        unit_budget(config, [module.numel for module in modules])


def check_trainer(
    args: TrainingArguments,
    ds_config: dict[str, Any] | None,
    lisa_config: LisaConfig,
    optim: str,
    optimizer: object | None,
    optimizer_class: object | None,
) -> None:
    """Raise UserError for arguments that LISA cannot train with; prepare the DeepSpeed config in place.

    `optimizer` and `optimizer_class` are what the user gave the Trainer, which must be nothing.
    """
    if ds_config is None and parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise UserError(
            "ACCELERATE_USE_CPU, which `accelerate launch --cpu` sets, turns DeepSpeed off, and LISA runs on its ZeRO: "
            "launch without --cpu; without GPUs CPU ranks are the default."
        )
    if ds_config is None:
        raise UserError(
            "LISA runs on DeepSpeed's ZeRO, on one GPU too: give a config, such as ds_configs/zero2.json, by "
            "--deepspeed."
        )
    check_precision(args)
    check_compile(args, ds_config, switches=True)
    check_compiled_layers(args, lisa_config)
    check_parallelism(args)
    prepare_ds_config(ds_config, lisa_config, optim, precision_of_arguments(args))
    if optimizer is not None:
        raise UserError("LISA builds the optimizer from its own blocks: pass no optimizers=(...) to the Trainer.")
    how: Any = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and how.get("use_reentrant"):
        raise UserError(
            "--gradient_checkpointing_kwargs use_reentrant=True: reentrant checkpointing gives no gradients where "
            "the layers before it are inactive; use the default, use_reentrant=False."
        )
    for flag, reason in _REFUSED.items():
        if getattr(args, flag):
            raise UserError(f"--{flag} True: {reason}; leave it out.")
    if args.optim_args or optimizer_class is not None:
        raise UserError(
            f"--optim_args {args.optim_args} and optimizer_cls_and_kwargs have no effect under LISA: use "
            "--optim, --learning_rate, --weight_decay, --adam_beta1, --adam_beta2 and --adam_epsilon."
        )
