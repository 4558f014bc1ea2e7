"""Frozen decoder layers in 8 or 4 bits (`--lisa_frozen_bits`): what a switch freezes is quantized.

A frozen layer's matrices are codes on the device; its norms and biases stay as they are. The 16-bit original of every
matrix that may be frozen is in a `WeightStore`, once a host, and is copied in when the layer becomes active. A pass
dequantizes one matrix at a time. So of L layers of which gamma train a device has, in bytes an element:

    gamma x 2 + (L - gamma) x 1.02 (8 bits) or 0.52 (4 bits), and the largest matrix once more

Codes are bitsandbytes': 8 bits in blocks of 256, or NF4 in blocks of 64 whose scales are in 8 bits. Source: Dettmers et
al., "QLoRA" (NeurIPS 2023), sections 2 and 3. A layer that was frozen all along has the weights that it was loaded
with, bit for bit: it is never quantized twice, but from its original.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lisa_dist.config import LisaConfig
from lisa_dist.core.blocks import Blocks, linear_modules
from lisa_dist.core.weight_store import WeightStore
from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import UserError
from lisa_dist.patches import patch
from lisa_dist.text import format_bytes, in_one_line
from lisa_dist.zero.parameters import set_original

BLOCKSIZES = {8: 256, 4: 64}  # elements that share a scale
_SCALES_BLOCKSIZE = 256  # scales of 4 bits that share one of their own


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    """The 256 values of bitsandbytes' 8-bit codes; with its import its operators are there."""
    from bitsandbytes.functional import create_dynamic_map

    table: torch.Tensor = create_dynamic_map().to(device)
    return table


def quantize(value: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Codes and scales of a matrix, as bitsandbytes' `quantize_blockwise` and `quantize_4bit` make them.

    By its operators: those functions make a table for each matrix, whose copy to the device the host waits for.
    """
    table, operators = _table(value.device), torch.ops.bitsandbytes
    if bits == 8:
        made: tuple[torch.Tensor, ...] = operators.quantize_blockwise(value, table, BLOCKSIZES[8])
        return made
    codes, scales = operators.quantize_4bit(value, BLOCKSIZES[4], "nf4", torch.uint8)
    mean = scales.mean()
    return codes, *operators.quantize_blockwise(scales - mean, table, _SCALES_BLOCKSIZE), mean


def dequantize(codes: tuple[torch.Tensor, ...], bits: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The matrix that codes and scales stand for."""
    table, operators = _table(codes[0].device), torch.ops.bitsandbytes
    decode: Callable[..., torch.Tensor] = operators.dequantize_blockwise.default
    if bits == 8:
        return decode(*codes, table, BLOCKSIZES[8], dtype)
    codes_4, codes_of_scales, scales_of_scales, mean = codes
    scales = decode(codes_of_scales, scales_of_scales, table, _SCALES_BLOCKSIZE, torch.float32)
    scales += mean
    decode_4: Callable[..., torch.Tensor] = operators.dequantize_4bit.default
    return decode_4(codes_4, scales, BLOCKSIZES[4], "nf4", shape, dtype)


class QuantizedLinear:
    """A matrix of a frozen layer: its codes on the device, its original on the host."""

    def __init__(self, module: Any, name: str, layers: "FrozenLayers"):
        self._module = module
        self._name, self._layers = name, layers
        self._codes: tuple[torch.Tensor, ...] = ()  # with their scales
        self._forward_before: Any = None

    @property
    def original(self) -> torch.Tensor:
        """On the host, in 16 bits."""
        return self._layers.store[self._name]

    def quantize(self) -> None:
        """Keep codes of the weights, which are or were the original, in their place."""
        parameter = self._module.weight
        value = parameter.detach().to(self._layers.device)
        self._codes = quantize(value, self._layers.bits)
        parameter.data = torch.empty(0, dtype=value.dtype, device=value.device)
        set_original(parameter, self)
        self._forward_before = vars(self._module).get("forward")
        patch(self._module, "forward", types.MethodType(quantized_forward, self._module), of="quantized_linear")
        self._module.lisa_quantized = self

    def release(self) -> None:
        """Let the module have its weights again, copied from the original; a GPU's copy is not waited for."""
        self._codes = ()
        parameter, original = self._module.weight, self.original
        set_original(parameter, None)
        parameter.data = torch.empty_like(original, device=self._layers.device).copy_(original, non_blocking=True)
        del self._module.forward, self._module.lisa_quantized
        if self._forward_before is not None:
            patch(self._module, "forward", self._forward_before, of="quantized_linear")

    def load(self, value: torch.Tensor) -> None:
        """Another original: a saved model's, which every rank reads for itself."""
        value = value.to(self.original.dtype)
        self._layers.store.write(self._name, value)
        self._codes = quantize(value.to(self._layers.device), self._layers.bits)

    def dequantized(self) -> torch.Tensor:
        """The matrix to compute with, in 16 bits on the device."""
        if self._layers.is_exact:
            return self.original.to(self._layers.device, non_blocking=True)
        original = self.original
        return dequantize(self._codes, self._layers.bits, original.shape, original.dtype)

    @property
    def in_fp32(self) -> bool:
        """Whether the module multiplies in fp32, as on CPUs that are slow in bf16 (`run/cpu_bf16.py`)."""
        return self._forward_before is not None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the device holds of it."""
        return list(self._codes)


class QuantizedProduct(torch.autograd.Function):
    """The product with a quantized matrix, which is dequantized for each of the two passes; it has no gradient itself.

    A bias has one: with --lisa_unit module it trains as part of `rest` where its matrix is frozen.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, bias: torch.Tensor | None, matrix: Any, transposed: bool) -> Any:
        """Inputs of any number of dimensions, the last of which `matrix.dequantized()` is applied to."""
        ctx.matrix, ctx.transposed = matrix, transposed
        weight = matrix.dequantized()
        if matrix.in_fp32:
            shift = None if bias is None else bias.float()
            return functional.linear(inputs.float(), weight.float(), shift).to(inputs.dtype)
        if not transposed:
            return functional.linear(inputs, weight, bias)
        assert bias is not None  # which GPT-2's always has
        return torch.addmm(bias, inputs.reshape(-1, inputs.shape[-1]), weight).view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        weight, (gradient,) = ctx.matrix.dequantized(), gradients
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if ctx.matrix.in_fp32:
            return (gradient.float() @ weight.float()).to(gradient.dtype), of_bias, None, None
        return gradient @ (weight.t() if ctx.transposed else weight), of_bias, None, None


