"""Rows in fp8 by a Triton kernel: one program a row, which is read once."""

import torch
import triton
import triton.language as tl

from .fp8_rows import E4M3


@triton.jit
def _code(value):
    """Of the nearest number of e4m3, of two the even one: a cast of those is exact, in Triton's interpreter too."""
    bits = value.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + (bits >> 20 & 1) & -0x100000).to(tl.float32, bitcast=True)
    shift: tl.constexpr = 1.5 * 2**14  # the last bit of a sum with it is 2**-9, as of the numbers below 2**-6
    rounded = tl.where(tl.abs(value) < 2**-6, value + shift - shift, normal)
    code = rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) >= 0x7F800000, 0x7F, code).to(tl.uint8)  # a cast saturates what is not finite


@triton.jit
def _fp8_rows(
    values,
    factors,
    codes,
    scales,
    columns,
    HAS_FACTORS: tl.constexpr,  # noqa: N803 - constants of a kernel
    COLUMNS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    begin = row.to(tl.int64) * columns
    value = tl.load(values + begin + column, mask=column < columns, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        value *= tl.load(factors + column, mask=column < columns, other=0.0)
    largest = tl.max(tl.abs(value), axis=0)
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) + 0x1FFFFF >> 23) - 8, 1)
    inverse = (254 - exponent << 23).to(tl.float32, bitcast=True)
    tl.store(codes + begin + column, _code(value * inverse), mask=column < columns)
    tl.store(scales + row, (exponent << 23).to(tl.float32, bitcast=True))


def fp8_rows_triton(values: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fp8_rows_torch`, of contiguous values."""
    rows, columns = values.shape
    codes, scales = torch.empty_like(values, dtype=E4M3), values.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    warps = min(16, max(1, block // 512))
    of_codes = codes.view(torch.uint8)
    _fp8_rows[(rows,)](values, factors, of_codes, scales, columns, factors is not None, block, num_warps=warps)
    return codes, scales
