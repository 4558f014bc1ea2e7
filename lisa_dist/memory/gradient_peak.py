"""The peak of a backward pass: gradients, buckets and reductions, followed gradient by gradient as DeepSpeed has them.

A gradient goes into a bucket; one that is larger than the bucket waits whole. When the next one does not fit, all that
have arrived are reduced, and only then there is memory for what this rank keeps of them, but for one that waited whole.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lisa_dist.core.blocks import Block, Blocks
from lisa_dist.memory.trace import Arrival, FakeRun, StepTrace
from lisa_dist.memory.workload import Group
from lisa_dist.zero.layout import pieces_of_group, share_numel


@dataclass(frozen=True)
class Reduction:
    """How stage 3 reduces gradients, on any rank: the bucket and the gradients that are kept have buffers all the time.

    `element`: bytes of an element. `send_scratch(numel)`, with optimizer offload: bytes allocated while a gradient of
    so many elements is sent to the host. `gathered`: bytes of whole weights when a gradient arrives; of None, before
    the first one.
    """

    world_size: int
    element: int
    bucket_numel: int
    send_scratch: Callable[[int], int] | None
    on_cpu: bool
    gathered: Callable[[Arrival | None], int]
    bucket_bytes: int = 0  # from the first gradient on
    one_buffer: int | None = None  # bytes of what all kept gradients are copied to, where there is one

    def is_large(self, arrival: Arrival) -> bool:
        """Whether the gradient has no room in the bucket."""
        return arrival.parameter.numel() > self.bucket_numel

    def overflows(self, waiting: Sequence[Arrival], arrival: Arrival) -> bool:
        """Whether the waiting gradients and this one are too many for the bucket."""
        return sum(other.parameter.numel() for other in (*waiting, arrival)) > self.bucket_numel

    def clone(self, arrival: Arrival) -> int:
        """Bytes that are cloned of a gradient when it arrives."""
        return 0

    def scratch(self, reduced: list[Arrival]) -> int:
        """Bytes allocated only while these gradients are reduced."""
        interleaves = len(reduced) > 1 or reduced[0].parameter.numel() % self.world_size
        whole = sum(arrival.nbytes for arrival in reduced)
        interleaved, gloo = whole if interleaves else 0, whole if self.on_cpu else 0
        if self.send_scratch is None:
            return interleaved + gloo
        shares = [share_numel(arrival.parameter.numel(), self.world_size) for arrival in reduced]
        # The share comes back from the host, which on CPU is the same place.
        returned = [self.send_scratch(share) + (0 if self.on_cpu else share * self.element) for share in shares]
        return interleaved + max(gloo, *returned)

    def kept(self, reduced: list[Arrival], before: int) -> tuple[int, int]:
        """Bytes that this rank, which has `before`, keeps of them: in copies, and outside the bucket where they are."""
        return 0, 0


@dataclass(frozen=True, kw_only=True)
class SlicedReduction(Reduction):
    """How stages 1 and 2 reduce on one rank, which keeps gradients as they are.

    `slices` is the result of `slices_by_rank`. `is_last`: of a step's micro-batches; with offload the gradients of the
    others are added up on the host, and sent with the last.
    """

    slices: dict[int, dict[int, int]]
    rank: int
    is_last: bool

    def clone(self, arrival: Arrival) -> int:
        return arrival.nbytes if self.send_scratch and self.is_large(arrival) else 0

    def scratch(self, reduced: list[Arrival]) -> int:
        slices = [self.slices[id(arrival.parameter)] for arrival in reduced]
        sent = [of_one[self.rank] for of_one in slices if self.rank in of_one] if self.is_last else []
        flat = _most_copied([owned for of_one in slices for owned in of_one.items()], self.bucket_numel)
        return max(flat * self.element, *(self.send_scratch(numel) for numel in sent if self.send_scratch), 0)

    def kept(self, reduced: list[Arrival], before: int) -> tuple[int, int]:
        local = [arrival for arrival in reduced if self.rank in self.slices[id(arrival.parameter)]]
        large = sum(arrival.nbytes for arrival in local if self.is_large(arrival))
        if self.send_scratch:  # before the last micro-batch large gradients stay here, though they are on the host too
            return 0, 0 if self.is_last else large
        if self.one_buffer is not None:
            return (self.one_buffer - before if local else 0), 0
        return sum(arrival.nbytes for arrival in local) - large, large


class Peak(NamedTuple):
    """The most bytes at any time of a forward and backward pass, on top of what exists between steps, by what has them.

    `passes`: activations, logits, weights that are gathered, and what the two passes allocate for a moment.
    """

    passes: int
    gradients: int = 0  # that have arrived by then
    buckets: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def backward_peak(trace: StepTrace, reduction: Reduction, accumulates: bool = False) -> Peak:
    """The peak of the forward and backward pass.

    `accumulates`, on stage 1: gradients are added to whole ones of earlier micro-batches, each of which goes then.
    """
    earlier = sum(arrival.nbytes for arrival in trace.arrivals) if accumulates else 0
    bucket = kept = 0
    waiting: list[Arrival] = []
    peaks: list[Peak] = []

    def waiting_outside_bucket() -> int:
        return sum(arrival.nbytes for arrival in waiting if reduction.is_large(arrival))

    def reduce(other_bytes: int) -> None:  # all but gradients
        nonlocal kept
        if not waiting:
            return
        copied, stay = reduction.kept(waiting, kept)
        during = kept + max(reduction.scratch(waiting), copied)
        peaks.append(Peak(other_bytes, earlier + waiting_outside_bucket() + during, bucket))
        kept += copied + stay
        waiting.clear()

    gathered = reduction.gathered(None)
    for arrival in trace.arrivals:
        peaks.append(Peak(arrival.peak_before + gathered, earlier + waiting_outside_bucket() + kept, bucket))
        bucket, gathered = reduction.bucket_bytes, reduction.gathered(arrival)
        if reduction.overflows(waiting, arrival):
            reduce(arrival.now + gathered)
        outside = reduction.clone(arrival) + waiting_outside_bucket()
        peaks.append(Peak(arrival.now + gathered, earlier + outside + kept, bucket))
        waiting.append(arrival)
        earlier -= arrival.nbytes if accumulates else 0
    peaks.append(Peak(trace.peak_after + gathered, waiting_outside_bucket() + kept, bucket))
    reduce(trace.now)
    return max(peaks, key=lambda peak: peak.total)


def backward_peak_stage_1(trace: StepTrace, reduction: Reduction, accumulates: bool) -> Peak:
    """The same for stage 1 without overlap: all wait until the last has arrived, and go as they are reduced.

    The peak is at the beginning, with what one gradient takes more than its memory that goes, or the one buffer.
    `accumulates`: those of a later micro-batch are added to those of the earlier ones, which wait.
    """
    active = sum(arrival.nbytes for arrival in trace.arrivals)
    waiting, bucket = (active, reduction.bucket_bytes) if accumulates else (0, 0)
    peaks: list[Peak] = []
    for arrival in trace.arrivals:
        peaks.append(Peak(arrival.peak_before, waiting, bucket))
        if not accumulates:
            waiting, bucket = waiting + arrival.nbytes, reduction.bucket_bytes
    large = [arrival for arrival in trace.arrivals if reduction.is_large(arrival)]
    clones = [reduction.clone(arrival) for arrival in large]
    scratch = [reduction.scratch([one]) - (0 if one in large else one.nbytes) for one in trace.arrivals]
    freed = 0 if large[:1] == trace.arrivals[:1] else reduction.bucket_bytes  # before the first goes to the one buffer
    more = max([*clones, *scratch, (reduction.one_buffer or 0) - freed, 0])
    peaks += [Peak(trace.peak_after, active, bucket), Peak(trace.now, active + more, bucket)]
    return max(peaks, key=lambda peak: peak.total)


def kept_gradient_numel(group: Group, stage: int, rank: int, world_size: int, largest: float = math.inf) -> int:
    """Elements of gradients that stages 1 and 2 keep of a group: all of each parameter that the partition cuts.

    Of parameters of at most `largest` elements.
    """
    pieces = pieces_of_group(group.named_numels, stage, rank, world_size)
    numels = (group.params[int(piece.name)].numel() for piece in pieces)
    return sum(numel for numel in numels if numel <= largest)


def slices_by_rank(groups: Sequence[Group], stage: int, world_size: int) -> dict[int, dict[int, int]]:
    """By the id of each parameter: how many of its elements are in the partition of each rank that has any of it."""
    slices: dict[int, dict[int, int]] = {id(parameter): {} for group in groups for parameter in group.params}
    for group in groups:
        for rank in range(world_size):
            for piece in pieces_of_group(group.named_numels, stage, rank, world_size):
                slices[id(group.params[int(piece.name)])][rank] = piece.length
    return slices


def _most_copied(owned: Sequence[tuple[int, int]], bucket_numel: int) -> int:
    """Elements of the largest flat copy of gradients that are sent, each slice as its owner and its elements.

    Slice after slice is copied to one flat tensor until that is larger than the bucket; a single one is not.
    """
    most_copied = numel_in_flat = slices_in_flat = 0
    previous_owner = None
    for owner, numel in owned:
        slices_in_flat, previous_owner = slices_in_flat + (owner != previous_owner), owner
        numel_in_flat += numel
        most_copied = max(most_copied, numel_in_flat if slices_in_flat > 1 else 0)
        if numel_in_flat > bucket_numel:
            numel_in_flat, slices_in_flat, previous_owner = 0, 0, None
    return most_copied


def gathered_weights(
    run: FakeRun,
    trained: Sequence[torch.nn.Parameter],
    persistence_threshold: int,
    max_reuse_distance: int,
    max_live: int,
    by_layers: bool,
    share: float = 0.0,
    shared_before: bool = False,
) -> Callable[[Arrival | None], int]:
    """Bytes of whole weights, as a function of the gradient that arrives.

    None, the end of the forward pass: those that the backward pass needs again within `max_reuse_distance` elements,
    matrix by matrix, or `by_layers`.
    When a gradient arrives: those, or up to `max_live` elements that are gathered ahead, of what the backward pass has
    not passed. Parameters of up to
    `persistence_threshold` elements are whole all the time and not counted. `share` is this rank's of what its host has
    of a trained parameter once it is let go, or `shared_before`, of an earlier micro-batch.
    """
    blocks, element, ours = run.blocks, run.workload.dtype.itemsize, {id(parameter) for parameter in trained}
    order = _blocks_in_forward_order(run, ours)
    not_passed: dict[int, int] = {}  # by parameter: elements of its block and of the blocks before it
    active_not_passed: dict[int, int] = {}  # of them those that train
    numel_so_far = active_so_far = 0
    for block in order:
        numels = {id(parameter): parameter.numel() for parameter in block.parameters.values()}
        numel_so_far += sum(numel for numel in numels.values() if numel > persistence_threshold)
        active_so_far += sum(numel for key, numel in numels.items() if key in ours)
        not_passed |= dict.fromkeys(numels, numel_so_far)
        active_not_passed |= dict.fromkeys(numels, active_so_far)
    if blocks.tied:  # the backward pass begins and ends with the tied matrix
        matrix = sum(parameter.numel() for parameter in blocks.embed.parameters.values())
        not_passed = {key: numel + matrix for key, numel in not_passed.items()}
        not_passed |= {id(parameter): matrix for parameter in blocks.embed.parameters.values()}
    gathered = distance = 0
    let_go = active = sum(parameter.numel() for parameter in trained)
    backward = [list(block.parameters.values())[::-1] for block in reversed(order)]
    gathers = backward if by_layers else [[parameter] for params in backward for parameter in params]
    # The prefetch of the last layer has seen that the backward pass begins with it and the head: both stay, whatever
    # the distance is.
    always = len(order) - order.index(run.blocks.rest) + 1 if by_layers else 0
    for number, together in enumerate(gathers):
        if 2 * distance >= max_reuse_distance and number >= always:
            break
        distance += sum(parameter.numel() for parameter in together)
        gathered += sum(one.numel() for one in together if one.numel() > persistence_threshold)
        let_go -= sum(one.numel() for one in together if id(one) in ours)
    let_go = active if shared_before else let_go

    def gathered_at(arrival: Arrival | None) -> int:
        if arrival is None:
            return element * (gathered + int(share * let_go))
        key = id(arrival.parameter)
        passed = max(let_go, active - active_not_passed.get(key, 0))
        whole = max(gathered, max_live)
        return element * (min(whole, not_passed.get(key, gathered)) + int(share * passed))

    return gathered_at


def _blocks_in_forward_order(run: FakeRun, trained: set[int]) -> list[Block]:
    """The blocks that the backward pass comes to. A tied matrix is used first and last: here it stands last."""
    blocks: Blocks = run.blocks

    def trains(block: Block) -> bool:
        return any(id(parameter) in trained for parameter in block.parameters.values())

    layers = blocks.layers
    if blocks.adapters.parameters:  # which a layer is gathered with
        modules = run.model.get_submodule(blocks.layers_path).children()
        layers = [Block("layer", dict(module.named_parameters())) for module in modules]
    order = [*layers, blocks.rest, blocks.embed if blocks.tied else blocks.head]
    if not trains(blocks.embed) and not run.workload.checkpointed_layers:
        return order[next((index for index, layer in enumerate(layers) if trains(layer)), len(layers)) :]
    if not blocks.tied and trains(blocks.embed):
        return [blocks.embed, *order]
    return order
