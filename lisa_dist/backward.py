"""What a backward pass needs while gradients come: buckets, reductions, and what is kept, as DeepSpeed has it.

A gradient goes into a bucket; one that is larger than the bucket waits whole. When the next one does not fit beside
what has come, all that has come is reduced: only then is there a place for what this rank keeps. `peak_of_backward`
follows that gradient by gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lisa_dist.zero import NORM_CHUNK


@dataclass(frozen=True)
class Arrival:
    """A gradient that has come in a traced backward pass. Bytes, of everything but the gradients before it."""

    parameter: torch.nn.Parameter
    peak_before: int  # the most since the one before it has come
    now: int  # as it comes, itself included

    @property
    def nbytes(self) -> int:
        """Bytes of the gradient."""
        return self.parameter.numel() * self.parameter.element_size()


@dataclass(frozen=True)
class StepTrace:
    """Bytes that a forward and backward pass allocates on top of weights and states."""

    activations: int  # at the end of the forward pass
    logits: int  # at the end of the forward pass: what has the vocabulary as its last dimension
    arrivals: tuple[Arrival, ...]
    peak_after: int  # the most after the last gradient has come
    now: int  # at the end of the backward pass, gradients apart


@dataclass(frozen=True)
class Reductions:
    """How a stage reduces: the bucket in elements, what it takes, and what is there while it is reduced."""

    bucket: int
    bucket_bytes: int  # 0 where it is there all the time
    beside: Callable[[list[Arrival]], int]  # of what is reduced together: copies and temporary bytes
    keeps: Callable[[list[Arrival], int], int]  # all that this rank keeps after these, and what it did before
    gathered: Callable[[Arrival | None], int]  # weights held whole when that gradient comes; None: before the first
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


def peak_of_stage_1(trace: StepTrace, active: int, kept: int, bucket: int, accumulates: bool) -> int:
    """The same where all gradients, `active` bytes, stay until the last has come, and are then reduced.

    Those of a later micro-batch are added to what waits of the earlier ones.
    """
    come, peaks = 0, [active + kept + bucket]
    for one in trace.arrivals:
        peaks.append(one.peak_before + (active + bucket if accumulates else come))
        come += one.nbytes
    return max(*peaks, trace.peak_after + (active + bucket if accumulates else come))


def reductions_of_stage_2(
    groups: Sequence[Sequence[torch.nn.Parameter]],
    partitions: Sequence[int],
    rank: int,
    *,
    element: int,
    bucket: int,
    bucket_bytes: int,
    held: int,
    offloaded: bool,
    last: bool,
) -> Reductions:
    """Of one rank, which holds `held` bytes of gradients. A group's parameters lie end to end, cut into partitions.

    `last`: of the micro-batches of a step; under offload the others' gradients are added up on the host, and sent then.
    """
    slices: dict[int, dict[int, int]] = {}  # of a parameter: elements by rank
    for params, partition in zip(groups, partitions, strict=True):
        begins = 0
        for parameter in params:
            ends = begins + parameter.numel()
            slices[id(parameter)] = {
                owner: min(ends, (owner + 1) * partition) - max(begins, owner * partition)
                for owner in range(begins // partition, (ends - 1) // partition + 1)
            }
            begins = ends

    def beside(reduced: list[Arrival]) -> int:
        of_each = [slices[id(one.parameter)] for one in reduced]
        copied = 0
        if len({owner for owners in of_each for owner in owners}) > 1:
            # Slice after slice goes into one flat tensor until that is larger than the bucket; a single one stays.
            total = sum(one.parameter.numel() for one in reduced)
            largest = max(max(owners.values()) for owners in of_each)
            copied = min(total, bucket + largest) * element if largest <= bucket else 0
        sent = [_chunk_bytes(owners[rank]) for owners in of_each if rank in owners] if offloaded and last else []
        return max([copied, *sent])

    def keeps(reduced: list[Arrival], kept: int) -> int:
        of_this_rank = [one for one in reduced if rank in slices[id(one.parameter)]]
        if offloaded:  # before the last micro-batch, what is outside of the bucket stays, though it is on the host too
            return kept + sum(one.nbytes for one in of_this_rank if not last and one.parameter.numel() > bucket)
        return held if of_this_rank else kept

    return Reductions(bucket, bucket_bytes, beside, keeps, gathered=lambda one: 0, clones=offloaded)


def reductions_of_stage_3(
    world_size: int,
    element: int,
    bucket: int,
    *,
    offloaded: bool,
    on_cpu: bool,
    gathered: Callable[[Arrival | None], int],
) -> Reductions:
    """Of any rank: each parameter is cut by itself. The bucket, and what is kept, is there all the time."""

    def beside(reduced: list[Arrival]) -> int:
        interleaved = len(reduced) > 1 or reduced[0].parameter.numel() % world_size
        copied = sum(one.nbytes for one in reduced) * (bool(interleaved) + on_cpu)  # gloo makes a copy of its own
        shares = [math.ceil(one.parameter.numel() / world_size) for one in reduced] if offloaded else []
        # The share comes back from the host, which on CPU is the same place.
        sent = [_chunk_bytes(share) + (0 if on_cpu else share * element) for share in shares]
        return max([copied, *sent])

    return Reductions(bucket, 0, beside, keeps=lambda reduced, kept: 0, gathered=gathered)


def _chunk_bytes(numel: int) -> int:
    """What is beside a gradient that is sent to the host: its norm in fp64, by chunks."""
    return 8 * min(numel, NORM_CHUNK)
