"""`--lisa_preset` of a run: what it sets, where the user has not."""

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from transformers.training_args import OptimizerNames

from lisa_dist.ds_config import read_ds_config, uses_optimizer_offload
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.presets import PRESETS, choose_preset
from lisa_dist.tasks import GRPO
from lisa_dist.train.arguments import RunConfig
from lisa_dist.train.checks import precision_of_arguments
from lisa_dist.train.training_flags import LisaOptimizerNames


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
