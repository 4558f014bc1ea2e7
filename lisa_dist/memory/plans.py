"""As many layers as fit, the plans under every DeepSpeed config, and the fastest of them that fits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import LORA_LAYERS, PLANNED_LAYERS
from lisa_dist.core.blocks import number_of_decoder_layers
from lisa_dist.core.checkpointing import AUTO, fewest_layers
from lisa_dist.core.engine_checks import prepare_ds_config
from lisa_dist.core.layer_weights import load_layer_weights
from lisa_dist.ds_config import read_ds_config, uses_optimizer_offload
from lisa_dist.errors import UserError
from lisa_dist.loss.label_logits import why_no_label_logits
from lisa_dist.memory.plan import WAYS, Plan, PlanArguments
from lisa_dist.memory.planner import LOSS_OF_TASK, Planner
from lisa_dist.memory.trace import FakeRuns
from lisa_dist.memory.workload import CHUNKED, LOGITS
from lisa_dist.optim.build import LISA_ADAMW, TORCH_ADAMW
from lisa_dist.presets import SMALL_STATES
from lisa_dist.tasks import SFT
from lisa_dist.text import format_bytes

# What else would make room for a layer: settings, and the optimizer that they need, if it is a certain one.
_SMALLER: tuple[tuple[str | None, dict[str, Any]], ...] = (
    (LISA_ADAMW, SMALL_STATES),
    (None, {"lisa_frozen_bits": 4}),
    (None, {"lisa_always_on": "rest"}),
)

LORA_RANK = 16  # of the adapters whose memory --lisa_activated_layers lora keeps to


def fewest_of_lora(num_layers: int) -> int:
    """The layers that `lora` has at least: the paper's two, and no more than it may have at most."""
    return min(2, most_of_lora(num_layers))


