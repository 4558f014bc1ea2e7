"""What `lisa-dist plan` and `init` take where nothing is given: layers and states, a global batch, a learning rate."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, TypeVar

from transformers import PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.core.meta_model import model_without_weights
from lisa_dist.ds_config import read_ds_config, uses_optimizer_offload
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.model_names import is_tuned
from lisa_dist.presets import choose_preset
from lisa_dist.tasks import GRPO, REWARD, SFT

GLOBAL_BATCH = 16  # examples of a step on all ranks: the paper's
SMALL_MODEL = 10**9  # parameters, below which a rate is ten times as high

Arguments = TypeVar("Arguments", bound=PlanArguments)


def with_accumulation(arguments: Arguments, given: Collection[str]) -> Arguments:
    """The same with as many micro-batches as make a global batch of 16; of grpo, whose answers they bound, as given."""
    if "gradient_accumulation_steps" in given or arguments.task == GRPO:
        return arguments
    micro_batches = max(1, GLOBAL_BATCH // (arguments.micro_batch_size * arguments.gpus))
    return replace(arguments, gradient_accumulation_steps=micro_batches)


def preset_settings(arguments: PlanArguments, lisa_config: LisaConfig, given: Collection[str]) -> dict[str, Any]:
    """What `--lisa_preset`, or the one by default, sets in a run of these flags."""
    if arguments.method != "lisa":
        return {}
    config = arguments.deepspeed
    offloads = uses_optimizer_offload(read_ds_config(config)) if config else False
    return choose_preset(
        arguments.lisa_preset,
        given,
        optim=arguments.optim,
        offloads=offloads or bool(lisa_config.offloaded),
        by_module=lisa_config.by_module,
        in_bf16=arguments.precision == "bf16",
        can_plan=arguments.task != GRPO,
    )[1]


def with_settings(
    arguments: Arguments, lisa_config: LisaConfig, settings: dict[str, Any]
) -> tuple[Arguments, LisaConfig]:
    """Both with what a preset sets."""
    of_lisa = {name: value for name, value in settings.items() if name != "optim"}
    return replace(arguments, optim=settings.get("optim", arguments.optim)), replace(lisa_config, **of_lisa)


def learning_rate(model: str, config: PretrainedConfig, task: str = SFT) -> float:
    """A rate to begin with (docs/choosing.md): by the model's size, whether it is tuned already, and the task."""
    if sum(parameter.numel() for parameter in model_without_weights(config).parameters()) < SMALL_MODEL:
        rate = 1e-4
    else:
        rate = 1e-5 if is_tuned(model) else 2e-5
    return rate if task in (SFT, REWARD) else rate / 10
