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
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist
from torch import nn

from lisa_dist.config import LisaConfig
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.frozen_forms import check_form, dequantize, quantize
from lisa_dist.core.frozen_forward import WholeTensors, frozen_forward
from lisa_dist.core.layer_stream import LayerStream
from lisa_dist.core.matrices import Matrix, quantizable_matrices
from lisa_dist.core.weight_store import HOST, WeightStore
from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import UserError
from lisa_dist.text import format_bytes
from lisa_dist.zero.parameters import set_original


class FrozenWeight:
    """A matrix of a frozen layer, or its experts: codes on the device or the host, the original on the host."""

    def __init__(self, matrix: Matrix, name: str, layer: int, layers: "FrozenLayers"):
        self._matrix, self._name, self._layer, self._layers = matrix, name, layer, layers
        self._codes: tuple[torch.Tensor, ...] = ()  # with their scales, of those on the device

    @property
    def original(self) -> torch.Tensor:
        """On the host, in 16 bits."""
        return self._layers.store[self._name]

    def quantize(self) -> None:
        """Keep codes of the weights, which are or were the original, in their place."""
        parameter = self._matrix.parameter
        value = parameter.detach().to(self._layers.device)
        self._encode(value)
        parameter.data = torch.empty(0, dtype=value.dtype, device=value.device)
        set_original(parameter, self)
        frozen_forward(self._matrix, self._layers.whole_tensors).weights[self._matrix.attribute] = self

    def _encode(self, value: torch.Tensor) -> None:
        layers = self._layers
        if layers.stream is None:
            self._codes = quantize(value, layers.bits)
        elif layers.bits != 16:
            for place, code in enumerate(quantize(value, layers.bits)):
                layers.codes.write((self._name, place), code)

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
        self._encode(value.to(self._layers.device))
        self._layers.restart()

    def whole(self) -> torch.Tensor:
        """The weights to compute with, in 16 bits on the device."""
        layers, original = self._layers, self.original
        if layers.is_exact and layers.bits != 16:
            return original.to(layers.device, non_blocking=True)
        codes = self._codes
        if layers.stream is not None:
            codes = tuple(layers.stream.tensor(self._layer, key) for key in layers.code_names[self._name])
        return dequantize(codes, layers.bits, original.shape, original.dtype)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the device holds of it: codes, or the buffers that it is copied to with its layer."""
        stream = self._layers.stream
        return list(self._codes) if stream is None else stream.buffers


class FrozenLayers:
    """The decoder layers of a model, in `bits` while inactive, with originals in `place`: "host" or a folder.

    `streams`: the device has two of the inactive layers at a time, and copies them from the host (`layer_stream.py`).
    """

    def __init__(
        self, model: nn.Module, blocks: Blocks, bits: int, place: str, device: torch.device, streams: bool = False
    ):
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
        layer_of = {name: int(name.removeprefix(f"{blocks.layers_path}.").partition(".")[0]) for name in matrices}
        self._quantized = {name: FrozenWeight(matrix, name, layer_of[name], self) for name, matrix in matrices.items()}
        self.stream: LayerStream | None = None
        if streams:
            self._begin_stream(layer_of)
        self._frozen: set[int] = set()
        model.register_state_dict_post_hook(functools.partial(self._put_originals))  # torch sets an attribute

    def describe(self) -> str:
        """What is quantized and where its originals are, for a header; a warning where that is less than half."""
        text = f"{self._share:.0%} of their bytes in {self.bits} bits; originals, once a host: "
        text += format_bytes(self.store.nbytes)
        if self.stream is not None:
            text += f", from where two layers at a time are copied ({format_bytes(self.codes.nbytes)} there)"
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

    def _begin_stream(self, layer_of: Mapping[str, int]) -> None:
        """Make the store that layers are copied from: of codes, or in 16 bits that of the originals."""
        self.codes, self.code_names = self.store, {name: [name] for name in layer_of}
        if self.bits != 16:
            like = {name: self.store[name].to("meta") for name in layer_of}
            codes = {name: quantize(value, self.bits) for name, value in like.items()}
            self.code_names = {name: [(name, place) for place in range(len(made))] for name, made in codes.items()}
            flat = {(name, place): code for name, made in codes.items() for place, code in enumerate(made)}
            self.codes = WeightStore(flat, HOST, self.device)
        of_layers: dict[int, list[Hashable]] = {}
        for name, layer in layer_of.items():
            of_layers.setdefault(layer, []).extend(self.code_names[name])
        self.stream = LayerStream(self.codes, of_layers, self.device)
        self._layer_of = layer_of

    def restart(self) -> None:
        """Forget what a stream has of layers; what this rank has written is there at the next collective."""
        if self.stream is not None:
            get_accelerator().synchronize()
            self.stream.choose({self._layer_of[name] for number in self._frozen for name in self._layers[number]})

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
        if self.stream is not None and self.bits != 16:
            self.codes.pin()
        self.restart()

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
        self.restart()

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
    """Quantize or stream the layers of a model that are not active; None where `config` has them stay as they are."""
    if config.lisa_frozen_bits == 16 and not config.streams:
        return None
    device = torch.device(get_accelerator().current_device_name())
    frozen = FrozenLayers(model, blocks, config.lisa_frozen_bits, config.lisa_frozen_store, device, config.streams)
    frozen.begin(active)
    return frozen
