"""bf16 training on CPUs whose cores do not multiply bf16.

There torch falls back to loops that are some twenty times slower than an fp32 product. Multiplying in fp32 and rounding
the result to bf16 gives the same precision (sums are fp32 in either case) at fp32's speed, and keeps weights, gradients
and activations in bf16, so memory is that of bf16.
"""

import functools
from typing import Any

import torch
from torch import nn

from lisa_dist.patches import patch


def cpu_multiplies_bf16() -> bool:
    """Whether torch has a fast bf16 matrix product on this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiply_in_fp32(model: nn.Module) -> None:
    """Let every linear layer of a bf16 model multiply in fp32; parameters and results stay bf16."""
    for module in model.modules():
        if type(module) is nn.Linear:
            forward: Any = functools.partial(_in_fp32, module)  # with which the model can still be pickled and copied
            forward.multiplies_in_fp32 = True  # what frozen layers in fewer bits then do too
            patch(module, "forward", forward, of="fp32_product")


def _in_fp32(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    return _LinearInFp32.apply(inputs, module.weight, module.bias)


class _LinearInFp32(torch.autograd.Function):
    """y = x W^T + b. Saves the bf16 tensors and casts again in backward, one layer at a time."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.has_bias = bias is not None
        outputs = nn.functional.linear(inputs.float(), weight.float(), None if bias is None else bias.float())
        return outputs.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        gradient = output_gradient.float()
        input_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = (gradient @ weight.float()).to(inputs.dtype)
        flat = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[1]:
            weight_gradient = (flat.T @ inputs.reshape(-1, inputs.shape[-1]).float()).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            bias_gradient = flat.sum(0).to(weight.dtype)
        return input_gradient, weight_gradient, bias_gradient
