"""The layout of partitions by calculation, against what DeepSpeed has really cut, and what every layout must fulfil."""

import pytest
import torch
from models import tiny_llama
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.optim.states import Piece
from lisa_dist.zero.layout import ALIGNMENT_FACTOR, partition_numel, pieces_of_group

# Sizes that no number of ranks here divides, one smaller than the number of ranks, and ends where partitions end.
GROUPS = [[("a", 7), ("b", 12), ("c", 1), ("d", 30)], [("a", 64)], [("a", 3)], [("a", 1), ("b", 2)]]
GROUPS += [[("a", 12), ("b", 12), ("c", 24)]]


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pieces_of_all_ranks_are_every_element_once(group, world_size, stage):
    numels = dict(group)
    partition = partition_numel(list(numels.values()), stage, world_size)
    times_held = {name: torch.zeros(numel, dtype=torch.int) for name, numel in group}
    for rank in range(world_size):
        in_partition = torch.zeros(partition, dtype=torch.int)
        for piece in pieces_of_group(group, stage, rank, world_size):
            assert 0 <= piece.start < piece.start + piece.length <= numels[piece.name]
            assert piece.offset + piece.length <= partition
            times_held[piece.name][piece.start : piece.start + piece.length] += 1
            in_partition[piece.offset : piece.offset + piece.length] += 1
        assert in_partition.max() <= 1, "two pieces lie upon each other"
    assert all((times == 1).all() for times in times_held.values())
    padding = world_size * partition - sum(numels.values())
    assert 0 <= padding < (world_size * len(group) if stage == 3 else ALIGNMENT_FACTOR * world_size)


def test_pieces_of_a_buffer_and_of_single_parameters():
    group = [("a", 7), ("b", 12)]
    assert partition_numel([7, 12], 2, 2) == 10
    assert pieces_of_group(group, 2, 1, 2) == [Piece("b", start=3, length=9, offset=0)]
    assert partition_numel([7, 12], 3, 2) == 4 + 6
    assert pieces_of_group(group, 3, 1, 2) == [
        Piece("a", start=4, length=3, offset=0),
        Piece("b", start=6, length=6, offset=4),
    ]
    assert partition_numel([7, 12], 1, 2, alignment=8) == 16
    assert pieces_of_group(group, 1, 1, 2, alignment=8) == [Piece("b", start=9, length=3, offset=0)]


def compare_with_deepspeed(ds_config: str) -> None:
    model = tiny_llama(vocab_size=97)
    initial = {name: parameter.detach().clone().flatten() for name, parameter in model.named_parameters()}
    engine, lisa = lisa_dist.initialize(model, ds_config, lisa_dist.LisaConfig.plain())
    stage, rank, world_size = engine.zero_optimization_stage(), dist.get_rank(), dist.get_world_size()
    assert {group["lr"] for group in lisa.partitions.optimizer.param_groups} == {1e-5}  # as documented
    if stage < 3:
        assert lisa.partitions.gathered_bytes() == 0
        assert engine.optimizer.nccl_start_alignment_factor == ALIGNMENT_FACTOR
    states, pieces = lisa.partition_states(), lisa.partitions.pieces()
    assert len(states) > 6
    for key, state in states.items():
        group = [(name, initial[name].numel()) for name in key]
        assert state.numel == partition_numel([numel for _, numel in group], stage, world_size), key
        assert pieces[key] == pieces_of_group(group, stage, rank, world_size)
        for piece in pieces[key]:  # masters are copies of exactly the weights that the pieces name
            weights = initial[piece.name][piece.start : piece.start + piece.length]
            assert torch.equal(state.master[piece.offset : piece.offset + piece.length], weights), (key, piece)
    engine.destroy()


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("ds_config", ["zero1", "zero2", "zero3"])
def test_deepspeed_cuts_partitions_as_calculated(ds_config):
    run_ranks(compare_with_deepspeed, 3, ds_config)