def quantized_forward(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """In the place of the `forward` of a linear module, or of GPT-2's, which has its matrix transposed."""
    if module.weight.requires_grad and module.weight.numel() == 0:
        raise RuntimeError("this model's frozen layers are quantized by a LISA run: load it anew to train it.")
    product: torch.Tensor = QuantizedProduct.apply(
        inputs, module.bias, module.lisa_quantized, isinstance(module, Conv1D)
    )
    return product


class FrozenLayers:
    """The decoder layers of a model, in `bits` while inactive, with originals in `place`: "host" or a folder."""

    def __init__(self, model: nn.Module, blocks: Blocks, bits: int, place: str, device: torch.device):
        linear = linear_modules(model, blocks.layers)
        self._check(model, [module for layer in linear for module in layer.values()], bits, device)
        self._layers = [  # the gate of a mixture's experts may be in fp32, and stays as it is
            {name: module for name, module in layer.items() if module.weight.element_size() == 2} for layer in linear
        ]
        modules = {name: module for layer in self._layers for name, module in layer.items()}
        weights = {name: module.weight.detach() for name, module in modules.items()}
        of_layers = (parameter.nbytes for block in blocks.layers for parameter in block.parameters.values())
        self._share = sum(weight.nbytes for weight in weights.values()) / sum(of_layers)
        on_host = sum(weight.nbytes for weight in weights.values() if weight.device.type == "cpu")
        self.store = WeightStore(weights, place, device, freed=on_host)
        self.bits, self.device = bits, device
        self.is_exact = False  # whether originals are computed with
        self._quantized = {name: QuantizedLinear(module, name, self) for name, module in modules.items()}
        self._frozen: set[int] = set()
        model.register_state_dict_post_hook(functools.partial(self._put_originals))  # torch sets an attribute

    def describe(self) -> str:
        """What is quantized and where its originals are, for a header; a warning where that is less than half."""
        text = f"{self._share:.0%} of their bytes in {self.bits} bits; originals, once a host: "
        text += format_bytes(self.store.nbytes)
        if self._share < 0.5:
            text += "; warning: the rest stays in 16 bits, such as the experts of a mixture that are one tensor"
        return text

    @staticmethod
    def _check(model: nn.Module, modules: Sequence[Any], bits: int, device: torch.device) -> None:
        flag = f"--lisa_frozen_bits {bits}"
        if not modules:
            raise UserError(
                f"{flag}: the decoder layers of {type(model).__name__} have no linear weights that could be "
                "quantized; leave it out."
            )
        if all(module.weight.element_size() != 2 for module in modules):
            dtype = str(modules[0].weight.dtype).removeprefix("torch.")
            raise UserError(
                f"{flag}: the decoder layers are in {dtype}: what is frozen is 16 bits wide; give --bf16 true."
            )
        try:
            probe = torch.ones(BLOCKSIZES[bits], 2, dtype=torch.bfloat16, device=device)
            dequantize(quantize(probe, bits), bits, probe.shape, probe.dtype)
        except (ImportError, OSError, RuntimeError) as error:  # absent, cannot be loaded, has no kernel here
            raise UserError(
                f"{flag}: bitsandbytes cannot quantize on {device.type} here ({in_one_line(error)}); "
                "pip install -U bitsandbytes, or leave the flag out."
            ) from error

    def _put_originals(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        """Whoever saves the model by its state dict has the originals."""
        for number in self._frozen:
            for name in self._layers[number]:
                state[prefix + name] = self._quantized[name].original

    def begin(self, active: Iterable[int]) -> None:
        """Take rank 0's weights into the store, and quantize the inactive layers, one after the other.

        DeepSpeed sends rank 0's weights to all when an engine is built, but finds none where they are quantized.
        """
        active, several = set(active), dist.is_initialized() and dist.get_world_size() > 1
        for number, layer in enumerate(self._layers):
            for name, module in layer.items():
                if several:
                    value = module.weight.detach().to(self.device, copy=True)
                    dist.broadcast(value, src=0)
                    module.weight.data = value
                self.store.write(name, module.weight.detach())
                if number not in active:
                    self._quantized[name].quantize()
        self._frozen = set(range(len(self._layers))) - active
        gather(None)  # the host's first rank has written what the others will read
        self.store.pin()

    def switch(self, active: Iterable[int]) -> None:
        """Quantize layers that become inactive, whose originals are what training has made of them; release others."""
        inactive = set(range(len(self._layers))) - set(active)
        for number in sorted(inactive - self._frozen):
            for name, module in self._layers[number].items():
                self.store.write(name, module.weight.detach())
                self._quantized[name].quantize()
        for number in sorted(self._frozen - inactive):
            for name in self._layers[number]:
                self._quantized[name].release()
        self._frozen = inactive

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """While this lasts, forward passes compute with originals, copied in one matrix at a time."""
        self.is_exact = True
        try:
            yield
        finally:
            self.is_exact = False

    @property
    def quantized(self) -> Sequence[QuantizedLinear]:
        """The matrices that the device holds as codes now."""
        return [self._quantized[name] for number in sorted(self._frozen) for name in self._layers[number]]


def quantize_frozen_layers(
    model: nn.Module, blocks: Blocks, config: LisaConfig, active: Iterable[int]
) -> FrozenLayers | None:
    """Quantize the layers of a model that are not active in the bits of `config`; None for 16, in which they stay."""
    if config.lisa_frozen_bits == 16:
        return None
    device = torch.device(get_accelerator().current_device_name())
    frozen = FrozenLayers(model, blocks, config.lisa_frozen_bits, config.lisa_frozen_store, device)
    frozen.begin(active)
    return frozen


def quantized_bytes(numels: Iterable[int], bits: int) -> int:
    """Bytes on the device of the codes of matrices of so many elements, with their scales."""
    total = 0
    for numel in numels:
        scales = -(-numel // BLOCKSIZES[bits])
        if bits == 8:  # scales in fp32
            total += numel + 4 * scales
        else:  # scales in 8 bits, with scales of their own and a mean
            total += -(-numel // 2) + scales + 4 * -(-scales // _SCALES_BLOCKSIZE) + 4
    return total
