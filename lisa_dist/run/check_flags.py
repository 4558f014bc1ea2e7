"""The arguments of a run as far as they can be checked alone, with its DeepSpeed config: no model is looked at."""

from typing import Any

import torch
from transformers import get_scheduler
from trl import SFTConfig

from lisa_dist.config_rules import PLANNED_LAYERS
from lisa_dist.core.checkpointing import AUTO, parse_checkpointed_layers
from lisa_dist.core.engine_checks import check_eval_frozen_bits, prepare_ds_config
from lisa_dist.ds_config import given_ds_config
from lisa_dist.errors import UserError
from lisa_dist.run.arguments import RunConfig
from lisa_dist.run.choose_layers import check_auto_layers
from lisa_dist.run.task_configs import LisaOptimizerNames
from lisa_dist.tasks import GRPO, KTO, REWARD, SFT, refuse_flags_of_sft
from lisa_dist.text import in_one_line
from lisa_dist.train.attention import packs_documents
from lisa_dist.train.checks import (
    check_compile,
    check_compiled_layers,
    check_parallelism,
    check_precision,
    precision_of_arguments,
)

# TRL flags for data that TRL tokenizes, and the flag to use here.
_NOT_TAKEN = {
    "dataset_text_field": "--dataset_columns text=COLUMN",
    "truncation_mode": "--long_examples, which cuts texts into several examples",
    "dataset_kwargs": "--dataset_format and --dataset_columns",
}
# What transformers takes by --model_init_kwargs too, and the flags by which it is checked.
_FLAGS_OF_LOADING = {
    "attn_implementation": "attn_implementation",
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
}


def check_flags(config: RunConfig) -> None:
    """Raise UserError for arguments that do not go together, or not with the DeepSpeed config."""
    method, training = config.run.method, config.training
    if config.run.task == SFT:
        _check_sft(training)
    else:
        _check_task(config)
    loads_by: Any = training.model_init_kwargs  # JSON of a command line is an object by now
    for name in loads_by or {}:
        if name in _FLAGS_OF_LOADING:
            raise UserError(f"--model_init_kwargs {name}: give --{_FLAGS_OF_LOADING[name]} in its place.")
    ds_config = given_ds_config(training.deepspeed)
    if training.deepspeed and (differing := training.hf_deepspeed_config.mismatches):  # which the first step ends in
        listed = "; ".join(each.removeprefix("- ") for each in differing)
        raise UserError(f'the DeepSpeed config and the arguments differ: {listed}; make them equal, or write "auto".')
    check_precision(training)
    _check_schedule(training)
    _check_evaluation(training, bool(config.data.eval_rows or config.data.eval_dataset_name))
    check_compile(training, ds_config, switches=method == "lisa")
    check_eval_frozen_bits(config.run.eval_frozen_bits, config.lisa)
    if method != "lisa":
        _check_other_method(config)
        return
    check_compiled_layers(training, config.lisa)
    check_parallelism(training)
    check_auto_layers(config)
    prepare_ds_config(ds_config, config.lisa, training.optim, precision_of_arguments(training))


def _check_other_method(config: RunConfig) -> None:
    method, training = config.run.method, config.training
    if config.lisa.lisa_frozen_bits != 16:
        raise UserError(
            f"--lisa_frozen_bits {config.lisa.lisa_frozen_bits} with --method {method}: it is for --method lisa; "
            "leave it out."
        )
    if training.resume_from_checkpoint == "auto":
        raise UserError(f"--resume_from_checkpoint auto: --method {method} takes a folder or true.")
    if training.optim is LisaOptimizerNames.LISA_ADAMW:
        raise UserError(
            f"--optim lisa_adamw with --method {method}: it is for --method lisa; "
            "give another, such as adamw_torch_fused."
        )


def _check_sft(training: SFTConfig) -> None:
    if packs_documents(training) and training.max_length is None:
        raise UserError("--packing true needs a --max_length: that of the rows which examples share.")
    for flag, ours in _NOT_TAKEN.items():
        value = getattr(training, flag)
        if value != SFTConfig.__dataclass_fields__[flag].default:
            raise UserError(f"--{flag} {value}: has no effect here; use {ours}.")


def _check_task(config: RunConfig) -> None:
    task = config.run.task
    refuse_flags_of_sft(task, vars(config.run) | vars(config.data))
    if task == REWARD and config.run.sample_prompt:
        raise UserError(f"--sample_prompt with --task {task}: a reward model gives scores, not answers; leave it out.")
    training: Any = config.training
    for flag, why in (
        ("label_smoothing_factor", "the loss of this task has none"),
        ("sync_ref_model", "a checkpoint has no reference model, and a resumed run would be another"),
    ):
        if getattr(training, flag, None):
            raise UserError(f"--{flag} {getattr(training, flag)} with --task {task}: {why}; leave it out.")
    if task == KTO and training.per_device_train_batch_size < 2:
        raise UserError(
            "--per_device_train_batch_size 1 with --task kto: it compares the rows of a batch; give 2 or more."
        )
    if task == GRPO:  # whose micro-batches are answers, of lengths and in rows that nothing bounds beforehand
        for flag, value, not_taken in (
            ("lisa_activated_layers", config.lisa.lisa_activated_layers, PLANNED_LAYERS),
            ("checkpointed_layers", parse_checkpointed_layers(config.run.checkpointed_layers), (AUTO,)),
        ):
            if value in not_taken:
                raise UserError(f"--{flag} {value} with --task {task}: no step of it can be planned; give a number.")


def _check_schedule(training: Any) -> None:
    """Raise UserError for a schedule of the learning rate that cannot be built by its arguments."""
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate or 1.0)
    given = training.lr_scheduler_kwargs or {}
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=dict(given))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {given}: {in_one_line(error).rstrip('.')}."
        ) from error


def _check_evaluation(training: Any, has_held_out: bool) -> None:
    """Raise UserError for evaluations of nothing."""
    strategy = getattr(training.eval_strategy, "value", training.eval_strategy)
    if strategy != "no" and not has_held_out:
        raise UserError(
            f"--eval_strategy {strategy}: there are no rows to evaluate; give --eval_rows 100, or --eval_dataset_name."
        )
