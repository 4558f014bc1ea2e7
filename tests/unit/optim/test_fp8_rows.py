"""Rows in fp8: what codes and scales stand for, and the Triton kernel against torch's in its interpreter."""

import pytest
import torch
from ranks import run_ranks

from lisa_dist.kernels.fp8_rows import E4M3, fp8_rows_torch, from_fp8_rows


def values(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of all sizes, the first of zeros, with elements from tiny to large in each."""
    generator = torch.Generator().manual_seed(rows * columns)
    made = torch.randn(rows, columns, generator=generator) * torch.logspace(-12, 12, rows)[:, None]
    made *= torch.exp2(torch.randint(-12, 1, (rows, columns), generator=generator))
    made[0] = 0
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_code_is_the_nearest_there_is(dtype):
    given = values(9, 96, dtype)
    codes, scales = fp8_rows_torch(given)
    assert (codes.dtype, scales.shape) == (E4M3, (9, 1))
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5)), "powers of two"
    share = given.float().abs().amax(1) / scales[:, 0]
    assert bool((share[1:] > 224).all() and (share <= 448).all())
    found = from_fp8_rows(codes, scales, torch.float32)
    numbers = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    nearest = (numbers[numbers.isfinite()][:, None, None] * scales - given.float()).abs().amin(0)
    assert torch.equal((found - given.float()).abs(), nearest)
    assert torch.equal(from_fp8_rows(codes, scales, torch.bfloat16).float(), found), "exact in bf16"


def test_factors_of_columns_come_first():
    given, factors = values(5, 32, torch.bfloat16), torch.exp2(torch.arange(32) % 9 - 4.0)
    pairs = zip(fp8_rows_torch(given, factors), fp8_rows_torch(given.float() * factors), strict=True)
    assert all(torch.equal(one.float(), other.float()) for one, other in pairs)


def test_what_is_not_finite_stays_so():
    given = torch.ones(2, 32)
    given[0, 3], given[1, 4] = torch.inf, torch.nan
    found = from_fp8_rows(*fp8_rows_torch(given), torch.float32)
    assert not found[0, 3].isfinite()
    assert not found[1, 4].isfinite()


def test_triton_s_kernel_gives_the_same():
    pytest.importorskip("triton", reason="Triton is not installed")
    run_ranks(compare, 1, interpret=True)


def compare() -> None:
    from lisa_dist.kernels.fp8_rows_triton import fp8_rows_triton

    for dtype in (torch.bfloat16, torch.float32):
        for rows, columns in ((9, 96), (3, 1), (2, 1000), (4, 256)):
            given = values(rows, columns, dtype)
            for factors in (None, torch.exp2(torch.arange(columns) % 9 - 4.0)):
                (codes, scales), (expected, of_rows) = (
                    kernel(given, factors) for kernel in (fp8_rows_triton, fp8_rows_torch)
                )
                assert torch.equal(scales, of_rows)
                assert torch.equal(codes.float(), expected.float())
    bits = torch.tensor([0x7FFFFFFF, 0x7F800000, 0x7FC00000, -0x800000, 0x3F800000], dtype=torch.int32)
    codes, _ = fp8_rows_triton(bits.view(torch.float32).view(-1, 1).expand(-1, 16).contiguous())
    assert codes.float().isnan().tolist() == [[True] * 16] * 4 + [[False] * 16], "a GPU's own NaN is the first"
