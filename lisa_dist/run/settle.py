"""A run's arguments with a value in the place of all that stands for others: its preset, what is auto, TRL's names."""

import copy
from collections.abc import Collection
from dataclasses import replace
from importlib import metadata
from typing import Any, NamedTuple

from transformers import PretrainedConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from transformers.training_args import OptimizerNames

from lisa_dist.core.checkpointing import parse_checkpointed_layers
from lisa_dist.ds_config import read_ds_config, uses_optimizer_offload
from lisa_dist.loss.liger import settle_liger
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.presets import PRESETS, choose_preset
from lisa_dist.run.arguments import ALL_LINEAR, RunConfig, model_config_of
from lisa_dist.run.choose_layers import settle_layers
from lisa_dist.run.choose_loss import choose_loss
from lisa_dist.run.task_configs import LisaOptimizerNames
from lisa_dist.tasks import GRPO, SFT
from lisa_dist.train.attention import choose_attention, packs_documents
from lisa_dist.train.checks import precision_of_arguments
from lisa_dist.train.step_memory import bytes_of_any_gpu

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Settled(NamedTuple):
    """A run in which nothing is auto: its arguments as TRL's trainer takes them, and lines of its header with reasons.

    `layers_line` is empty where the number of layers was given.
    """

    config: RunConfig
    loss: str
    loss_line: str
    attention_line: str
    layers_line: str


def apply_preset(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The run with its preset's settings, but those of the `given` names; `lisa_preset` names the preset."""
    if config.run.method != "lisa":
        return config
    given_optim = str(getattr(config.training.optim, "value", config.training.optim))
    preset, settings = choose_preset(
        config.run.lisa_preset,
        given,
        optim=given_optim,
        offloads=_offloads(config) or bool(config.lisa.offloaded),
        by_module=config.lisa.by_module,
        in_bf16=precision_of_arguments(config.training) == "bf16",
        can_plan=config.run.task != GRPO and bool(config.training.max_length),
    )
    training: Any = copy.copy(config.training)
    if (optim := settings.pop("optim", None)) is not None:
        training.optim = LisaOptimizerNames.LISA_ADAMW if optim == LISA_ADAMW else OptimizerNames(optim)
    return config._replace(
        run=replace(config.run, lisa_preset=preset), training=training, lisa=replace(config.lisa, **settings)
    )


def describe_preset(config: RunConfig) -> str:
    """What the settings of the run's preset are in it."""
    preset, values = config.run.lisa_preset, vars(config.lisa) | {"optim": config.training.optim}
    named = [name for name in PRESETS[str(preset)] if name != "lisa_activated_layers"]
    return f"{preset}: " + ", ".join(f"{name} {getattr(values[name], 'value', values[name]) or '-'}" for name in named)


def _offloads(config: RunConfig) -> bool:
    given = config.training.deepspeed
    return uses_optimizer_offload(given if isinstance(given, dict) else read_ds_config(str(given))) if given else False


def settle(config: RunConfig, resume_from: str | bool | None) -> Settled:
    """Settle checked arguments, in a copy; every rank calls it, and rank 0 decides what is planned.

    Raises UserError on all ranks where nothing fits.
    """
    config, model_config = config.copy(), model_config_of(config)
    _set_what_flags_stand_for(config, model_config)
    training = config.training
    attention, reason = choose_attention(
        config.model.attn_implementation,
        half_precision=precision_of_arguments(training) != "fp32",
        config=model_config,
        packed=config.run.task == SFT and packs_documents(training),
        use_cpu=training.use_cpu,
    )
    gpu_bytes = bytes_of_any_gpu(training.device)
    config, layers = settle_layers(config, model_config, resume_from, gpu_bytes)
    loss, why = choose_loss(config, model_config, gpu_bytes)
    _set_for_trl(config, attention)
    return Settled(config, loss, why, f"{attention} ({reason})", layers)


def _set_what_flags_stand_for(config: RunConfig, model_config: PretrainedConfig) -> None:
    method, training = config.run.method, config.training
    if training.deepspeed:  # transformers loads models by the config that was set last, as long as it is alive
        set_hf_deepspeed_config(training.hf_deepspeed_config)
    checkpointed = parse_checkpointed_layers(config.run.checkpointed_layers)
    if method != "lisa" and checkpointed is not None:  # all or none; which layers fit is planned for LISA alone
        # TRL reads the old name, the Trainer the new one, which it has set by the old before this.
        training.gradient_checkpointing = training.activation_checkpointing = checkpointed != 0
    if config.run.task == SFT and training.completion_only_loss is False:  # TRL's name for it
        config.data.train_on_inputs = True
    if method == "lora":
        model: Any = config.model  # whose targets are names to TRL, and one word to peft
        model.lora_target_modules = model.lora_target_modules or ALL_LINEAR
    if method == "lisa":
        settle_liger(training, model_config, config.lisa)


def _set_for_trl(config: RunConfig, attention: str) -> None:
    """For TRL's trainer, which loads the model and takes rows that are tokens already."""
    training = config.training
    given: Any = training.model_init_kwargs or {}
    loads_by = {
        "revision": config.model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": attention,
        "dtype": config.model.dtype or _DTYPES[precision_of_arguments(training)],
    } | given
    if config.run.task == "orpo":
        loads_by["device_map"] = None  # which would be auto, for one process with all GPUs
    training.model_init_kwargs = loads_by
    if config.run.task == SFT:
        training.assistant_only_loss, training.completion_only_loss = False, None
    training.chat_template_path = None


def installed_versions() -> dict[str, str]:
    """Versions of what decides on the numbers of a run."""
    return {name: metadata.version(name) for name in ("lisa_dist", "torch", "deepspeed", "transformers", "trl")}
