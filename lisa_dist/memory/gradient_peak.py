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
from lisa_dist.zero import gradients
from lisa_dist.zero.layout import pieces_of_group, share_numel


@dataclass(frozen=True)
class Reduction:
    """How a ZeRO stage reduces gradients. Sizes in bytes but for `bucket_numel`."""

    bucket_numel: int
    bucket_bytes: int  # 0 where the bucket exists all the time
    scratch: Callable[[list[Arrival]], int]  # allocated only while these gradients are reduced
    copied: Callable[[list[Arrival], int], int]  # allocated for what this rank keeps of them; the number is kept before
    stays: Callable[[list[Arrival]], int]  # of those outside the bucket, what this rank keeps where it is
    gathered: Callable[[Arrival | None], int]  # whole weights when that gradient arrives; None: before the first
    clones_large: bool = False  # a gradient that is larger than the bucket is cloned when it arrives
    one_buffer: int = 0  # that what is kept is copied to, where there is one

    def is_large(self, arrival: Arrival) -> bool:
        """Whether the gradient has no room in the bucket."""
        return arrival.parameter.numel() > self.bucket_numel

    def overflows(self, waiting: Sequence[Arrival], arrival: Arrival) -> bool:
        """Whether the waiting gradients and this one are too many for the bucket."""
        return sum(other.parameter.numel() for other in waiting) + arrival.parameter.numel() > self.bucket_numel


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
        copied = reduction.copied(waiting, kept)
        during = kept + max(reduction.scratch(waiting), copied)
        peaks.append(Peak(other_bytes, earlier + waiting_outside_bucket() + during, bucket))
        kept += copied + reduction.stays(waiting)
        waiting.clear()

    gathered = reduction.gathered(None)
    for arrival in trace.arrivals:
        peaks.append(Peak(arrival.peak_before + gathered, earlier + waiting_outside_bucket() + kept, bucket))
        bucket, gathered = reduction.bucket_bytes, reduction.gathered(arrival)
        if reduction.overflows(waiting, arrival):
            reduce(arrival.now + gathered)
        clone = arrival.nbytes if reduction.clones_large and reduction.is_large(arrival) else 0
        peaks.append(Peak(arrival.now + gathered, earlier + clone + waiting_outside_bucket() + kept, bucket))
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
    clones = [arrival.nbytes for arrival in large if reduction.clones_large]
    scratch = [reduction.scratch([one]) - (0 if one in large else one.nbytes) for one in trace.arrivals]
    freed = 0 if large[:1] == trace.arrivals[:1] else reduction.bucket_bytes  # before the first goes to the one buffer
    more = max([*clones, *scratch, reduction.one_buffer - freed, 0])
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


def reduction_stages_1_2(
    slices: dict[int, dict[int, int]],
    rank: int,
    *,
    element: int,
    bucket_numel: int,
    bucket_bytes: int,
    one_buffer: int | None,
    send_scratch: Callable[[int], int] | None,
    is_last: bool,
) -> Reduction:
    """How stages 1 and 2 reduce on one rank, which keeps gradients as they are.

    `slices` is the result of `slices_by_rank`, `element` the bytes of an element. `one_buffer`: bytes of the buffer
    that all are copied to where there is one, as without LISA. `send_scratch(numel)`, with optimizer offload: bytes
    allocated while a gradient of so many elements is sent to the host. `is_last`: of a step's micro-batches; with
    offload the gradients of the others are added up on the host, and sent with the last.
    """

    def slices_of(arrival: Arrival) -> dict[int, int]:
        return slices[id(arrival.parameter)]

    def is_local(arrival: Arrival) -> bool:
        return rank in slices_of(arrival)

    def scratch(reduced: list[Arrival]) -> int:
        most_copied = _most_copied([owned for arrival in reduced for owned in slices_of(arrival).items()], bucket_numel)
        sent = []
        if send_scratch and is_last:
            sent = [send_scratch(slices_of(arrival)[rank]) for arrival in reduced if is_local(arrival)]
        return max([most_copied * element, *sent])

    def copied(reduced: list[Arrival], kept: int) -> int:
        local = [arrival for arrival in reduced if is_local(arrival)]
        if send_scratch:
            return 0
        if one_buffer is not None:
            return one_buffer - kept if local else 0
        return sum(arrival.nbytes for arrival in local if arrival.parameter.numel() <= bucket_numel)

    def stays(reduced: list[Arrival]) -> int:
        # With offload, before the last micro-batch, large gradients stay here, though they are on the host too.
        if one_buffer is not None or (send_scratch and is_last):
            return 0
        large = [arrival for arrival in reduced if arrival.parameter.numel() > bucket_numel]
        return sum(arrival.nbytes for arrival in large if is_local(arrival))

    return Reduction(
        bucket_numel,
        bucket_bytes,
        scratch,
        copied,
        stays,
        gathered=lambda arrival: 0,
        clones_large=send_scratch is not None,
        one_buffer=one_buffer or 0,
    )


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


