"""The product with a frozen matrix in fp8, forward and backward, by units that multiply e4m3.

A matrix that is frozen for a period is quantized once in it. What comes in is quantized row by row in each pass:

    forward    y = (x_8 W_8^T) s_x s_w     x [tokens, inputs], W_8 [outputs, inputs], s_w of each output
    backward   dx = ((g s_w)_8 W_8) s_g    the scales of W lie along the sum, and go to the gradient first
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lisa_dist.optim.ops import fp8_rows


def takes_fp8(shape: Sequence[int]) -> bool:
    """Whether the units multiply a tensor of this shape: a matrix of multiples of 16."""
    return len(shape) == 2 and not any(size % 16 for size in shape)


class Fp8Product(torch.autograd.Function):
    """`encoded` gives codes [outputs, inputs] and scales [outputs, 1] again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        bias: torch.Tensor | None,
        codes: torch.Tensor,
        scales: torch.Tensor,
        encoded: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Inputs of any number of dimensions, the last of which the matrix is applied to."""
        ctx.encoded = encoded
        rows, row_scales = fp8_rows(inputs.reshape(-1, inputs.shape[-1]))
        product = _multiply(rows, row_scales, codes.t(), scales.t(), inputs.dtype)
        product = product.view(*inputs.shape[:-1], -1)
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), (codes, scales) = gradients, ctx.encoded()
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        rows, row_scales = fp8_rows(gradient.reshape(-1, gradient.shape[-1]), scales.view(-1))
        # GPUs only take the second matrix by columns. To keep the codes in this order too would double their memory.
        codes = codes.t().contiguous().t()
        ones = torch.ones(1, codes.shape[1], dtype=torch.float32, device=codes.device)
        product = _multiply(rows, row_scales, codes, ones, gradient.dtype)
        return product.view(*gradient.shape[:-1], -1), of_bias, None, None, None


def _multiply(
    first: torch.Tensor, of_rows: torch.Tensor, second: torch.Tensor, of_columns: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return torch._scaled_mm(first, second, scale_a=of_rows, scale_b=of_columns, out_dtype=dtype, use_fast_accum=True)
