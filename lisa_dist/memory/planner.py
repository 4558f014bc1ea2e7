"""Plans: the memory that a run needs, as many layers as fit, and the fastest DeepSpeed config and settings that fit."""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import AUTO_LAYERS, check_load_in_4bit
from lisa_dist.core.activation_checkpointing import AUTO, fewest_layers, number_of_layers, parse_checkpointed_layers
from lisa_dist.core.adapters import check_modules_to_save
from lisa_dist.core.blocks import model_without_weights, number_of_decoder_layers
from lisa_dist.core.engine_checks import prepare_ds_config
from lisa_dist.core.layer_weights import load_layer_weights
from lisa_dist.core.sequence_parallel import check_sequence_parallel
from lisa_dist.core.weight_store import HOST
from lisa_dist.ds_config import (
    fill_layer_gathers,
    fill_secondary_partitions,
    read_ds_config,
    uses_optimizer_offload,
)
from lisa_dist.errors import UserError
from lisa_dist.loss.label_logits import why_no_label_logits
from lisa_dist.memory.estimate import StepEstimate, kept_states
from lisa_dist.memory.frozen_on_host import bus_and_products, copies_to_load, stored_bytes
from lisa_dist.memory.plan import DTYPES, SHARING, WAYS, Plan, PlanArguments
from lisa_dist.memory.trace import FakeRuns
from lisa_dist.memory.workload import CHUNKED, LOGITS, RATIO, SCORE, StageSettings, Workload
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.presets import SMALL_STATES
from lisa_dist.tasks import REWARD, SFT
from lisa_dist.text import format_bytes

LOSS_OF_TASK = {"orpo": RATIO, REWARD: SCORE}  # of the others TRL computes what it needs of the logits in chunks


