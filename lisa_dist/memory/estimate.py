"""What a run will need of memory, before it runs: by part, on each GPU and on each rank's host.

What the model itself allocates is counted on fake tensors (`fake_run.py`), what the backward pass needs for gradients
is followed in `backward.py`. Around that stand the sizes that DeepSpeed gives to partitions and buffers at each ZeRO
stage (`plan_memory`). `StepMeter` in measuring.py finds the same parts of a real step.

All sizes are bytes of one rank. A plan is of the worst period: the largest blocks that a period may train, the lowest
layers among them, since the backward pass ends at the lowest one where the embedding sleeps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from lisa_dist.config import OUTER_BLOCKS, LisaConfig, UserError
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.groups import split_by_decay, takes_bits
from lisa_dist.core.sampling import SampledBlock
from lisa_dist.memory.backward import (
    in_chunks,
    peak_of_backward,
    peak_of_stage_1,
    reductions_of_stage_2,
    reductions_of_stage_3,
    slices_by_rank,
    whole_by_stage,
)
from lisa_dist.memory.trace import Arrival, FakeRun, Group, StepTrace, Trained
from lisa_dist.optim.build import BITSANDBYTES_ADAMW, LISA_ADAMW, default_state_bits
from lisa_dist.optim.moments import QUANTIZED_BLOCK
from lisa_dist.optim.ops import chunk_bytes, table_bytes
from lisa_dist.zero.layout import partition_numel, pieces_of_group, share_numel

METHODS = ("lisa", "full", "lora")
# DeepSpeed's defaults, where a config leaves them to it. Elements.
_REDUCE_BUCKET = 500_000_000
_PERSISTENCE_THRESHOLD = 100_000
_MAX_REUSE_DISTANCE = 1_000_000_000  # what comes again within so many elements stays gathered on stage 3
_STATES = {True: "states, always on", False: "states, active blocks"}  # what a host holds
_OF_A_GROUP = "gradients of a group"  # what is on the host only while that group steps
# Bytes an element that AdamW on the host takes for a moment.
_BESIDE_ON_HOST = {"adamw_torch_fused": 0, "adamw_torch": 8, "bitsandbytes": 12}
_SMALLEST_QUANTIZED = 4096  # elements of a partition that bitsandbytes quantizes


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of one rank's device, planned or measured: what stays, what comes and goes in a step, and the peaks."""

    weights: int
    always_on_states: int  # masters and moments
    active_states: int
    buffers: int  # buckets, stage 3's gradient partitions and persistent parameters
    activations: int  # at the end of the forward pass
    logits: int
    gathered: int  # weights that stage 3 holds whole at the end of the forward pass
    gradients: int  # at the end of the backward pass, beyond the buffers
    peak_backward: int  # of forward and backward, everything included
    peak_step: int  # of the optimizer's step, everything included

    @property
    def static(self) -> int:
        """What is there between two steps."""
        return self.weights + self.always_on_states + self.active_states + self.buffers

    @property
    def peak(self) -> int:
        """The most at any time of a step."""
        return max(self.peak_backward, self.peak_step)

    @property
    def temporary(self) -> int:
        """What the peak has beyond the parts that are named."""
        at_backward = self.static + self.activations + self.logits + self.gathered
        at_step = self.static + self.gradients
        return max(0, self.peak - (at_backward if self.peak_backward >= self.peak_step else at_step))

    def with_host(self, host: dict[str, int]) -> "MemoryParts":
        """Device and host (the parts of `plan_memory`) as one, which is what they are on CPU."""
        lasting = sum(host.values()) - host.get(_OF_A_GROUP, 0)
        weights, always_on, active = (host.get(name, 0) for name in ("weights", *_STATES.values()))
        return replace(
            self,
            weights=self.weights + weights,
            always_on_states=self.always_on_states + always_on,
            active_states=self.active_states + active,
            buffers=self.buffers + lasting - weights - always_on - active,
            peak_backward=self.peak_backward + lasting,
            # The norm, or a group on the device, steps at another time than a group on the host.
            peak_step=max(self.peak_step + lasting, self.static + self.gradients + sum(host.values())),
        )

    def to_dict(self) -> dict[str, int]:
        """All parts and what is derived from them."""
        return asdict(self) | {"static": self.static, "temporary": self.temporary, "peak": self.peak}


