"""What of a run cannot work, found before ranks meet and a model is loaded."""

import copy
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from trl import SFTConfig

from lisa_dist.config_rules import AUTO_LAYERS, LORA_LAYERS, PLANNED_LAYERS
from lisa_dist.core.blocks import number_of_decoder_layers, why_not_trained
from lisa_dist.core.checkpointing import AUTO, number_of_layers, parse_checkpointed_layers
from lisa_dist.core.engine_config import check_eval_frozen_bits, prepare_ds_config
from lisa_dist.core.layer_weights import load_layer_weights, split_columns
from lisa_dist.core.weight_store import check_store
from lisa_dist.ds_config import given_ds_config
from lisa_dist.errors import UserError
from lisa_dist.files import check_folder, read_text
from lisa_dist.memory.planner import fewest_of_lora
from lisa_dist.tasks import GRPO, KTO, REWARD, SFT, refuse_flags_of_sft
from lisa_dist.text import in_one_line, no_such_model
from lisa_dist.train.argument_checks import check_ds_arguments, check_evaluation, check_loss_type, check_schedule
from lisa_dist.train.arguments import RunConfig
from lisa_dist.train.attention import packs_documents
from lisa_dist.train.auto_layers import check_auto_layers
from lisa_dist.train.checks import (
    check_compiled_layers,
    check_parallelism,
    check_precision,
    check_quantization,
    check_sampling,
    precision_of_arguments,
)
from lisa_dist.train.compiled_layers import check_compile
from lisa_dist.train.given_paths import begins, check_model_folder
from lisa_dist.train.liger import check_liger
from lisa_dist.train.loss import check_loss_of_run
from lisa_dist.train.training_flags import LisaOptimizerNames

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
# Of a model's configuration.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def check_config(config: RunConfig) -> None:
    """Raise UserError, of one line, for arguments that do not go together, and change none of them."""
    try:
        _check(config)
    except UserError as error:  # with values as they were given, line breaks and all
        raise UserError(in_one_line(error)) from error


def _check(config: RunConfig) -> None:
    method, training = config.run.method, config.training
    if config.run.task == SFT:
        _check_sft(training)
    else:
        _check_task(config)
    if not training.output_dir:
        raise UserError("--output_dir is empty: give a folder.")
    check_folder("--output_dir", Path(str(training.output_dir)))
    loads_by: Any = training.model_init_kwargs  # JSON of a command line is an object by now
    for name in loads_by or {}:
        if name in _FLAGS_OF_LOADING:
            raise UserError(f"--model_init_kwargs {name}: give --{_FLAGS_OF_LOADING[name]} in its place.")
    check_model_folder(str(config.model.model_name_or_path), loads_by or {})
    ds_config = given_ds_config(training.deepspeed)
    check_ds_arguments(training, ds_config)
    check_precision(training)
    check_schedule(training)
    check_loss_type(training)
    check_evaluation(training, bool(config.data.eval_rows or config.data.eval_dataset_name))
    check_compile(training, ds_config, switches=method == "lisa")
    model_config = _known_model_config(config)
    if (why := why_not_trained(model_config, config.run.task)) is not None:
        raise UserError(f"--model_name_or_path {config.model.model_name_or_path}: {why}.")
    if config.run.loss != AUTO:
        check_loss_of_run(config, model_config)
    if method != "lora":  # whose adapters train on any weights
        check_quantization(str(config.model.model_name_or_path), model_config)
    check_eval_frozen_bits(config.run.eval_frozen_bits, config.lisa)
    if method != "lisa":
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
        return
    check_compiled_layers(training, config.lisa)
    check_parallelism(training)
    check_store(config.lisa.lisa_frozen_store)
    check_auto_layers(config)
    prepare_ds_config(ds_config, config.lisa, training.optim, precision_of_arguments(training))
    _check_layers(config, model_config)


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
        if config.lisa.lisa_probe_steps:
            raise UserError(f"--lisa_probe_steps with --task {task}: its rows have no held-out loss; leave it out.")


def _check_layers(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Check what depends on the number of layers, before the model is loaded and anything is written."""
    if config.training.use_liger_kernel:
        check_liger(copy.copy(config.training), model_config, config.lisa, trl_head=config.run.task != REWARD)
    num_layers = number_of_decoder_layers(model_config)
    max_steps = max(0, config.training.max_steps) if begins(config.training) else 0
    check_sampling(config.lisa, model_config, num_layers, max_steps)
    checkpointed = parse_checkpointed_layers(config.run.checkpointed_layers)
    if isinstance(checkpointed, int):
        number_of_layers(checkpointed, num_layers)
    if config.lisa.lisa_weights_file is not None:
        read_text("--lisa_weights_file", split_columns(config.lisa.lisa_weights_file)[0])
        num_active = config.lisa.lisa_activated_layers
        fewest = {LORA_LAYERS: fewest_of_lora(num_layers), AUTO_LAYERS: 1}
        num_active = fewest.get(num_active, num_active)
        load_layer_weights(config.lisa.lisa_weights_file, num_layers, num_active)


def _known_model_config(config: RunConfig) -> PretrainedConfig:
    try:
        model_config = model_config_of(config)
        sizes = model_config.get_text_config().to_dict()  # some models have one for each layer
        for name in _SIZES:
            if isinstance(size := sizes.get(name), int) and size < 0:
                raise ValueError(f"{name} {size}")
        return model_config
    except OSError as error:
        raise UserError(no_such_model(f"--model_name_or_path {config.model.model_name_or_path}", error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(
            f"--model_name_or_path {config.model.model_name_or_path}: its config.json is of no model that can be "
            f"trained ({in_one_line(error)})."
        ) from error


def model_config_of(config: RunConfig) -> PretrainedConfig:
    """The configuration of a run's model."""
    return AutoConfig.from_pretrained(
        str(config.model.model_name_or_path),
        revision=config.model.model_revision,
        trust_remote_code=config.training.trust_remote_code,
    )
