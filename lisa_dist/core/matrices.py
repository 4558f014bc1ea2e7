"""The weights of decoder layers that products are made with: the matrices of linear modules, and experts of a mixture.

Those can be frozen in fewer bits, and with --lisa_unit module each is sampled by itself. The gate that chooses experts
is none of them, nor are their biases.
"""

import dis
import functools
import inspect
import types
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lisa_dist.zero.parameters import parameter_shape


class Matrix(NamedTuple):
    """A weight, as `module.attribute`: of a linear module two-dimensional, of experts three, one matrix an expert."""

    module: Any
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself, which is empty while it is quantized."""
        parameter: nn.Parameter = self.module._parameters[self.attribute]
        return parameter

    @property
    def is_linear(self) -> bool:
        """Whether it is of a linear module."""
        return isinstance(self.module, nn.Linear | Conv1D)


def matrices_of(model: nn.Module) -> dict[int, Matrix]:
    """All of a model, by the id of the parameter."""
    found = {}
    for module in model.modules():
        own = not type(module).__module__.startswith("torch.nn.")  # a convolution has three dimensions too
        for attribute, parameter in module._parameters.items():
            is_linear = attribute == "weight" and isinstance(module, nn.Linear | Conv1D)
            if parameter is not None and (is_linear or (own and _is_of_experts(parameter))):
                found[id(parameter)] = Matrix(module, attribute)
    return found


def _is_of_experts(parameter: nn.Parameter) -> bool:
    shape = parameter_shape(parameter)
    return len(shape) == 3 and min(shape[1:]) > 1  # [1, 1, width] is a factor of each element


def quantizable_matrices(model: nn.Module, layers: Iterable[Mapping[str, nn.Parameter]]) -> list[dict[str, Matrix]]:
    """Those of each of the layers, given by their parameters, that can be in fewer bits, by name.

    Without those that are read elsewhere than in their own module's forward: a matrix of two modules, or one that a
    module around them multiplies with itself, or hands to a fused kernel.
    """
    found = {key: matrix for key, matrix in matrices_of(model).items() if not matrix.is_linear or _is_product(matrix)}
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    elsewhere = {parameter for parameter, count in places.items() if count > 1}
    for module in model.modules():
        kind: Any = type(module)  # which mypy takes for unhashable
        if not isinstance(module, PreTrainedModel) and (names := _weights_read(kind)):
            for name, inner in module.named_modules():
                owner = name.rpartition(".")[2]
                elsewhere |= {id(one) for key, one in inner._parameters.items() if (owner, key) in names}
    return [
        {name: found[id(value)] for name, value in layer.items() if id(value) in found.keys() - elsewhere}
        for layer in layers
    ]


def _is_product(matrix: Matrix) -> bool:
    """Whether a linear module is a product with its matrix and no more, as its class has it or in fp32."""
    kind, own = type(matrix.module), vars(matrix.module).get("forward")
    is_product = kind is Conv1D or kind.forward is nn.Linear.forward
    is_product = is_product or kind.__name__ == "FalconLinear"  # writes the product out
    return is_product and (own is None or getattr(own, "multiplies_in_fp32", False))


@functools.cache
def _weights_read(kind: type) -> frozenset[tuple[str, str]]:
    """Inner modules and their weights that the methods of a class read, such as `self.dt_proj.weight @ hidden`.

    By their code, since a pass on the CPU does not take what a fused kernel does on a GPU. Its dtype and device, which
    a quantized matrix has too, may be read.
    """
    own = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    methods = [value for base in own for value in vars(base).values() if inspect.isfunction(value)]
    codes, read = [inspect.unwrap(method).__code__ for method in methods], set()
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        steps = list(dis.get_instructions(code))
        for owner, weight, use in zip(steps, steps[1:], steps[2:], strict=False):
            if owner.opname == weight.opname == "LOAD_ATTR" and use.argval not in ("dtype", "device"):
                read.add((owner.argval, weight.argval))
    return frozenset(read)