def most_of_lora(num_layers: int) -> int:
    """Half of the layers: all of them are full training, which small models would have room for."""
    return max(1, num_layers // 2)


def with_most_layers(
    config: PretrainedConfig,
    arguments: PlanArguments,
    lisa_config: LisaConfig,
    ds_config: str | dict,
    on_cpu: bool = False,
    runs: FakeRuns | None = None,
) -> tuple[LisaConfig, str]:
    """The settings of a run with a number in the place of auto or lora, and why; as they are where they have one.

    lora is as many as fit what a step of LoRA takes, and a tenth, both of one micro-batch without checkpointing: one
    number, however the run checkpoints and accumulates. Of these it is as many as fit the GPU, two at least. auto is as
    many as fit the GPU, or a UserError with the closest three settings. Layers come before checkpointing less: they fit
    with all layers checkpointed, where the run may choose, and with the loss that needs less.
    """
    given, budget = lisa_config.lisa_activated_layers, arguments.budget
    if given not in PLANNED_LAYERS:
        return lisa_config, ""
    num_layers, runs = number_of_decoder_layers(config), runs or FakeRuns(config)
    checkpointed = "all" if arguments.checkpointed_layers == AUTO else arguments.checkpointed_layers
    on_gpu = _Peaks(runs, replace(arguments, checkpointed_layers=checkpointed), ds_config, on_cpu)
    most = _most_layers(config, lisa_config, num_layers)
    if given == LORA_LAYERS:
        alone = replace(arguments, checkpointed_layers="none", gradient_accumulation_steps=1)
        most = min(most, most_of_lora(num_layers))
        layers, why = _beside_lora(_Peaks(runs, alone, ds_config, on_cpu), on_gpu, lisa_config, most, budget)
    else:
        layers = most - fewest_layers(lambda fewer: on_gpu.of(lisa_config, most - fewer), most - 1, budget)
        planned = format_bytes(on_gpu.of(lisa_config, layers))
        if on_gpu.of(lisa_config, layers) > budget:
            raise UserError(
                f"--lisa_activated_layers auto: not one layer fits {format_bytes(budget)}: with one {planned} are "
                f"planned. {_closest_settings(on_gpu.of, lisa_config)}"
            )
        why = f"{planned} planned; there are {format_bytes(budget)}"
    return replace(lisa_config, lisa_activated_layers=layers), f"{given}: {layers} of {num_layers}, {why}"


def _beside_lora(alone: "_Peaks", on_gpu: "_Peaks", lisa_config: LisaConfig, most: int, budget: int) -> tuple[int, str]:
    """As many layers as fit LoRA's step and the GPU, and why."""
    fewest = min(2, most)
    alone.of(lisa_config, most)  # which settles the loss
    of_lora = alone.of_lora(lisa_config)

    def excess(fewer: int) -> int:
        peak = alone.of(lisa_config, most - fewer)
        if peak > of_lora or 4 * peak <= budget:  # accumulation takes no more than that, and none need be planned
            return peak - of_lora
        return on_gpu.of(lisa_config, most - fewer) - budget

    layers = most - fewest_layers(excess, most - fewest, 0)
    planned = f"{format_bytes(alone.of(lisa_config, layers))} planned without checkpointing"
    return layers, f"{planned}; LoRA's step, rank {LORA_RANK}, and a tenth take {format_bytes(of_lora)}"


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
            planner = self._planner(asked, replace(settings, lisa_activated_layers=layers))
            peaks = {loss: self._peak(planner, loss) for loss in self._losses}
            # The one that needs less does so for any number.
            self._losses = [min(self._losses, key=lambda loss: peaks[loss])]
            self._known[key] = peaks[self._losses[0]]
        return self._known[key]

    def of_lora(self, lisa_config: LisaConfig) -> int:
        """Of a step of LoRA, by the loss that was settled on, and a tenth of it more."""
        asked = {one.name: getattr(self._asked, one.name) for one in fields(PlanArguments)}  # those of init refuse LoRA
        lora = PlanArguments(**asked | {"method": "lora", "lora_r": LORA_RANK, "optim": TORCH_ADAMW[1]})
        model_alone = LisaConfig(lisa_layers_attribute=lisa_config.lisa_layers_attribute)
        return int(1.1 * self._peak(self._planner(lora, model_alone), self._losses[0]))

    def _planner(self, asked: PlanArguments, settings: LisaConfig) -> Planner:
        return Planner(self._runs.config, asked, settings, self._on_cpu, self._runs)

    def _peak(self, planner: Planner, loss: str) -> int:
        return planner.plan(self._ds_config, planner.given_count, loss).gpu.needed


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
    """A plan under each DeepSpeed config, or under --deepspeed alone, from the fastest to the slowest."""
    runs = runs or FakeRuns(config)
    is_planned = lisa_config.lisa_activated_layers in PLANNED_LAYERS
    planner = None if is_planned else Planner(config, arguments, lisa_config, runs=runs)
    refused: UserError | None = None
    ways = [arguments.deepspeed] if arguments.deepspeed else list(ways)
    if lisa_config.offloaded and not arguments.deepspeed:  # the flag says what is offloaded, whatever a config says
        ways = [way for way in ways if not uses_optimizer_offload(read_ds_config(way))]
    plans = []
    for way in ways:
        try:
            prepare_ds_config(read_ds_config(way), lisa_config, arguments.optim, arguments.precision)
            of_way = planner or Planner(
                config,
                arguments,
                with_most_layers(config, arguments, lisa_config, way, runs=runs)[0],
                runs=runs,
            )
        except UserError as error:
            refused = refused or error  # 8-bit moments are not for DeepSpeed's host AdamW; not one layer fits
            continue
        plans.append(of_way.cheapest(way))
    if not plans:
        assert refused is not None
        raise refused
    return plans


def _slowness(plan: Plan) -> tuple[int, int]:
    """Stages 1 and 2 send the same; among them the one that recomputes less is faster. Then the order of WAYS."""
    place = WAYS.index(plan.ds_config) if plan.ds_config in WAYS else len(WAYS)
    return max(place, 1), plan.workload.checkpointed_layers


def what_fits(plans: Sequence[Plan], arguments: PlanArguments) -> Plan:
    """Of the plans that fit with most layers at a time the fastest.

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
        "--lisa_state_bits embed=8,head=8, or --lisa_always_on rest (embed and head sampled as layers are; not with "
        "--lisa_unit module) need less."
    )
