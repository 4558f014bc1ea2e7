"""Rows of a matrix in fp8 (e4m3), each with a scale of its own that is a power of two.

A scale is the least 2**s with which no element of its row is above 448, the largest of e4m3. So what a code stands for
is a number of bf16.
"""

import torch

E4M3 = torch.float8_e4m3fn
_CHUNK = 1 << 26  # elements that are in fp32 at a time


def power_of_two_scales(largest: torch.Tensor) -> torch.Tensor:
    """The scales of rows by the largest size in each, fp32; of zeros the least there is."""
    exponents = (largest.view(torch.int32) + 0x1FFFFF >> 23) - 8  # 448 is 1.75 * 2**8: above 1.75 the next exponent
    return (exponents.clamp_(min=1) << 23).view(torch.float32)


def fp8_rows_torch(values: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `values` [rows, columns], in e4m3, and scales, fp32 [rows, 1]; each column times its factor before."""
    codes, scales = torch.empty_like(values, dtype=E4M3), values.new_empty(len(values), 1, dtype=torch.float32)
    step = max(1, _CHUNK // max(1, values.shape[-1]))
    for begin in range(0, len(values), step):
        rows = slice(begin, begin + step)
        whole = values[rows].float() if factors is None else values[rows].float() * factors
        scales[rows] = power_of_two_scales(whole.abs().amax(-1, keepdim=True))
        codes[rows] = (whole / scales[rows]).to(E4M3)
    return codes, scales


def from_fp8_rows(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What codes and their scales stand for; exact, but where it is less than the least number of `dtype`."""
    return codes.to(dtype) * scales.to(dtype)