class Planner:
    """Plans of one model and method.

    `on_cpu`: of ranks that have no GPU, where device and host are one. The model's `runs` may be shared by planners.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        arguments: PlanArguments,
        lisa_config: LisaConfig,
        on_cpu: bool = False,
        runs: FakeRuns | None = None,
    ) -> None:
        attribute = lisa_config.lisa_layers_attribute
        if arguments.method != "lisa":
            of_no_run = LisaConfig, LisaConfig.plain
            if lisa_config not in [config(lisa_layers_attribute=attribute) for config in of_no_run]:
                raise UserError(f"--method {arguments.method}: flags that begin with --lisa_ are for --method lisa.")
            lisa_config = LisaConfig.plain(lisa_layers_attribute=attribute)
        self._config, self._arguments, self._lisa = config, arguments, lisa_config
        self._plans: dict[tuple[str, int, str], Plan] = {}
        self._estimate = StepEstimate(
            runs or FakeRuns(config),
            lisa_config,
            arguments.gpus,
            arguments.optim,
            arguments.method,
            lora=arguments.lora,
            accumulates=arguments.gradient_accumulation_steps > 1,
            on_cpu=on_cpu,
        )
        check_sequence_parallel(arguments.sequence_parallel, arguments.gpus, config, task=arguments.task)
        self.num_layers = number_of_decoder_layers(config)
        if arguments.lora is not None and arguments.lora.modules_to_save:
            check_modules_to_save(model_without_weights(config), arguments.lora.modules_to_save)
        if arguments.method == "lisa":
            lisa_config.check_num_layers(self.num_layers)
            if lisa_config.lisa_weights_file is not None:
                load_layer_weights(lisa_config.lisa_weights_file, self.num_layers, lisa_config.lisa_activated_layers)
        if arguments.method != "lisa" and arguments.optim == LISA_ADAMW:
            raise UserError(
                f"--optim {LISA_ADAMW} with --method {arguments.method}: it is for --method lisa; give another, such "
                "as adamw_torch_fused."
            )
        given = parse_checkpointed_layers(arguments.checkpointed_layers)
        # The number of checkpointed layers; None: the fewest that fit.
        self._count = None if given is None or given == AUTO else number_of_layers(given, self.num_layers)
        if arguments.method != "lisa" and self._count not in (None, 0, self.num_layers):
            raise UserError(
                f"--checkpointed_layers {self._count} with --method {arguments.method}: it checkpoints all layers or "
                f"none; give none or all."
            )

    def plan(self, ds_config: str | dict, checkpointed_layers: int, loss: str) -> Plan:
        """The plan of the worst period under one DeepSpeed config: short name, path, or its content."""
        key = str(ds_config), checkpointed_layers, loss
        if key in self._plans:
            return self._plans[key]
        arguments, lisa = self._arguments, self._lisa
        content = copy.deepcopy(ds_config) if isinstance(ds_config, dict) else read_ds_config(ds_config)
        prepare_ds_config(content, lisa, arguments.optim, arguments.precision)
        if arguments.load_in_4bit:
            check_load_in_4bit(arguments.method, content["zero_optimization"]["stage"])
        fill_secondary_partitions(content, arguments.ranks_of_hosts, arguments.has_reference)
        workload = Workload(
            -(-arguments.seq_length // arguments.sequence_parallel),
            arguments.rows,
            DTYPES[arguments.precision],
            checkpointed_layers,
            loss=loss,
            triton=not self._estimate.on_cpu,
            padded=arguments.rows > 1,
            activation_offloading=arguments.activation_offloading,
            sequence_parallel=arguments.sequence_parallel,
        )
        run, hidden_size = self._estimate.run(workload), self._config.get_text_config().hidden_size
        by_layers = arguments.method == "lisa" and fill_layer_gathers(content, run.largest_layer, hidden_size)
        settings = StageSettings.of(content, hidden_size, by_layers)
        parts, host = self._estimate.worst(settings, workload)
        if arguments.activation_offloading:
            kept, _ = self._estimate.worst(settings, replace(workload, activation_offloading=False))
            host = host | {"activations": kept.activations - parts.activations}
        if arguments.has_reference:
            whole = sum(parameter.nbytes for parameter in run.model.parameters())
            share = -(-whole // arguments.gpus) if settings.stage == 3 else whole
            if settings.offload_param:
                host = host | {"reference model": share}
            else:
                parts = parts.with_more("reference", share)
        if lisa.lisa_state == "keep":
            host = host | {"kept states": kept_states(run, lisa, settings.stage, arguments.gpus, arguments.optim)}
        on_a_host = max(arguments.ranks_of_hosts)
        has_originals = bool(lisa.frozen_flags) and lisa.lisa_frozen_store == HOST
        originals = sum(stored_bytes(run, 16)) if has_originals else 0
        codes = sum(stored_bytes(run, lisa.frozen_form)) if lisa.streams and lisa.frozen_form != 16 else 0
        for title, size in (("originals of the layers", originals), ("codes of the layers", codes)):
            host = host | ({title: -(-size // on_a_host)} if size else {})
        copies = copies_to_load(run, self._config, lisa, arguments, settings.stage)
        start = -(-(max(copies, originals) + codes) // on_a_host)  # a layer's copy goes as it comes into the originals
        bus = bus_and_products(run, lisa) if lisa.streams and not lisa.by_module else None
        self._plans[key] = Plan(str(ds_config), run.workload, parts, host, lisa, bus, start)
        return self._plans[key]

    def peak(self, ds_config: str | dict, loss: str) -> int:
        """Bytes of a GPU with the checkpointed layers that were given; with all, where it was left to the plans."""
        return self.plan(ds_config, self.num_layers if self._count is None else self._count, loss).gpu.needed

    def cheapest(self, ds_config: str | dict) -> Plan:
        """With the fewest checkpointed layers that fit, since recomputing only costs; of other methods none or all."""
        return self.choose_loss(ds_config)[0]

    def choose_loss(self, ds_config: str | dict) -> tuple[Plan, str]:
        """The cheapest plan, and why it has its loss.

        --loss auto keeps logits where they fit and no layer need be checkpointed for them; where nothing fits, the loss
        that needs less is planned.
        """
        given, task = self._arguments.loss, self._arguments.task
        if task != SFT:
            return self._fewest_layers(ds_config, LOSS_OF_TASK.get(task, CHUNKED)), f"TRL's of {task}"
        why_not = why_no_label_logits(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self._config), None))
        if given == LOGITS and why_not:
            raise UserError(f"--loss logits: {why_not}; give --loss chunked.")
        if given != AUTO or why_not:
            loss = CHUNKED if given == AUTO else given
            return self._fewest_layers(ds_config, loss), f"auto: {why_not}" if given == AUTO else f"--loss {given}"
        kept = self._fewest_layers(ds_config, LOGITS)
        needed = f"{format_bytes(kept.gpu.needed)} planned with logits"
        if kept.lacks(self._arguments)[0]:
            chunked, why = self._fewest_layers(ds_config, CHUNKED), f"auto: {needed}, and there are "
            return min(chunked, kept, key=lambda plan: plan.gpu.needed), why + format_bytes(self._arguments.budget)
        count = kept.workload.checkpointed_layers
        if self._count is None and count:
            fewer = count - 1 if self._arguments.method == "lisa" else 0
            if not self.plan(ds_config, fewer, CHUNKED).lacks(self._arguments)[0]:
                return self._fewest_layers(ds_config, CHUNKED), "auto: with logits more layers would be checkpointed"
        return kept, f"auto: {needed}, of {format_bytes(self._arguments.budget)}"

    def _fewest_layers(self, ds_config: str | dict, loss: str) -> Plan:
        if self._count is not None:
            return self.plan(ds_config, self._count, loss)
        if self._arguments.method != "lisa":
            none = self.plan(ds_config, 0, loss)
            return self.plan(ds_config, self.num_layers, loss) if none.lacks(self._arguments)[0] else none

        def peak(count: int) -> int:
            return self.plan(ds_config, count, loss).gpu.needed

        return self.plan(ds_config, fewest_layers(peak, self.num_layers, self._arguments.budget), loss)


# What else would make room for a layer: settings, and the optimizer that they need, if it is a certain one.
_SMALLER: tuple[tuple[str | None, dict[str, Any]], ...] = (
    (LISA_ADAMW, SMALL_STATES),
    (None, {"lisa_frozen_bits": "4"}),
    (None, {"lisa_always_on": "rest"}),
)


def with_most_layers(
    config: PretrainedConfig,
    arguments: PlanArguments,
    lisa_config: LisaConfig,
    ds_config: str | dict,
    on_cpu: bool = False,
    runs: FakeRuns | None = None,
) -> tuple[LisaConfig, str]:
    """Replace `auto` by a number of layers, and explain the number; leave numbers as they are.

    `auto` is as many as fit on the GPU with all layers checkpointed, if the run may choose that, and with the loss that
    needs less.

    Raises:
        UserError: Not one layer fits; the message names the three closest settings.
    """
    given, budget = lisa_config.lisa_activated_layers, arguments.budget
    if given != AUTO_LAYERS:
        return lisa_config, ""
    num_layers, runs = number_of_decoder_layers(config), runs or FakeRuns(config)
    checkpointed = "all" if arguments.checkpointed_layers == AUTO else arguments.checkpointed_layers
    most = _most_layers(config, lisa_config, num_layers)
    on_gpu = _Peaks(runs, replace(arguments, checkpointed_layers=checkpointed), ds_config, on_cpu)
    layers = most - fewest_layers(lambda fewer: on_gpu.of(lisa_config, most - fewer), most - 1, budget)
    planned = format_bytes(on_gpu.of(lisa_config, layers))
    if on_gpu.of(lisa_config, layers) > budget:
        raise UserError(
            f"--lisa_activated_layers auto: not one layer fits {format_bytes(budget)}: with one {planned} are "
            f"planned. {_closest_settings(on_gpu.of, lisa_config)}"
        )
    why = f"{planned} planned; there are {format_bytes(budget)}"
    return replace(lisa_config, lisa_activated_layers=layers), f"{given}: {layers} of {num_layers}, {why}"


class _Peaks:
    """Bytes of a GPU at the peak of steps that differ in their layers, by the loss that needs least."""

    def __init__(self, runs: FakeRuns, asked: PlanArguments, ds_config: str | dict, on_cpu: bool) -> None:
        self._runs, self._asked, self._ds_config, self._on_cpu = runs, asked, ds_config, on_cpu
        self._losses = _losses(runs.config, asked)
        self._known: dict[tuple[str, int, str | None], int] = {}

    def of(self, settings: LisaConfig, layers: int, optim: str | None = None) -> int:
        """With so many layers at a time."""
        key = str(settings), layers, optim
        if key not in self._known:
            asked = replace(self._asked, optim=optim or self._asked.optim)
            peaks_of = self._peaks_of(asked, replace(settings, lisa_activated_layers=layers))
            peaks = {loss: peaks_of(loss) for loss in self._losses}
            # The one that needs less does so for any number.
            self._losses = [min(self._losses, key=lambda loss: peaks[loss])]
            self._known[key] = peaks[self._losses[0]]
        return self._known[key]

    def _peaks_of(self, asked: PlanArguments, settings: LisaConfig) -> Callable[[str], int]:
        planner = Planner(self._runs.config, asked, settings, self._on_cpu, self._runs)
        return functools.partial(planner.peak, self._ds_config)


def _most_layers(config: PretrainedConfig, lisa_config: LisaConfig, num_layers: int) -> int:
    """The most that a period can have: those of positive weight, and a sampled block's probability is one of theirs."""
    most = num_layers
    if lisa_config.lisa_weights_file is not None:
        weights = load_layer_weights(lisa_config.lisa_weights_file, num_layers, num_active=1)
        most = sum(weight > 0 for weight in weights)
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    names = {"embed" if tied and name == "head" else name for name in lisa_config.sampled}
    given = {"embed" if tied and name == "head" else name: p for name, p in lisa_config.block_probabilities.items()}
    if by_default := names - given.keys():
        left = max(0.0, 1 - sum(given.values()))
        most = min(most, math.floor(left * num_layers / len(by_default) + 1e-9))
    return max(1, most)


