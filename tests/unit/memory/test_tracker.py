"""Storages that operators allocate."""

import torch

from lisa_dist.memory.tracker import AllocationTracker


def test_tensors_without_memory_are_not_counted():
    with AllocationTracker() as tracker:
        weights = torch.zeros(1000)
        on_meta = weights.to("meta")
    assert on_meta.numel() == 1000
    assert tracker.peak == weights.nbytes
