"""Frozen decoder layers in 8 or 4 bits (`--lisa_frozen_bits`): what a switch freezes is quantized.

A frozen layer's matrices, and the experts of a mixture, are codes on the device; its norms, biases and gates stay as
they are. The 16-bit original of all that may be frozen is in a `WeightStore`, once a host, and is copied in when the
layer becomes active. A pass dequantizes the weights of one module at a time. So of L layers of which gamma train a
device has, in bytes an element:

    gamma x 2 + (L - gamma) x 1.02 (8 bits) or 0.52 (4 bits), and the weights of the largest module once more

A layer that was frozen all along has the weights that it was loaded with, bit for bit: it is never quantized twice, but
from its original.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist
from torch import nn

from lisa_dist.config import LisaConfig
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.frozen_forms import check_form, dequantize, quantize
from lisa_dist.core.frozen_forward import WholeTensors, frozen_forward
from lisa_dist.core.matrices import Matrix, quantizable_matrices
from lisa_dist.core.weight_store import WeightStore
from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import UserError
from lisa_dist.text import format_bytes
from lisa_dist.zero.parameters import set_original


class FrozenWeight:
    """A matrix of a frozen layer, or its experts: codes on the device, the original on the host."""

    def __init__(self, matrix: Matrix, name: str, layers: "FrozenLayers"):
        self._matrix, self._name, self._layers = matrix, name, layers
        self._codes: tuple[torch.Tensor, ...] = ()  # with their scales

    @property
    def original(self) -> torch.Tensor:
        """On the host, in 16 bits."""
        return self._layers.store[self._name]

    def quantize(self) -> None:
        """Keep codes of the weights, which are or were the original, in their place."""
        parameter = self._matrix.parameter
        value = parameter.detach().to(self._layers.device)
        self._codes = quantize(value, self._layers.bits)
        parameter.data = torch.empty(0, dtype=value.dtype, device=value.device)
        set_original(parameter, self)
        frozen_forward(self._matrix, self._layers.whole_tensors).weights[self._matrix.attribute] = self

    def release(self) -> None:
        """Let the module have its weights again, copied from the original; a GPU's copy is not waited for."""
        self._codes = ()
        parameter, original = self._matrix.parameter, self.original
        set_original(parameter, None)
        parameter.data = torch.empty_like(original, device=self._layers.device).copy_(original, non_blocking=True)
        forward = frozen_forward(self._matrix, self._layers.whole_tensors)
        del forward.weights[self._matrix.attribute]
        if not forward.weights:
            forward.remove()

    def load(self, value: torch.Tensor) -> None:
        """Another original: a saved model's, which every rank reads for itself."""
        value = value.to(self.original.dtype)
        self._layers.store.write(self._name, value)
        self._codes = quantize(value.to(self._layers.device), self._layers.bits)

    def whole(self) -> torch.Tensor:
        """The weights to compute with, in 16 bits on the device."""
        original = self.original
        if self._layers.is_exact:
            return original.to(self._layers.device, non_blocking=True)
        return dequantize(self._codes, self._layers.bits, original.shape, original.dtype)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the device holds of it."""
        return list(self._codes)


class FrozenLayers:
    """The decoder layers of a model, in `bits` while inactive, with originals in `place`: "host" or a folder."""

    def __init__(self, model: nn.Module, blocks: Blocks, bits: int, place: str, device: torch.device):
        found = quantizable_matrices(model, [layer.parameters for layer in blocks.layers])
        self._check(model, [matrix for layer in found for matrix in layer.values()], bits, device)
        self._layers = [  # the gate of a mixture's experts may be in fp32, and stays as it is
            {name: one for name, one in layer.items() if one.parameter.element_size() == 2} for layer in found
        ]
        matrices = {name: matrix for layer in self._layers for name, matrix in layer.items()}
        weights = {name: matrix.parameter.detach() for name, matrix in matrices.items()}
        of_layers = (parameter.nbytes for block in blocks.layers for parameter in block.parameters.values())
        self._share = sum(weight.nbytes for weight in weights.values()) / sum(of_layers)
        on_host = sum(weight.nbytes for weight in weights.values() if weight.device.type == "cpu")
        self.store = WeightStore(weights, place, device, freed=on_host)
        self.bits, self.device = bits, device
        self.is_exact = False  # whether originals are computed with
        self.whole_tensors = WholeTensors()
        self._quantized = {name: FrozenWeight(matrix, name, self) for name, matrix in matrices.items()}
        self._frozen: set[int] = set()
        model.register_state_dict_post_hook(functools.partial(self._put_originals))  # torch sets an attribute

    def describe(self) -> str:
        """What is quantized and where its originals are, for a header; a warning where that is less than half."""
        text = f"{self._share:.0%} of their bytes in {self.bits} bits; originals, once a host: "
        text += format_bytes(self.store.nbytes)
        if self._share < 0.5:
            text += "; warning: the rest, which other code reads than its own module's, stays in 16 bits"
        return text

    @staticmethod
    def _check(model: nn.Module, matrices: Sequence[Matrix], bits: int, device: torch.device) -> None:
        flag = f"--lisa_frozen_bits {bits}"
        if not matrices:
            raise UserError(
                f"{flag}: the decoder layers of {type(model).__name__} have no weights that could be "
                "quantized; leave it out."
            )
        if all(matrix.parameter.element_size() != 2 for matrix in matrices):
            dtype = str(matrices[0].parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"{flag}: the decoder layers are in {dtype}: what is frozen is 16 bits wide; give --bf16 true."
            )
        check_form(bits, device)

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
            for name, matrix in layer.items():
                if several:
                    value = matrix.parameter.detach().to(self.device, copy=True)
                    dist.broadcast(value, src=0)
                    matrix.parameter.data = value
                self.store.write(name, matrix.parameter.detach())
                if number not in active:
                    self._quantized[name].quantize()
        self._frozen = set(range(len(self._layers))) - active
        gather(None)  # the host's first rank has written what the others will read
        self.store.pin()

    def switch(self, active: Iterable[int]) -> None:
        """Quantize layers that become inactive, whose originals are what training has made of them; release others."""
        inactive = set(range(len(self._layers))) - set(active)
        for number in sorted(inactive - self._frozen):
            for name, matrix in self._layers[number].items():
                self.store.write(name, matrix.parameter.detach())
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
    def quantized(self) -> Sequence[FrozenWeight]:
        """The weights that the device holds as codes now."""
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