def _losses(config: PretrainedConfig, arguments: PlanArguments) -> list[str]:
    """How a step may compute its loss."""
    if arguments.task != SFT:
        return [LOSS_OF_TASK.get(arguments.task, CHUNKED)]
    if arguments.loss != AUTO:
        return [arguments.loss]
    why_not = why_no_label_logits(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    return [CHUNKED] if why_not else [CHUNKED, LOGITS]


def _closest_settings(peak_of: Callable[[LisaConfig, int, str | None], int], lisa_config: LisaConfig) -> str:
    """What would make room for a layer, in addition to what is given, from the smallest peak on."""
    found = []
    for optim, settings in _SMALLER:
        try:
            peak = peak_of(replace(lisa_config, **settings), 1, optim)
        except UserError:  # they do not go with what is given
            continue
        flags = settings if optim is None else {"optim": optim, **settings}
        found.append((peak, " ".join(f"--{name} {value}" for name, value in flags.items())))
    return f"The closest: {'; '.join(f'{flags} takes {format_bytes(peak)}' for peak, flags in sorted(found))}."


def make_plans(
    config: PretrainedConfig,
    arguments: PlanArguments,
    lisa_config: LisaConfig,
    ways: Sequence[str] = WAYS,
    runs: FakeRuns | None = None,
) -> list[Plan]:
    """Return a plan for each DeepSpeed config, or only for `--deepspeed`, from the fastest to the slowest."""
    runs = runs or FakeRuns(config)
    if lisa_config.lisa_activated_layers != AUTO_LAYERS:
        Planner(config, arguments, lisa_config, runs=runs)  # raises what no way would change
    refused: UserError | None = None
    ways = [arguments.deepspeed] if arguments.deepspeed else ways_of(arguments, ways)
    if lisa_config.offloaded and not arguments.deepspeed:  # the flag says what is offloaded, whatever a config says
        ways = [way for way in ways if not uses_optimizer_offload(read_ds_config(way))]
    plans = []
    for way in ways:
        try:
            ds_config = read_ds_config(way)
            prepare_ds_config(ds_config, lisa_config, arguments.optim, arguments.precision)
            if arguments.load_in_4bit:
                check_load_in_4bit(arguments.method, ds_config["zero_optimization"]["stage"])
            settled, _ = with_most_layers(config, arguments, lisa_config, way, runs=runs)
        except UserError as error:
            refused = refused or error  # 8-bit moments are not for DeepSpeed's host AdamW; not one layer fits
            continue
        plans.append(Planner(config, arguments, settled, runs=runs).cheapest(way))
    if not plans:
        assert refused is not None
        raise refused
    return plans


def ways_of(arguments: PlanArguments, ways: Sequence[str]) -> list[str]:
    """Those of `ways` that are something of their own for these hosts."""
    hosts = arguments.ranks_of_hosts
    shares = len(hosts) > 1 and len(set(hosts)) == 1 < hosts[0] and not arguments.has_reference
    return [way for way in ways if shares or way != SHARING]


def _slowness(plan: Plan) -> tuple[int, int]:
    """Stages 1 and 2 send the same; among them the one that recomputes less is faster. Then the order of WAYS."""
    place = WAYS.index(plan.ds_config) if plan.ds_config in WAYS else len(WAYS)
    return max(place, 1), plan.workload.checkpointed_layers


def what_fits(plans: Sequence[Plan], arguments: PlanArguments) -> Plan:
    """The fastest of the plans that fit with most layers at a time.

    Raises ValueError with the closest three, and what each lacks, when none does.
    """
    fitting = [plan for plan in plans if not any(plan.lacks(arguments))]
    if fitting:
        return min(fitting, key=lambda plan: (-int(plan.lisa_config.lisa_activated_layers), _slowness(plan)))
    closest = sorted(plans, key=lambda plan: sum(plan.lacks(arguments)))[:3]
    listed = "; ".join(
        f"{plan.ds_config} lacks {format_bytes(plan.lacks(arguments)[0])} on a GPU and "
        f"{format_bytes(plan.lacks(arguments)[1])} on the host"
        for plan in closest
    )
    raise UserError(
        f"--gpu_memory {arguments.gpu_memory} on {arguments.gpus} GPU(s): nothing fits beside the {arguments.reserve} "
        f"of each that are kept for CUDA (--reserve). The closest: {listed}. More GPUs, a shorter --seq_length, "
        "--sequence_parallel (GPUs share each example), --activation_offloading, --lisa_state_bits embed=8,head=8, or "
        "--lisa_always_on rest (embed and head sampled as layers are; not with --lisa_unit module) need less."
    )


@dataclass(frozen=True)
class Fallback:
    """Settings besides those that are given; `optim` where they need one; whether states are on the host."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    optim: str | None = None
    offloads: bool = False


_SAMPLED = {"lisa_always_on": "rest"}
_SMALL_NAME = "moments in 8 bits or by row and column, no masters"
# States on the GPU come first: with offload a step waits for the host.
FALLBACKS = (
    Fallback("AdamW in 32 bits, as published"),
    Fallback("moments of embeddings and head in 8 bits", {"lisa_state_bits": "embed=8,head=8"}),
    Fallback(_SMALL_NAME, SMALL_STATES, LISA_ADAMW),
    Fallback(f"{_SMALL_NAME}; frozen layers in 8 bits", SMALL_STATES | {"lisa_frozen_bits": "8"}, LISA_ADAMW),
    Fallback("embeddings and head sampled like layers", _SAMPLED),
    Fallback(
        "embeddings and head sampled like layers, moments in 8 bits",
        _SAMPLED | {"lisa_state_bits": "embed=8,head=8,layers=8"},
    ),
    Fallback(f"{_SMALL_NAME}; frozen layers in 4 bits", SMALL_STATES | {"lisa_frozen_bits": "4"}, LISA_ADAMW),
    Fallback(f"{_SMALL_NAME}; frozen layers on the host", SMALL_STATES | {"lisa_offload": "frozen"}, LISA_ADAMW),
    Fallback("AdamW in 32 bits, as published; optimizer states on the host", offloads=True),
    Fallback("embeddings and head sampled like layers, optimizer states on the host", _SAMPLED, offloads=True),
)


@dataclass(frozen=True)
class Chosen:
    """The first fallback that fits, the fastest plan of it, and the arguments and settings that it is of."""

    fallback: Fallback
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
    """The first fallback that fits; settings that were given stay as they are.

    `preset`: the optimizer of `--lisa_preset` and its states. `tell` is given a line on each way that is tried.

    Raises:
        UserError: No fallback fits; the message says what the last one lacks.
    """
    problem, runs = UserError("no way of running fits the settings"), runs or FakeRuns(config)
    for fallback, asked, tried in possible_fallbacks(arguments, lisa_config, preset):
        if fallback.offloads and not with_offload:
            continue
        # Stage 3 gathers every weight twice, and is for what stages 1 and 2 have no room for.
        for stages in (("zero1", "zero2"), ("zero3",)):
            if stages == ("zero3",) and tried.frozen_flags:
                continue
            ways = [name for name in WAYS if name.endswith("_offload") == fallback.offloads and name.startswith(stages)]
            ways = ways_of(arguments, ways)
            tell(f"trying {', '.join(ways)}: {fallback.name}")
            try:
                plan = what_fits(make_plans(config, asked, tried, ways, runs), asked)
                return Chosen(fallback, plan, asked, plan.lisa_config)
            except UserError as error:
                problem = error
    raise problem


def possible_fallbacks(
    arguments: PlanArguments, lisa_config: LisaConfig, preset: Mapping[str, Any]
) -> Iterator[tuple[Fallback, PlanArguments, LisaConfig]]:
    """The fallbacks that change nothing that was given, with the arguments and settings of each.

    With a preset's small states these come first; with states on the host there are none of them. What a fallback
    changes comes before the preset.
    """
    given, defaults = lisa_config.to_dict(), LisaConfig.plain().to_dict()
    default_optim = PlanArguments(arguments.model).optim
    of_preset = {name: value for name, value in preset.items() if name != "optim"}  # a fallback's, or the default
    on_host = {name: value for name, value in of_preset.items() if name not in SMALL_STATES}
    is_small = preset.get("optim") == LISA_ADAMW or not SMALL_STATES.keys().isdisjoint(preset)
    tried = []
    for fallback in FALLBACKS:
        settings, optim = fallback.settings, fallback.optim
        if is_small and not fallback.offloads:
            if optim is None:
                continue
            settings = {name: value for name, value in settings.items() if name not in SMALL_STATES}
        if arguments.precision != "bf16" and {"lisa_master", "lisa_frozen_bits", "lisa_offload"} & settings.keys():
            continue
        if any(given[name] != defaults[name] for name in settings):
            continue
        if (fallback.offloads or "lisa_state_bits" in fallback.settings) and lisa_config.offloaded:
            continue  # neither goes with blocks whose states are on the host
        if "lisa_always_on" in settings and (lisa_config.lisa_activated_layers == 0 or lisa_config.by_module):
            continue  # nothing can be sampled in the place of layers
        if optim is not None and arguments.optim not in (default_optim, optim):
            continue
        asked = arguments if optim is None else replace(arguments, optim=optim)
        combined = LisaConfig(**given | (on_host if fallback.offloads else of_preset) | settings)
        if (candidate := (asked.optim, combined, fallback.offloads)) not in tried:
            tried.append(candidate)
            yield fallback, asked, combined
