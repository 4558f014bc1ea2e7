"""What `TrainingArguments` do when they are made with `deepspeed=FILE` under a launcher, for others, and later."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from deepspeed import comm
from torch import distributed as dist
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from lisa_dist.distributed.devices import check_accelerator
from lisa_dist.distributed.health import ranks_of_hosts
from lisa_dist.distributed.ranks import set_rank
from lisa_dist.ds_config import fill_secondary_partitions, find_ds_config
from lisa_dist.errors import UserError
from lisa_dist.tasks import GRPO, KTO, has_reference
from lisa_dist.zero.cpu_ops import guard_builds, start_deepspeed

# What `accelerate launch --use_deepspeed` has for the arguments.
_OF_ACCELERATE = ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_DEEPSPEED_ZERO_STAGE")


def begin_deepspeed(arguments: Sequence[Any], given: str | dict | None, trainer: str | None = None) -> None:
    """Have the training arguments among a Trainer's own train under DeepSpeed, and DeepSpeed know of the ranks.

    `given`: a short name, a path or the content of a config; zero2 where neither it nor the arguments have one. Without
    a launcher this process is the only rank. `trainer` is the name of TRL's trainer, if it is one that may load a
    reference model. Raises UserError where there are two configs, or no arguments for one.
    """
    guard_builds()
    args = next((one for one in arguments if isinstance(one, TrainingArguments)), None)
    if args is not None:
        _use_deepspeed(args, given)
        copies: Any = args.accelerator_config
        copies.non_blocking = args.dataloader_pin_memory  # of batches to a GPU, for which the host need not wait
    elif given is not None:
        raise UserError("deepspeed: there are no training arguments that could take it; give the trainer args.")
    if dist.is_initialized() and not comm.is_initialized():
        # Accelerate has started gloo for CPU ranks, but DeepSpeed must know of it before it loads a model in parts.
        start_deepspeed()
    if (ours := getattr(args, "hf_deepspeed_config", None)) is not None:  # by which the Trainer may load its model
        fill_secondary_partitions(ours.config, ranks_of_hosts(), _has_reference(arguments, args, trainer))


def _has_reference(arguments: Sequence[Any], args: Any, trainer: str | None) -> bool:
    """Whether a trainer is given a second model, or loads one to compare with."""
    if sum(isinstance(one, torch.nn.Module) for one in arguments) > 1:
        return True
    task = {"DPOTrainer": "dpo", "KTOTrainer": KTO, "GRPOTrainer": GRPO, "RLOOTrainer": GRPO}.get(trainer or "", "")
    return has_reference(task, "lisa", getattr(args, "beta", None), getattr(args, "precompute_ref_log_probs", False))


def _use_deepspeed(args: Any, given: str | dict | None) -> None:
    wanted = given if isinstance(given, dict) else find_ds_config(given or "zero2")
    # An earlier trainer of this process leaves ACCELERATE_USE_DEEPSPEED, by which arguments take a config of nobody's.
    has_one = bool(args.deepspeed) or any(name in os.environ for name in _OF_ACCELERATE)
    if has_one and given is not None and args.deepspeed != wanted:  # the same is of an earlier trainer
        raise UserError("deepspeed: the training arguments have a DeepSpeed config too; give it in one place.")
    if not has_one:
        args.deepspeed = wanted
    if not has_one or not dist.is_initialized():
        # The group starts again, as DeepSpeed's: the arguments have started none, or another one of Accelerate's.
        set_rank()
        check_accelerator()
        if not torch.cuda.is_available():
            args.use_cpu, args.dataloader_pin_memory = True, False  # has Accelerate start gloo
        vars(args).pop("_setup_devices", None)  # a cached property
        assert args.device is not None
    if not has_one:
        args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(args.deepspeed)
        args.hf_deepspeed_config.trainer_config_process(args)
        args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config)
