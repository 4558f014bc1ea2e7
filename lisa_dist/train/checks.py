"""Checks of a trainer's arguments: what LISA cannot train with is refused before anything is built."""

import os
import shutil
from collections.abc import Iterable, Sized
from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DynamoBackend, parse_flag_from_env
from deepspeed.accelerator import get_accelerator
from transformers import TrainingArguments

from lisa_dist.config import LisaConfig
from lisa_dist.core.engine_checks import prepare_ds_config
from lisa_dist.distributed.health import check_same_everywhere
from lisa_dist.ds_config import cuts_weights
from lisa_dist.errors import UserError
from lisa_dist.optim.ops import why_no_compiler

# Arguments that LISA refuses, and the reasons.
_REFUSED = {
    "auto_find_batch_size": "a smaller batch would need a new run",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 save a checkpoint anyway",
    "save_only_model": "a LISA checkpoint holds what a resume needs, which is little",
    "save_on_each_node": "all ranks write one checkpoint together, in a folder that every node sees",
}
_REFUSED_BY_ALL = ("enable_jit_checkpoint", "save_on_each_node")  # whatever the method
_MOVED = "CUDA graphs hold the addresses of weights, which a switch moves"


def precision_of_arguments(args: TrainingArguments) -> str:
    """ "bf16", "fp16" or "fp32"."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def check_numbers_of_examples(training: object, evaluation: object) -> None:
    """Raise UserError on ranks that have other numbers of examples: they would wait for each other at the end."""
    datasets = {"training": training, "evaluation": evaluation}
    sizes = {f"the number of {name} examples": len(one) for name, one in datasets.items() if isinstance(one, Sized)}
    check_same_everywhere(sizes, "give every rank the same datasets: each takes its share of them")


def check_saves(args: TrainingArguments, refused: Iterable[str] = _REFUSED_BY_ALL) -> None:
    """Raise UserError for arguments that change how checkpoints are saved."""
    for flag in refused:
        if getattr(args, flag):
            raise UserError(f"--{flag} True: {_REFUSED[flag]}; leave it out.")


def check_precision(args: TrainingArguments) -> None:
    """Raise UserError for fp16 on a device without it, and for fp8, which only Accelerate's environment can ask for."""
    if precision_of_arguments(args) == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(
            "--fp16 True: this device does not compute in fp16. Use --bf16 true, or leave both out for fp32."
        )
    if precision_of_arguments(args) == "fp32" and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise UserError(
            "ACCELERATE_MIXED_PRECISION=fp8: the layers that it puts in the model keep scales of their own, which no "
            "switch moves; unset it and give --bf16 True."
        )


def check_parallelism(args: TrainingArguments) -> None:
    """Raise UserError where ranks would share layers or rows, as a script or Accelerate's environment can ask for."""
    given = args.parallelism_config
    if given is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        given = ParallelismConfig()  # of the environment, as Accelerate makes it
    for name in ("tp_size", "cp_size", "sp_size"):
        if (size := getattr(given, name, 1)) > 1:
            raise UserError(
                f"parallelism_config has {name} = {size}: ranks share the model by ZeRO alone; make it 1. Rows are "
                "shared by --sequence_parallel, or by sp_size of the arguments' parallelism_config."
            )


def check_compile(args: TrainingArguments, ds_config: dict[str, Any], lisa_config: LisaConfig | None) -> None:
    """Raise UserError where decoder layers cannot be compiled, each by itself.

    Under LISA, whose `lisa_config` is given, nor where two graphs do not serve all periods: for modules, and for
    weights made whole in a pass.
    """
    if not args.torch_compile:
        return
    backend, mode = str(args.torch_compile_backend), args.torch_compile_mode
    if cuts_weights(ds_config):
        raise UserError(
            "--torch_compile True on ZeRO stage 3: it gathers weights module by module, and a graph ends at each; use "
            "stage 1 or 2, as by --deepspeed zero2, or leave it out."
        )
    if args.use_liger_kernel:
        raise UserError(
            "--torch_compile True with --use_liger_kernel True: both fuse the norms and MLP of a layer; give one."
        )
    known = [name for name in torch.compiler.list_backends(exclude_tags=()) if name.upper() in DynamoBackend.list()]
    if backend not in known:
        raise UserError(f"--torch_compile_backend {backend}: unknown; choose one of {', '.join(known)}.")
    if lisa_config is not None and backend == "cudagraphs":
        raise UserError(f"--torch_compile_backend cudagraphs: {_MOVED}; use inductor.")
    if mode is not None and backend != "inductor":
        raise UserError(f"--torch_compile_mode {mode}: is for inductor, not --torch_compile_backend {backend}.")
    if lisa_config is not None and lisa_config.by_module:
        raise UserError(
            "--torch_compile True with --lisa_unit module: a layer has a graph for each set of its modules; give one "
            "of the two."
        )
    if lisa_config is not None and lisa_config.frozen_flags:
        raise UserError(
            f"--torch_compile True with {lisa_config.frozen_flags[0]}: a graph ends where a pass gets the weights of "
            "frozen layers; give one of the two."
        )
    if backend != "inductor":
        return
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise UserError(f"--torch_compile_mode {mode}: unknown; choose one of {', '.join(modes)}.")
    if lisa_config is not None and mode is not None and modes[mode].get("triton.cudagraphs"):
        raise UserError(f"--torch_compile_mode {mode}: {_MOVED}; use default or max-autotune-no-cudagraphs.")
    if args.use_cpu:
        compiler = os.environ.get("CXX", "g++")
        missing = "" if shutil.which(compiler) else f"there is no C++ compiler {compiler}: apt install g++, or set CXX"
    else:
        missing = why_no_compiler()
    if missing:
        raise UserError(f"--torch_compile True: {missing}, or leave the flag out.")


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
    check_compile(args, ds_config, lisa_config)
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
    check_saves(args, _REFUSED)
    if args.optim_args or optimizer_class is not None:
        raise UserError(
            f"--optim_args {args.optim_args} and optimizer_cls_and_kwargs have no effect under LISA: use "
            "--optim, --learning_rate, --weight_decay, --adam_beta1, --adam_beta2 and --adam_epsilon."
        )
