"""A ladder of settings, from the method as published to what gives most of it up for memory: the first that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import AUTO_LAYERS
from lisa_dist.errors import UserError
from lisa_dist.memory.plan import WAYS, Plan, PlanArguments
from lisa_dist.memory.plans import make_plans, what_fits, with_most_layers
from lisa_dist.memory.trace import FakeRuns
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.presets import SMALL_STATES


@dataclass(frozen=True)
class Rung:
    """Settings besides those that are given; `optim` where they need one; whether states are on the host."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    optim: str | None = None
    offloads: bool = False


_SAMPLED = {"lisa_always_on": "rest"}
_SMALL_NAME = "embeddings and head with a moment by row and column, layers with moments in 8 bits, no masters"
# States on the GPU come first: with offload a step waits for the host.
LADDER = (
    Rung("AdamW in 32 bits, as published"),
    Rung("moments of embeddings and head in 8 bits", {"lisa_state_bits": "embed=8,head=8"}),
    Rung(_SMALL_NAME, SMALL_STATES, LISA_ADAMW),
    Rung(f"{_SMALL_NAME}; frozen layers in 8 bits", SMALL_STATES | {"lisa_frozen_bits": 8}, LISA_ADAMW),
    Rung("embeddings and head sampled like layers", _SAMPLED),
    Rung(
        "embeddings and head sampled like layers, moments in 8 bits",
        _SAMPLED | {"lisa_state_bits": "embed=8,head=8,layers=8"},
    ),
    Rung(f"{_SMALL_NAME}; frozen layers in 4 bits", SMALL_STATES | {"lisa_frozen_bits": 4}, LISA_ADAMW),
    Rung("AdamW in 32 bits, as published; optimizer states on the host", offloads=True),
    Rung("embeddings and head sampled like layers, optimizer states on the host", _SAMPLED, offloads=True),
)


@dataclass(frozen=True)
class Chosen:
    """The first rung that fits, the fastest plan of it, and the arguments and settings that it is of."""

    rung: Rung
    plan: Plan
    arguments: PlanArguments
    lisa_config: LisaConfig


def first_that_fits(
    config: PretrainedConfig,
    arguments: PlanArguments,
    lisa_config: LisaConfig,
    with_offload: bool = True,
    runs: FakeRuns | None = None,
) -> Chosen:
    """The first rung of the ladder that fits; settings that were given stay as they are.

    Raises UserError, with what the last one lacks, where none does.
    """
    problem, runs = UserError("no way of running fits the settings"), runs or FakeRuns(config)
    for rung, asked, tried in _possible(arguments, lisa_config):
        if rung.offloads and not with_offload:
            continue
        try:
            ways = [name for name in WAYS if name.endswith("_offload") == rung.offloads]
            return Chosen(rung, what_fits(make_plans(config, asked, tried, ways, runs), asked), asked, tried)
        except UserError as error:
            problem = error
    raise problem


def with_more_layers(config: PretrainedConfig, chosen: Chosen, runs: FakeRuns | None = None) -> Chosen:
    """The same with as many layers at a time as fit without checkpointing more: they are what loss depends on most.

    As it is where modules are sampled, of which a budget says how many.
    """
    if chosen.lisa_config.by_module:
        return chosen
    runs = runs or FakeRuns(config)
    count, way = str(chosen.plan.workload.checkpointed_layers), chosen.plan.ds_config
    auto = replace(chosen.lisa_config, lisa_activated_layers=AUTO_LAYERS)
    most, _ = with_most_layers(config, replace(chosen.arguments, checkpointed_layers=count), auto, way, runs=runs)
    fits, above = chosen.lisa_config.lisa_activated_layers, most.lisa_activated_layers + 1
    tried = above - 1  # fits the GPU; states on the host may be too many
    while tried > fits:
        settings = replace(chosen.lisa_config, lisa_activated_layers=tried)
        (plan,) = make_plans(config, chosen.arguments, settings, [way], runs)
        if any(plan.lacks(chosen.arguments)):
            above = tried
        else:
            fits, chosen = tried, replace(chosen, plan=plan, lisa_config=settings)
        tried = (fits + above) // 2
    return chosen


def _possible(arguments: PlanArguments, lisa_config: LisaConfig) -> Iterator[tuple[Rung, PlanArguments, LisaConfig]]:
    """The rungs that change nothing that was given, with the arguments and settings of each."""
    given, defaults = lisa_config.to_dict(), LisaConfig().to_dict()
    default_optim = PlanArguments(arguments.model).optim
    for rung in LADDER:
        if any(given[name] != defaults[name] for name in rung.settings):
            continue
        for_offload = rung.offloads or "lisa_state_bits" in rung.settings  # which goes with no states on the host
        if for_offload and lisa_config.offloaded:
            continue
        if "lisa_always_on" in rung.settings and (lisa_config.lisa_activated_layers == 0 or lisa_config.by_module):
            continue  # nothing can be sampled in the place of layers
        is_other_optim = arguments.optim not in (default_optim, rung.optim)
        if rung.optim is not None and (is_other_optim or arguments.precision != "bf16"):
            continue
        asked = arguments if rung.optim is None else replace(arguments, optim=rung.optim)
        yield rung, asked, LisaConfig(**given | rung.settings)
