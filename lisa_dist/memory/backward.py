"""What a backward pass needs while gradients come: buckets, reductions, and what is kept, as DeepSpeed has it.

A gradient goes into a bucket; one that is larger than the bucket waits whole. When the next one does not fit beside
what has come, all that has come is reduced: only then is there a place for what this rank keeps. `peak_of_backward`
follows that gradient by gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lisa_dist.memory.trace import Arrival, Group, StepTrace
from lisa_dist.zero.gradients import NORM_CHUNK
from lisa_dist.zero.layout import pieces_of_group, share_numel


@dataclass(frozen=True)
class Reductions:
    """How a stage reduces: the bucket in elements, what it takes, and what is there while it is reduced."""

    bucket: int
    bucket_bytes: int  # 0 where it is there all the time
    beside: Callable[[list[Arrival]], int]  # what there is for a moment while these are reduced
    keeps: Callable[[list[Arrival], int], int]  # all that this rank keeps after these; the number is of before
    gathered: Callable[[Arrival | None], int]  # weights held whole when that gradient comes; None: before the first
    is_here: Callable[[Arrival], bool]  # whether some of it is of this rank's partition
    clones: bool = False  # a gradient that is larger than the bucket, when it comes


def peak_of_backward(trace: StepTrace, how: Reductions) -> int:
    """The most bytes at any time of the forward and backward pass, beyond what is there between steps."""
    bucket = kept = 0
    waiting: list[Arrival] = []
    peaks: list[int] = []

    def whole() -> int:  # what waits outside of the bucket
        return sum(one.nbytes for one in waiting if one.parameter.numel() > how.bucket)

    def reduce(now: int) -> None:  # what is there but gradients
        nonlocal kept
        if not waiting:
            return
        keeps = how.keeps(waiting, kept)
        peaks.append(now + bucket + whole() + max(kept + how.beside(waiting), keeps))
        kept = keeps
        waiting.clear()

    gathered = how.gathered(None)
    for one in trace.arrivals:
        peaks.append(one.peak_before + gathered + bucket + whole() + kept)
        bucket, gathered = how.bucket_bytes, how.gathered(one)
        if sum(other.parameter.numel() for other in waiting) + one.parameter.numel() > how.bucket:
            reduce(one.now + gathered)
        clone = one.nbytes if how.clones and one.parameter.numel() > how.bucket else 0
        peaks.append(one.now + clone + gathered + bucket + whole() + kept)
        waiting.append(one)
    peaks.append(trace.peak_after + gathered + bucket + whole() + kept)
    reduce(trace.now)
    return max(peaks)


def peak_of_stage_1(
    trace: StepTrace, in_order: Sequence[torch.nn.Parameter], how: Reductions, accumulates: bool
) -> int:
    """The same where all gradients stay until the last has come, and are then reduced in the order of the groups.

    Gradients of a later micro-batch are added to what waits of the earlier ones.
    """
    active = sum(one.nbytes for one in trace.arrivals)
    held, peaks = (active + how.bucket_bytes if accumulates else 0), []
    for one in trace.arrivals:
        peaks.append(one.peak_before + held)
        held += 0 if accumulates else one.nbytes + (0 if held else how.bucket_bytes)
    peaks.append(trace.peak_after + held)

    arrivals = {id(one.parameter): one for one in trace.arrivals}
    waiting: list[Arrival] = []
    kept = 0

    def reduce() -> None:
        nonlocal held, kept
        keeps = how.keeps(waiting, kept)
        peaks.append(trace.now + held + max(kept + how.beside(waiting), keeps))
        kept = keeps
        held -= sum(one.nbytes for one in waiting if one.parameter.numel() > how.bucket and how.is_here(one))
        waiting.clear()

    for one in (arrivals[id(parameter)] for parameter in in_order if id(parameter) in arrivals):
        if waiting and sum(other.parameter.numel() for other in waiting) + one.parameter.numel() > how.bucket:
            reduce()
        fits = one.parameter.numel() <= how.bucket
        peaks.append(trace.now + held + kept + (one.nbytes if how.clones and not fits else 0))
        held -= one.nbytes if fits else 0
        waiting.append(one)
    reduce()
    return max(peaks)


def slices_by_rank(groups: Sequence[Group], stage: int, world_size: int) -> dict[int, dict[int, int]]:
    """By the id of each parameter: how many of its elements are in the partition of each rank that has any of it."""
    slices: dict[int, dict[int, int]] = {id(parameter): {} for group in groups for parameter in group.params}
    for group in groups:
        for rank in range(world_size):
            for piece in pieces_of_group(group.named_numels, stage, rank, world_size):
                slices[id(group.params[int(piece.name)])][rank] = piece.length
    return slices


def reductions_of_stage_2(
    slices: dict[int, dict[int, int]],
    rank: int,
    *,
    element: int,
    bucket: int,
    bucket_bytes: int,
    held: int,
    sending: Callable[[int], int] | None,
    last: bool,
) -> Reductions:
    """Of one rank, which holds `held` bytes of gradients; `slices` are those of `slices_by_rank`.

    `sending`, under offload: bytes beside a gradient of so many elements while it is sent to the host. `last`: of the
    micro-batches of a step; under offload the others' gradients are added up on the host, and sent then.
    """

    def beside(reduced: list[Arrival]) -> int:
        of_each = [slices[id(one.parameter)] for one in reduced]
        # Slice after slice goes into one flat tensor until that is larger than the bucket; a single one stays.
        copied = together = number = 0
        before = None
        for owner, numel in (slice_ for owners in of_each for slice_ in owners.items()):
            number, before = number + (owner != before), owner
            together += numel
            copied = max(copied, together if number > 1 else 0)
            if together > bucket:
                together, number, before = 0, 0, None
        sent = [sending(owners[rank]) for owners in of_each if rank in owners] if sending and last else []
        return max([copied * element, *sent])

    def is_here(one: Arrival) -> bool:
        return rank in slices[id(one.parameter)]

    def keeps(reduced: list[Arrival], kept: int) -> int:
        of_this_rank = [one for one in reduced if is_here(one)]
        if sending:  # before the last micro-batch, what is outside of the bucket stays, though it is on the host too
            return kept + sum(one.nbytes for one in of_this_rank if not last and one.parameter.numel() > bucket)
        return held if of_this_rank else kept

    return Reductions(bucket, bucket_bytes, beside, keeps, lambda one: 0, is_here, clones=sending is not None)


def reductions_of_stage_3(
    world_size: int,
    element: int,
    bucket: int,
    *,
    sending: Callable[[int], int] | None,
    on_cpu: bool,
    gathered: Callable[[Arrival | None], int],
) -> Reductions:
    """Of any rank: each parameter is cut by itself. The bucket, and what is kept, is there all the time."""

    def beside(reduced: list[Arrival]) -> int:
        interleaved = len(reduced) > 1 or reduced[0].parameter.numel() % world_size
        whole = sum(one.nbytes for one in reduced)
        copied, of_gloo = whole if interleaved else 0, whole if on_cpu else 0
        if sending is None:
            return copied + of_gloo
        shares = [share_numel(one.parameter.numel(), world_size) for one in reduced]
        # The share comes back from the host, which on CPU is the same place.
        return copied + max(of_gloo, *(sending(share) + (0 if on_cpu else share * element) for share in shares))

    return Reductions(bucket, 0, beside, keeps=lambda reduced, kept: 0, gathered=gathered, is_here=lambda one: True)


def in_chunks(numel: int) -> int:
    """Bytes beside a gradient of so many elements while LISA has its norm taken, or sends it: fp64, by chunks."""
    return 8 * min(numel, NORM_CHUNK)


def whole_by_stage(stage: int, offloaded: bool) -> Callable[[int], int]:
    """The same of DeepSpeed without LISA: fp64 of the whole, but of 250 million elements on stage 3 under offload."""
    if stage == 3 and offloaded:
        return lambda numel: max(8 * min(numel, 250_000_000), 4 * numel)
    return lambda numel: 8 * numel
