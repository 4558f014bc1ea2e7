"""`--lisa_preset` of a run: what it sets, where the user has not."""

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from transformers.training_args import OptimizerNames

from lisa_dist.ds_config import read_ds_config, uses_optimizer_offload
from lisa_dist.errors import UserError
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.presets import LORA, NONE, PRESETS, says_nothing_of_memory
from lisa_dist.tasks import GRPO
from lisa_dist.train.arguments import RunConfig
from lisa_dist.train.checks import precision_of_arguments
from lisa_dist.train.training_flags import LisaOptimizerNames


def apply_preset(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The run with its preset's settings, but those of the `given` names; `lisa_preset` names the preset.

    Without `--lisa_preset` it is lora where a user has said nothing of what it sets, and a step can be planned.
    """
    if config.run.method != "lisa":
        return config
    preset = config.run.lisa_preset or (LORA if _may_be_lora(config, given) else NONE)
    settings = {name: value for name, value in PRESETS[preset].items() if name not in given}
    if preset == LORA:
        if config.lisa.by_module:  # of which --lisa_budget says how many train
            settings.pop("lisa_activated_layers", None)
        elif "lisa_activated_layers" in settings and not _can_be_planned(config):
            raise UserError(
                f"--lisa_preset {LORA}: it plans a step, by --max_length, and can plan none of --task {GRPO}; give "
                "--lisa_activated_layers too, or another preset."
            )
        _leave_out_what_cannot_be(settings, config)
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


def _may_be_lora(config: RunConfig, given: Collection[str]) -> bool:
    return says_nothing_of_memory(given) and _can_be_planned(config) and not _offloads(config)


def _can_be_planned(config: RunConfig) -> bool:
    return config.run.task != GRPO and bool(config.training.max_length)


def _leave_out_what_cannot_be(settings: dict[str, Any], config: RunConfig) -> None:
    """Small moments with another optimizer or with states on the host; no masters where weights are not in bf16."""
    has_others = "optim" not in settings and config.training.optim is not LisaOptimizerNames.LISA_ADAMW
    if has_others or _offloads(config) or config.lisa.offloaded:
        for name in ("optim", "lisa_state_bits", "lisa_master"):
            settings.pop(name, None)
    if precision_of_arguments(config.training) != "bf16":
        settings.pop("lisa_master", None)


def _offloads(config: RunConfig) -> bool:
    given = config.training.deepspeed
    return uses_optimizer_offload(given if isinstance(given, dict) else read_ds_config(str(given))) if given else False
