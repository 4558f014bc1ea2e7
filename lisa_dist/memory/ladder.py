"""A ladder of settings, from the method as published to what gives most of it up for memory: the first that fits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from transformers import PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import LORA_LAYERS
from lisa_dist.errors import UserError
from lisa_dist.memory.plan import WAYS, Plan, PlanArguments
from lisa_dist.memory.plans import make_plans, what_fits
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
    preset: Mapping[str, Any] = MappingProxyType({}),
    with_offload: bool = True,
    runs: FakeRuns | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Chosen:
    """The first rung of the ladder that fits; settings that were given stay as they are.

    `preset`: what `--lisa_preset` sets. `tell` is given a line on each way that is tried. Raises UserError,
    with what the last one lacks, where none does.
    """
    problem, runs = UserError("no way of running fits the settings"), runs or FakeRuns(config)
    for rung, asked, tried in possible_rungs(arguments, lisa_config, preset):
        if rung.offloads and not with_offload:
            continue
        # Stage 3 gathers every weight twice, and is for what stages 1 and 2 have no room for.
        for stages in (("zero1", "zero2"), ("zero3",)):
            ways = [name for name in WAYS if name.endswith("_offload") == rung.offloads and name.startswith(stages)]
            tell(f"trying {', '.join(ways)}: {rung.name}")
            try:
                plan = what_fits(make_plans(config, asked, tried, ways, runs), asked)
                return Chosen(rung, plan, asked, plan.lisa_config)
            except UserError as error:
                problem = error
    raise problem


def possible_rungs(
    arguments: PlanArguments, lisa_config: LisaConfig, preset: Mapping[str, Any]
) -> Iterator[tuple[Rung, PlanArguments, LisaConfig]]:
    """The rungs that change nothing that was given, with the arguments and settings of each.

    With a preset's small states the ladder begins at these; with states on the host there are none of them, and no
    number of layers that they made room for. What a rung changes comes before the preset.
    """
    given, defaults = lisa_config.to_dict(), LisaConfig().to_dict()
    default_optim = PlanArguments(arguments.model).optim
    of_preset = {name: value for name, value in preset.items() if name != "optim"}  # which is a rung's, or the default
    on_host = {n: value for n, value in of_preset.items() if n not in SMALL_STATES and value != LORA_LAYERS}
    is_small = preset.get("optim") == LISA_ADAMW or not SMALL_STATES.keys().isdisjoint(preset)
    for rung in LADDER:
        settings, optim = rung.settings, rung.optim
        if is_small and not rung.offloads:
            if optim is None:
                continue
            settings = {name: value for name, value in settings.items() if name not in SMALL_STATES}
        if arguments.precision != "bf16" and {"lisa_master", "lisa_frozen_bits"} & settings.keys():
            continue
        if any(given[name] != defaults[name] for name in settings):
            continue
        for_offload = rung.offloads or "lisa_state_bits" in rung.settings  # which goes with no states on the host
        if for_offload and lisa_config.offloaded:
            continue
        if "lisa_always_on" in settings and (lisa_config.lisa_activated_layers == 0 or lisa_config.by_module):
            continue  # nothing can be sampled in the place of layers
        if optim is not None and arguments.optim not in (default_optim, optim):
            continue
        asked = arguments if optim is None else replace(arguments, optim=optim)
        yield rung, asked, LisaConfig(**given | (on_host if rung.offloads else of_preset) | settings)