@dataclass(frozen=True)
class StageSettings:
    """What of a DeepSpeed config decides on memory. Elements, not bytes."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    reduce_bucket: int
    overlap_comm: bool
    persistence_threshold: int
    max_reuse_distance: int

    @classmethod
    def of(cls, ds_config: dict, hidden_size: int) -> "StageSettings":
        """Read from a config; "auto" as the Hugging Face integration fills it in."""
        zero = ds_config["zero_optimization"]

        def elements(key: str, auto: int, default: int) -> int:
            value = zero.get(key, default)
            return auto if value == "auto" else int(value)

        def offloads(section: str) -> bool:
            return (zero.get(section) or {}).get("device", "none") != "none"

        return cls(
            stage=zero["stage"],
            offload_optimizer=offloads("offload_optimizer"),
            offload_param=offloads("offload_param"),
            reduce_bucket=elements("reduce_bucket_size", hidden_size**2, _REDUCE_BUCKET),
            overlap_comm=bool(zero.get("overlap_comm")),
            persistence_threshold=elements(
                "stage3_param_persistence_threshold", 10 * hidden_size, _PERSISTENCE_THRESHOLD
            ),
            max_reuse_distance=elements("stage3_max_reuse_distance", _MAX_REUSE_DISTANCE, _MAX_REUSE_DISTANCE),
        )


def widest_periods(
    config: LisaConfig, blocks: Blocks, sampled: Sequence[SampledBlock], checkpointed_layers: int = 0
) -> list[Trained]:
    """The periods that may need most memory: with the lowest layers, and with each outer block that is drawn.

    Where some layers are checkpointed and some are not, an active one of the latter, higher up, stores more.
    """
    gamma, num_layers = config.lisa_activated_layers, len(blocks.layers)
    always_on = tuple(name for name in OUTER_BLOCKS if name in config.always_on and blocks.outer(name).parameters)
    by_size = sorted(range(num_layers), key=lambda layer: -blocks.layers[layer].numel)

    def sets(count: int) -> list[tuple[int, ...]]:
        low, high = tuple(range(count)), tuple(range(num_layers - count, num_layers))
        mixed = [(0, *high[1:]), high] if count and 0 < checkpointed_layers < num_layers else []
        return list(dict.fromkeys([low, tuple(sorted(by_size[:count])), *mixed]))

    periods = [Trained(layers, always_on) for layers in sets(gamma)]
    return periods + [Trained(layers, always_on, (one.name,)) for one in sampled for layers in sets(gamma - one.places)]


def plan_memory(
    run: FakeRun,
    groups: Sequence[Group],
    trace: StepTrace,
    settings: StageSettings,
    world_size: int,
    *,
    optim: str = "adamw_torch_fused",
    master: str = "fp32",
    rank: int | None = None,
    accumulates: bool = False,
    on_cpu: bool = False,
    plain: bool = False,
) -> tuple[MemoryParts, dict[str, int]]:
    """The parts of one rank's device memory, and of its host's beside them.

    `optim` and `master` are those of the run (--optim, --lisa_master).
    `accumulates`: a step has several micro-batches, and gradients of the earlier ones wait for the last. `rank`: the
    one that is planned; by default one that holds most. `on_cpu`: host and device are one, and both are in the parts.
    `plain`: DeepSpeed without what LISA changes in it, as other methods have it.
    """
    element, stage, offloaded = run.workload.dtype.itemsize, settings.stage, settings.offload_optimizer
    parameters = list(run.model.parameters())
    trained = [parameter for group in groups for parameter in group.params]
    partitions = [partition_numel(group.numels, stage, world_size) for group in groups]
    states, states_sent = {True: 0, False: 0}, {True: 0, False: 0}
    for group, partition in zip(groups, partitions, strict=True):
        held_where = states_sent if group.on_host or offloaded else states
        copies_weights = group.on_host or not steps_weights(optim, master, run.workload.dtype)
        held_where[group.always_on] += state_bytes(partition, group.bits, optim, 4 if copies_weights else 0)
    active = sum(parameter.numel() for parameter in trained) * element
    largest = max((parameter.numel() for parameter in trained), default=0) * element
    bucket = settings.reduce_bucket * element * (2 if settings.overlap_comm and stage < 3 else 1)
    host = {_STATES[kind]: size for kind, size in states_sent.items() if size}
    gradients, gathered = 0, lambda one: 0
    ranks = range(world_size) if rank is None else (rank,)
    if stage == 3:
        weights = sum(share_numel(parameter.numel(), world_size) for parameter in parameters) * element
        # A share of everything is all of it, and is taken where it is; from the host it is sent.
        whole = world_size == 1 and (on_cpu or not settings.offload_param)
        small = sum(one.numel() for one in parameters if one.numel() <= settings.persistence_threshold) * element
        buffers = bucket + (0 if whole else small)
        if not whole:
            gathered = _gathered(run, trained, settings)
        if settings.offload_param:
            host["weights"], weights = weights, 0
        if offloaded:
            host["gradients"] = sum(partitions) * element
        else:
            buffers += sum(partitions) * element
    else:
        aligned = sum(partitions) * world_size * element
        weights = sum(parameter.numel() for parameter in parameters) * element - active + aligned
        buffers = 0
        held_by = {
            one: sum(_gradients_kept(group, stage, one, world_size) for group in groups) * element for one in ranks
        }
        held = max(held_by.values())
        if offloaded:
            buffers = largest if accumulates or plain else 0
            if accumulates:
                host["gradients that wait"] = held
            host["weights of the active blocks"] = sum(partitions) * element
            host["buffers"] = largest
        else:
            gradients = held
    if offloaded:
        host["gradients in fp32"] = sum(partitions) * 4
    elif any(states_sent.values()):
        eight = optim in BITSANDBYTES_ADAMW or any(group.bits == 8 for group in groups)
        kind = "bitsandbytes" if eight else optim
        of_group = [partition for group, partition in zip(groups, partitions, strict=True) if group.on_host]
        if optim == LISA_ADAMW:  # takes them as they are, wherever they are
            host[_OF_A_GROUP] = 0 if on_cpu else max(of_group) * element
        else:  # while it steps: as they came, in fp32, and what AdamW makes beside them
            host[_OF_A_GROUP] = max(of_group) * (element + 4 + _BESIDE_ON_HOST[kind])
    if optim == LISA_ADAMW and any(group.bits == 8 for group in groups):
        buffers += table_bytes()

    static = weights + sum(states.values()) + buffers
    beside = whole_by_stage(stage, offloaded) if plain else in_chunks
    sending = beside if offloaded else None
    if stage == 3:
        how = reductions_of_stage_3(
            world_size, element, settings.reduce_bucket, sending=sending, on_cpu=on_cpu, gathered=gathered
        )
        backward = peak_of_backward(trace, how)
    else:
        sizes = {"element": element, "bucket": settings.reduce_bucket, "bucket_bytes": bucket}
        slices = slices_by_rank(groups, stage, world_size)
        of_ranks = [
            reductions_of_stage_2(slices, rank, held=held, sending=sending, last=last, **sizes)
            for rank, held in held_by.items()
            for last in {True, stage == 1 or not accumulates}
        ]
        if stage == 1:
            backward = max(peak_of_stage_1(trace, trained, how, accumulates) for how in of_ranks)
        else:
            backward = max(peak_of_backward(trace, how) for how in of_ranks) + (gradients if accumulates else 0)
    # The gradient in fp32, and first what it is made of in one piece, or then what AdamW makes beside it: by group.
    of_step = [0]
    for group, partition in zip(groups, partitions, strict=True):
        if optim == LISA_ADAMW:  # of the largest piece, one chunk at a time
            piece = max(_largest_piece(group, stage, one, world_size) for one in ranks)
            of_step.append(chunk_bytes(piece, group.bits == 8, master != "fp32") if on_cpu else 0)
        elif not group.on_host:
            flat = element if element < 4 and (len(group.params) > 1 or world_size > 1) else 0
            adamw = 8 if optim == "adamw_torch" and group.bits == 32 else 0
            of_step.append(partition * (4 + max(flat, adamw)))
    in_norm = beside(share_numel(largest // element, world_size))
    parts = MemoryParts(
        weights=weights,
        always_on_states=states[True],
        active_states=states[False],
        buffers=buffers,
        activations=trace.activations,
        logits=trace.logits,
        gathered=gathered(None),
        gradients=gradients,
        peak_backward=static + backward,
        peak_step=static + gradients + (0 if offloaded else max([in_norm, *of_step])),
    )
    return (parts.with_host(host) if on_cpu else parts), host


def kept_states(run: FakeRun, config: LisaConfig, stage: int, world_size: int, optim: str) -> int:
    """Host bytes of the state policy keep, once every block that is drawn has been: those of all that sleep."""
    drawn = [(name, run.blocks.outer(name)) for name in config.sampled]
    drawn += [("layers", layer) for layer in run.blocks.layers]
    default, given = default_state_bits(optim), config.state_bits
    # A kept master that is the weights goes to the host as they are.
    weights = run.workload.dtype
    master = weights.itemsize if steps_weights(optim, config.lisa_master, weights) else 4
    sizes = [
        sum(
            state_bytes(
                partition_numel([parameter.numel() for parameter in params], stage, world_size),
                given[name] if name in given and takes_bits(given[name], kind) else default,
                optim,
                master,
            )
            for kind, params in split_by_decay(block).items()
        )
        for name, block in drawn
    ]
    if config.lisa_activated_layers == 0:  # nothing is drawn, and nothing falls asleep
        return 0
    return sum(sizes) - sum(sorted(sizes)[: config.lisa_activated_layers])


def steps_weights(optim: str, master: str, weights: torch.dtype) -> bool:
    """Whether the optimizer steps the weights themselves, and there is no master beside them."""
    return optim == LISA_ADAMW and (weights == torch.float32 or master != "fp32")


def state_bytes(partition: int, bits: int, optim: str, master: int = 4) -> int:
    """Master, of so many bytes an element, and two moments of a partition of so many elements."""
    scales = math.ceil(partition / QUANTIZED_BLOCK) * 4
    if bits == 8 and optim == LISA_ADAMW:
        return partition * (master + 2) + 2 * scales
    if bits == 8 and partition >= _SMALLEST_QUANTIZED:
        return partition * (master + 2) + 2 * (scales + 256 * 4)
    return partition * (master + 8)


def check_method(name: str) -> None:
    """Raise ValueError for a method that cannot be planned."""
    if name not in METHODS:
        raise UserError(f"--method {name}: unknown; choose one of {', '.join(METHODS)}.")


def _gradients_kept(group: Group, stage: int, rank: int, world_size: int) -> int:
    """Elements of gradients that stages 1 and 2 keep of a group: all of each parameter that the partition cuts."""
    pieces = pieces_of_group(group.named_numels, stage, rank, world_size)
    return sum(group.params[int(piece.name)].numel() for piece in pieces)


def _largest_piece(group: Group, stage: int, rank: int, world_size: int) -> int:
    """Elements of the parameter of a group of which a rank's partition has most."""
    pieces = pieces_of_group(group.named_numels, stage, rank, world_size)
    return max((piece.length for piece in pieces), default=0)


