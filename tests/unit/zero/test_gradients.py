"""Norms of gradients, without ranks."""

import pytest
import torch

from lisa_dist.zero.gradients import sums_of_squares_in_chunks, sums_of_squares_in_fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_squares_on_a_gpu_are_those_on_a_cpu(dtype):
    """Groups may be empty, and so may a rank's part of a gradient be."""
    generator = torch.Generator().manual_seed(1)
    sizes = [[(300, 70), (70,)], [], [(0,), (5000,)], [(1,)]]
    groups = [[torch.randn(size, generator=generator).to(dtype) for size in group] for group in sizes]
    expected = sums_of_squares_in_chunks(groups)
    found = sums_of_squares_in_fp32(groups)
    assert found.dtype == expected.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert found[1] == 0 < found[0]


def test_a_rank_may_have_no_gradient():
    assert sums_of_squares_in_fp32([[], []]).tolist() == sums_of_squares_in_chunks([[], []]).tolist() == [0, 0]


def test_a_gradient_that_is_not_finite_is_seen():
    for value in (float("inf"), float("nan")):
        sums = sums_of_squares_in_fp32([[torch.tensor([1.0, value])], [torch.ones(2)]])
        assert sums.isfinite().tolist() == [False, True]
