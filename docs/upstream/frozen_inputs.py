"""What a stack of linear layers keeps for its backward pass: python frozen_inputs.py"""

from collections.abc import Callable

import torch
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from torch.nn import functional

LAYERS, WIDTH, TOKENS = 8, 512, 1024


def kept_bytes(linear: Callable, trains: bool) -> int:
    """Bytes of the inputs that autograd keeps."""
    weights = [torch.randn(WIDTH, WIDTH, requires_grad=trains) / WIDTH**0.5 for _ in range(LAYERS)]
    places, kept = {weight.data_ptr() for weight in weights}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in places:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for weight in weights:
            hidden = linear(hidden, weight)
    hidden.sum().backward()
    return sum(kept.values())


for name, linear in (("torch", functional.linear), ("ZeRO-3", LinearFunctionForZeroStage3.apply)):
    for trains in (True, False):
        state = "trained" if trains else "frozen"
        print(f"{name:7} {state:8} weights: {kept_bytes(linear, trains) / 2**20:5.1f} MiB of inputs kept")