def reduction_stage_3(
    world_size: int,
    *,
    element: int,
    bucket_numel: int,
    send_scratch: Callable[[int], int] | None,
    on_cpu: bool,
    gathered: Callable[[Arrival | None], int],
) -> Reduction:
    """How stage 3 reduces, on any rank. The bucket and the gradients that are kept have buffers all the time."""

    def scratch(reduced: list[Arrival]) -> int:
        interleaves = len(reduced) > 1 or reduced[0].parameter.numel() % world_size
        whole = sum(arrival.nbytes for arrival in reduced)
        interleaved, gloo = whole if interleaves else 0, whole if on_cpu else 0
        if send_scratch is None:
            return interleaved + gloo
        shares = [share_numel(arrival.parameter.numel(), world_size) for arrival in reduced]
        # The share comes back from the host, which on CPU is the same place.
        returned = [send_scratch(share) + (0 if on_cpu else share * element) for share in shares]
        return interleaved + max(gloo, *returned)

    return Reduction(
        bucket_numel,
        0,
        scratch,
        copied=lambda reduced, kept: 0,
        stays=lambda reduced: 0,
        gathered=gathered,
    )


def norm_scratch_in_chunks(numel: int) -> int:
    """Bytes allocated on stages 1, 2 to send a gradient of so many elements to the host, with its norm: fp64 chunks."""
    return 8 * min(numel, gradients.NORM_CHUNK)


def norm_scratch_on_cpu(numel: int) -> int:
    """The same for its norm alone, on a CPU."""
    return 8 * min(numel, gradients.CPU_NORM_CHUNK)


def norm_scratch_of_deepspeed(stage: int, offloads: bool) -> Callable[[int], int]:
    """The same by DeepSpeed's own code: fp64 of the gradient, but of 250 million elements on stage 3 with offload."""
    if stage == 3 and offloads:
        return lambda numel: max(8 * min(numel, 250_000_000), 4 * numel)
    return lambda numel: 8 * numel


def gathered_weights(
    run: FakeRun, trained: Sequence[torch.nn.Parameter], persistence_threshold: int, max_reuse_distance: int
) -> Callable[[Arrival | None], int]:
    """Bytes of whole weights, as a function of the gradient that arrives.

    None, the end of the forward pass: those that the backward pass needs again within `max_reuse_distance` elements.
    When a gradient arrives: at most those that the backward pass has not passed. Parameters of up to
    `persistence_threshold` elements are whole all the time and not counted.
    """
    blocks, element = run.blocks, run.workload.dtype.itemsize
    order = _blocks_in_forward_order(run, {id(parameter) for parameter in trained})
    not_passed: dict[int, int] = {}  # by parameter: elements of its block and of the blocks before it
    numel_so_far = 0
    for block in order:
        numel_so_far += sum(
            parameter.numel() for parameter in block.parameters.values() if parameter.numel() > persistence_threshold
        )
        not_passed |= {id(parameter): numel_so_far for parameter in block.parameters.values()}
    if blocks.tied:  # the backward pass begins and ends with the tied matrix
        matrix = sum(parameter.numel() for parameter in blocks.embed.parameters.values())
        not_passed = {key: numel + matrix for key, numel in not_passed.items()}
        not_passed |= {id(parameter): matrix for parameter in blocks.embed.parameters.values()}
    gathered = distance = 0
    for parameter in reversed([parameter for block in order for parameter in block.parameters.values()]):
        if 2 * distance >= max_reuse_distance:
            break
        distance += parameter.numel()
        gathered += parameter.numel() if parameter.numel() > persistence_threshold else 0

    def gathered_at(arrival: Arrival | None) -> int:
        if arrival is None:
            return gathered * element
        return element * min(gathered, not_passed.get(id(arrival.parameter), gathered))

    return gathered_at


def _blocks_in_forward_order(run: FakeRun, trained: set[int]) -> list[Block]:
    """The blocks that the backward pass comes to. A tied matrix is used first and last: here it stands last."""
    blocks: Blocks = run.blocks

    def trains(block: Block) -> bool:
        return any(id(parameter) in trained for parameter in block.parameters.values())

    order = [*blocks.layers, blocks.rest, blocks.embed if blocks.tied else blocks.head]
    has_adapters = len(list(run.model.parameters())) > sum(len(block.parameters) for block in blocks)
    if not has_adapters and not trains(blocks.embed) and not run.workload.checkpointed_layers:
        lowest = next((index for index, layer in enumerate(blocks.layers) if trains(layer)), len(blocks.layers))
        return order[lowest:]
    if not blocks.tied and trains(blocks.embed):
        return [blocks.embed, *order]
    return order
