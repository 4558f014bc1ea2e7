"""Where a rank's piece of each parameter begins and ends, as DeepSpeed lays partitions out: pure functions of sizes.

A parameter group has one partition on each rank. With W ranks:

- stages 1 and 2 lay the parameters of a group end to end in one buffer, pad it to a multiple of `alignment * W`
  elements and cut it into W partitions of equal size: one may begin in the middle of a parameter and contain several;
- stage 3 cuts each parameter by itself into W shares of equal size, the last ones padded: a partition has a share of
  each parameter of the group, one after another.

The engine (`partitions.py`) and the memory estimate (`memory/estimate.py`) both read it here. `named_numels` lists a
group's parameters in the order of the group, each with its number of elements.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lisa_dist.optim.factored import Matrix
from lisa_dist.optim.states import Piece


@dataclass(frozen=True)
class GroupLayouts:
    """By parameter group: the pieces of this rank's partition and, where its moments are factored, its matrices.

    `of_rows`: the group, if there is one, whose gradient is of the rows that occur, and the piece that each rank has.
    """

    pieces: list[list[Piece]]
    matrices: list[list[Matrix]]
    of_rows: tuple[int, list[Piece | None]] | None = None


# `nccl_start_alignment_factor` of DeepSpeedZeroOptimizer (deepspeed/runtime/zero/stage_1_and_2.py): a partition begins
# at a multiple of 4 bytes. An engine has the live value; this one is for estimates, which have no engine.
ALIGNMENT_FACTOR = 2


def partition_numel(numels: Sequence[int], stage: int, world_size: int, alignment: int = ALIGNMENT_FACTOR) -> int:
    """Elements of one rank's partition of a group, padding included; `numels` are those of the group's parameters."""
    if stage == 3:
        return sum(share_numel(numel, world_size) for numel in numels)
    return -(-sum(numels) // (alignment * world_size)) * alignment  # rounded up


def share_numel(numel: int, world_size: int) -> int:
    """Elements of each rank's share of one parameter under stage 3, padding included."""
    return -(-numel // world_size)  # rounded up


def pieces_of_group(
    named_numels: Sequence[tuple[str, int]],
    stage: int,
    rank: int,
    world_size: int,
    alignment: int = ALIGNMENT_FACTOR,
) -> list[Piece]:
    """The elements of each parameter that are in this rank's partition; the rest of the partition is padding."""
    partition = partition_numel([numel for _, numel in named_numels], stage, world_size, alignment)
    pieces, offset = [], 0 if stage == 3 else -rank * partition  # of each parameter, from where the partition begins
    for name, numel in named_numels:
        if stage == 3:  # a small parameter may have nothing on the last ranks
            share = share_numel(numel, world_size)
            start, ends = rank * share, min((rank + 1) * share, numel)
            if start < ends:
                pieces.append(Piece(name, start, length=ends - start, offset=offset))
            offset += share
        else:
            first, last = max(offset, 0), min(offset + numel, partition)
            if first < last:
                pieces.append(Piece(name, start=first - offset, length=last - first, offset=first))
            offset += numel
    return pieces


def matrices_of_group(
    named_shapes: Sequence[tuple[str, tuple[int, ...]]],
    stage: int,
    world_size: int,
    alignment: int = ALIGNMENT_FACTOR,
) -> list[Matrix]:
    """A group's matrices, and which rows of each the cuts between ranks go through; the same on every rank."""
    named_numels = [(name, rows * columns) for name, (rows, columns) in named_shapes]
    columns_of = {name: columns for name, (_, columns) in named_shapes}
    ends: dict[str, Counter[int]] = {name: Counter() for name in columns_of}  # how many ranks begin or end in a row
    for rank in range(world_size):
        for piece in pieces_of_group(named_numels, stage, rank, world_size, alignment):
            columns = columns_of[piece.name]
            ends[piece.name].update({piece.start // columns, (piece.start + piece.length - 1) // columns})
    return [
        Matrix(name, rows, columns, tuple(sorted(row for row, ranks in ends[name].items() if ranks > 1)))
        for name, (rows, columns) in named_shapes
    ]