def _gathered(
    run: FakeRun, trained: Sequence[torch.nn.Parameter], settings: StageSettings
) -> Callable[[Arrival | None], int]:
    """Bytes of weights that stage 3 holds whole.

    At the end of the forward pass (of None) what the backward pass wants again soon; when a gradient comes, at most
    what it has not passed by.
    """
    blocks, active, element = run.blocks, {id(parameter) for parameter in trained}, run.workload.dtype.itemsize

    def trains(block) -> bool:
        return any(id(parameter) in active for parameter in block.parameters.values())

    # As they come in the forward pass; a tied matrix comes first and last, and is wanted soonest where it is last.
    in_order = [*blocks.layers, blocks.rest, blocks.embed if blocks.tied else blocks.head]
    adapters = len(list(run.model.parameters())) > sum(len(block.parameters) for block in blocks)
    if not adapters and not trains(blocks.embed) and not run.workload.checkpointed_layers:
        lowest = next((index for index, layer in enumerate(blocks.layers) if trains(layer)), len(blocks.layers))
        in_order = in_order[lowest:]  # the backward pass does not come to the others
    elif not blocks.tied and trains(blocks.embed):
        in_order = [blocks.embed, *in_order]
    not_passed: dict[int, int] = {}  # elements of its block and of those below it
    gathered = coming = below = 0
    for block in in_order:
        below += sum(one.numel() for one in block.parameters.values() if one.numel() > settings.persistence_threshold)
        not_passed |= {id(parameter): below for parameter in block.parameters.values()}
    if blocks.tied:  # the backward pass begins and ends with it
        matrix = sum(parameter.numel() for parameter in blocks.embed.parameters.values())
        not_passed = {key: numel + matrix for key, numel in not_passed.items()}
        not_passed |= {id(parameter): matrix for parameter in blocks.embed.parameters.values()}
    for parameter in reversed([parameter for block in in_order for parameter in block.parameters.values()]):
        if 2 * coming >= settings.max_reuse_distance:
            break
        coming += parameter.numel()
        gathered += parameter.numel() if parameter.numel() > settings.persistence_threshold else 0
    gathered *= element

    def gathered_when(one: Arrival | None) -> int:
        return gathered if one is None else min(gathered, element * not_passed.get(id(one.parameter), gathered))

    return gathered_when
