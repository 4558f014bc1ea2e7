"""Passes of modules whose weights are frozen and quantized: the weights are dequantized for each of the two passes.

Two ways. A product keeps nothing of its matrix but where to get it from (`LinearForward`, the faster one). Any other
module, such as the experts of a mixture, computes by its own code: for the length of its forward it has the whole
tensors, and where autograd would keep one of them, or a view, it keeps the place of the view instead (`WholeForward`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lisa_dist.core.fp8_product import Fp8Product
from lisa_dist.core.matrices import Matrix
from lisa_dist.patches import patch


class WholeTensors:
    """Whole tensors of one module at a time: of that whose pass runs, forward or backward."""

    def __init__(self) -> None:
        self._owner: object = None
        self._tensors: dict[str, torch.Tensor] = {}

    def get(self, forward: "WholeForward", attribute: str) -> torch.Tensor:
        """A module's tensor: the one that the same pass has made whole already, or else a new one."""
        if self._owner is not forward:
            self.clear()
            self._owner = forward
            if is_in_backward():  # after the last module that has any nobody else would
                torch.autograd.Variable._execution_engine.queue_callback(self.clear)
        if attribute not in self._tensors:
            self._tensors[attribute] = forward.weights[attribute].whole()
        return self._tensors[attribute]

    def clear(self) -> None:
        """Let go of all."""
        self._owner = None
        self._tensors.clear()


def is_in_backward() -> bool:
    """Whether autograd runs a backward pass, or in one a forward pass that was checkpointed."""
    return torch._C._current_graph_task_id() != -1


class FrozenForward:
    """In the place of the `forward` of a module: `weights`, by attribute, are its FrozenWeights."""

    def __init__(self, module: Any, tensors: WholeTensors):
        self.module, self.tensors = module, tensors
        self.weights: dict[str, Any] = {}
        self.before: Any = vars(module).get("forward")

    def remove(self) -> None:
        """Let the module have the forward again that it had before."""
        del self.module.forward
        if self.before is not None:
            patch(self.module, "forward", self.before, of="frozen_forward")

    def _check_frozen(self) -> None:
        if any(self.module._parameters[attribute].requires_grad for attribute in self.weights):
            raise RuntimeError("this model's frozen layers are quantized by a LISA run: load it anew to train it.")


def frozen_forward(matrix: Matrix, tensors: WholeTensors) -> FrozenForward:
    """That of a module, which gets one where it has none."""
    current = vars(matrix.module).get("forward")
    if isinstance(current, FrozenForward):
        return current
    made = (LinearForward if matrix.is_linear else WholeForward)(matrix.module, tensors)
    patch(matrix.module, "forward", made, of="frozen_forward")
    return made


class LinearForward(FrozenForward):
    """A product with a quantized matrix."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self._check_frozen()
        weight, transposed = self.weights["weight"], isinstance(self.module, Conv1D)
        if not transposed and (encoded := weight.fp8()):
            self.tensors.clear()
            scaled: torch.Tensor = Fp8Product.apply(inputs, self.module.bias, *encoded, weight.fp8)
            return scaled
        product: torch.Tensor = FrozenProduct.apply(inputs, self.module.bias, self.whole(), self, transposed)
        return product

    def whole(self) -> torch.Tensor:
        self.tensors.clear()  # those of the module before
        weight: torch.Tensor = self.weights["weight"].whole()
        return weight

    @property
    def in_fp32(self) -> bool:
        """Whether the module multiplies in fp32, as on CPUs that are slow in bf16 (`run/cpu_bf16.py`)."""
        return self.before is not None


class FrozenProduct(torch.autograd.Function):
    """The product with a quantized matrix, which is dequantized for each of the two passes; it has no gradient itself.

    A bias has one: with --lisa_unit module it trains as part of `rest` where its matrix is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
        linear: LinearForward,
        transposed: bool,
    ) -> Any:
        """Inputs of any number of dimensions, the last of which the matrix is applied to."""
        ctx.linear, ctx.transposed = linear, transposed
        if linear.in_fp32:
            shift = None if bias is None else bias.float()
            return functional.linear(inputs.float(), weight.float(), shift).to(inputs.dtype)
        if not transposed:
            return functional.linear(inputs, weight, bias)
        assert bias is not None  # which GPT-2's always has
        return torch.addmm(bias, inputs.reshape(-1, inputs.shape[-1]), weight).view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        weight, (gradient,) = ctx.linear.whole(), gradients
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if ctx.linear.in_fp32:
            return (gradient.float() @ weight.float()).to(gradient.dtype), of_bias, None, None, None
        return gradient @ (weight.t() if ctx.transposed else weight), of_bias, None, None, None


class _View(NamedTuple):
    """What autograd keeps in the place of a view of a whole tensor."""

    attribute: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class WholeForward(FrozenForward):
    """A module's own forward, which finds whole tensors in the place of its weights."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._check_frozen()
        module, whole = self.module, {name: self.tensors.get(self, name) for name in self.weights}
        empty = {name: module._parameters[name] for name in whole}
        # By numbers: what is packed keeps the function that has packed it.
        places = [(one.untyped_storage()._cdata, one.storage_offset(), name) for name, one in whole.items()]
        ends = [one.storage_offset() + one.numel() for one in whole.values()]
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)  # of a checkpointed layer

        def pack(tensor: torch.Tensor) -> Any:
            key, begin = tensor.untyped_storage()._cdata, tensor.storage_offset()
            for (storage, first, name), end in zip(places, ends, strict=True):
                if storage == key and first <= begin < end:
                    return _View(name, tuple(tensor.shape), tensor.stride(), int(begin - first))
            # Without its graph, which would keep the node that keeps it; autograd knows that by itself.
            return tensor.detach() if outer is None else outer[0](tensor)

        run: Callable[..., Any] = self.before or type(module).forward.__get__(module)
        module._parameters.update(whole)
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack_beside(outer)):
                return run(*arguments, **options)
        finally:
            module._parameters.update(empty)
            if not is_in_backward():  # where a layer's forward runs again, its backward is next
                self.tensors.clear()

    def _unpack_beside(self, outer: Any) -> Callable[[Any], torch.Tensor]:
        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, _View):
                one = self.tensors.get(self, packed.attribute)
                return one.as_strided(packed.size, packed.stride, one.storage_offset() + packed.offset)
            tensor: torch.Tensor = packed if outer is None else outer[1](packed)
            return tensor

        return unpack
