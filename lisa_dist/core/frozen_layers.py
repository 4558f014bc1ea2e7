"""Frozen decoder layers in fewer bits (`--lisa_frozen_bits`), or on the host (`--lisa_offload frozen`).

A frozen layer's matrices, and the experts of a mixture, are codes on the device, or come from the host as a pass needs
them (`layer_stream.py`); its norms, biases and gates stay as they are. The 16-bit original of all that may be frozen is
in a `WeightStore`, once a host, and is copied in when the layer becomes active. A pass dequantizes the weights of one
module at a time. So of L layers of which gamma train a device has, in bytes an element:

    gamma x 2 + (L - gamma) x 1.02 (8 bits) or 0.52 (4 bits), and the weights of the largest module once more

A layer that was frozen all along has the weights that it was loaded with, bit for bit: it is never quantized twice, but
from its original.
"""

import contextlib
import functools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist
from torch import nn

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import Form
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.fp8_product import takes_fp8
from lisa_dist.core.frozen_forms import check_form, dequantize, quantize, quantized_bytes
from lisa_dist.core.frozen_forward import WholeTensors, frozen_forward
from lisa_dist.core.layer_stream import LayerStream
from lisa_dist.core.live_bytes import unmapped_bytes
from lisa_dist.core.matrices import Matrix, quantizable_matrices
from lisa_dist.core.weight_store import HOST, ROOM, WeightStore
from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import UserError
from lisa_dist.optim.ops import has_fp8
from lisa_dist.text import format_bytes
from lisa_dist.zero.parameters import naming_of, set_original

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")  # of experts, which read them as their module's weights


class FrozenWeight:
    """A matrix of a frozen layer, or its experts: codes on the device or the host, the original on the host."""

    def __init__(self, matrix: Matrix, name: str, layers: "FrozenLayers"):
        self._matrix, self._name, self._layers = matrix, name, layers
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
            self._codes = quantize(value, layers.form)
        elif layers.form != 16:
            for place, code in enumerate(quantize(value, layers.form)):
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
        """Replace the original by a saved model's weights; all ranks call it with the same value."""
        value = value.to(self.original.dtype)
        self._layers.store.write(self._name, value)
        self._encode(value.to(self._layers.device))
        self._layers.restart()

    def whole(self) -> torch.Tensor:
        """The weights to compute with, in 16 bits on the device."""
        layers, original = self._layers, self.original
        if layers.is_exact and layers.form != 16:
            return original.to(layers.device, non_blocking=True)
        return dequantize(self._encoded(), layers.form, original.shape, original.dtype)

    def _encoded(self) -> tuple[torch.Tensor, ...]:
        """Codes and scales on the device."""
        layers, stream = self._layers, self._layers.stream
        if stream is None:
            return self._codes
        return tuple(stream.tensor(layers.layer_of[self._name], code) for code in layers.code_names[self._name])

    def fp8(self) -> tuple[torch.Tensor, ...]:
        """Codes and scales to multiply with; nothing where products are made in 16 bits."""
        is_fp8 = self._layers.multiplies_fp8 and not self._layers.is_exact
        return self._encoded() if is_fp8 and takes_fp8(self.original.shape) else ()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the device holds of it: codes, or the buffers that it is copied to with its layer."""
        stream = self._layers.stream
        return list(self._codes) if stream is None else stream.buffers


class FrozenLayers:
    """The decoder layers of a model, in `form` while inactive, with originals in `place`: "host" or a folder.

    `streams`: the device has two of the inactive layers at a time, and copies them from the host (`layer_stream.py`).
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        form: Form,
        place: str,
        device: torch.device,
        streams: bool = False,
        has_weights: bool = True,
    ):
        found = quantizable_matrices(model, [layer.parameters for layer in blocks.layers])
        self._check(model, [matrix for layer in found for matrix in layer.values()], form, device)
        if getattr(model, "use_kernels", False):
            # transformers loads models with kernels of the hub by default. These kernels replace the forward pass of
            # whole modules and read the weights by themselves, past the codes.
            cast(Any, model).set_use_kernels(False)
        self._layers = [  # the gate of a mixture's experts may be in fp32, and stays as it is
            {name: one for name, one in layer.items() if one.parameter.element_size() == 2} for layer in found
        ]
        matrices = {name: matrix for layer in self._layers for name, matrix in layer.items()}
        weights = {name: matrix.parameter.detach() for name, matrix in matrices.items()}
        of_layers = (parameter.nbytes for block in blocks.layers for parameter in block.parameters.values())
        self._share = sum(weight.nbytes for weight in weights.values()) / sum(of_layers)
        on_host = unmapped_bytes(weight for weight in weights.values() if weight.device.type == "cpu" and has_weights)
        way_out = ROOM
        if streams and form == 16:  # which are copied from the host's memory alone
            codes = format_bytes(quantized_bytes([weight.shape for weight in weights.values()], 4))
            way_out = f"give --lisa_frozen_bits 4, which takes {codes}, and a folder for the originals"
        self.store = WeightStore(weights, place, device, freed=on_host, way_out=way_out)
        self._freed = on_host - (self.store.nbytes if place == HOST and self.store.is_first_of_host else 0)
        self.form, self.device = form, device
        self.multiplies_fp8 = form == "fp8" and has_fp8(device)
        self.is_exact = False  # whether originals are computed with
        self.whole_tensors = WholeTensors()
        self._quantized = {name: FrozenWeight(matrix, name, self) for name, matrix in matrices.items()}
        self.stream: LayerStream | None = None
        if streams:
            self._begin_stream(f"{blocks.layers_path}.")
        self._frozen: set[int] = set()
        model.register_state_dict_post_hook(functools.partial(self._put_originals))  # torch sets an attribute

    def describe(self) -> str:
        """What is quantized and where its originals are, for a header; a warning where that is less than half."""
        name = f"{self.form} bits"
        if self.form == "fp8":
            name = "fp8" if self.multiplies_fp8 else "fp8, multiplied in 16 bits, which this device has no units for"
        text = f"{self._share:.0%} of their bytes in {name}; originals, once a host: "
        text += format_bytes(self.store.nbytes)
        if self.stream is not None:
            text += f", from where two layers at a time are copied ({format_bytes(self.codes.nbytes)} there)"
        if self._share < 0.5:
            text += "; warning: the rest, which other code reads than its own module's, stays in 16 bits"
        return text

    @staticmethod
    def _check(model: nn.Module, matrices: Sequence[Matrix], form: Form, device: torch.device) -> None:
        flag = "--lisa_offload frozen" if form == 16 else f"--lisa_frozen_bits {form}"
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
        if not all(matrix.is_linear for matrix in matrices):
            check_experts(getattr(getattr(model, "config", None), "_experts_implementation", None), flag)
        check_form(form, [matrix.parameter.numel() for matrix in matrices], device)

    def _begin_stream(self, path: str) -> None:
        """Make the store that layers are copied from: of codes, or in 16 bits that of the originals."""
        self.layer_of = layer_of = {name: int(name.removeprefix(path).partition(".")[0]) for name in self._quantized}
        self.codes = self.store
        self.code_names: dict[str, list[Hashable]] = {name: [name] for name in layer_of}
        if self.form != 16:
            like = {name: self.store[name].to("meta") for name in layer_of}
            codes = {name: quantize(value, self.form) for name, value in like.items()}
            self.code_names = {name: [(name, place) for place in range(len(made))] for name, made in codes.items()}
            flat = {(name, place): code for name, made in codes.items() for place, code in enumerate(made)}
            fewer = format_bytes(quantized_bytes([value.shape for value in like.values()], 4))
            way_out = f"give --lisa_frozen_bits 4, which takes {fewer}, or leave --lisa_offload frozen out"
            self.codes = WeightStore(flat, HOST, self.device, self._freed, way_out)
        of_layers: dict[int, list[Hashable]] = {}
        for name, layer in layer_of.items():
            of_layers.setdefault(layer, []).extend(self.code_names[name])
        self.stream = LayerStream(self.codes, of_layers, self.device)

    def restart(self) -> None:
        """Forget what a stream has of layers; what this rank has written is there at the next collective."""
        if self.stream is not None:
            get_accelerator().synchronize()
            self.stream.choose({self.layer_of[name] for number in self._frozen for name in self._layers[number]})

    def _put_originals(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        """Whoever saves the model by its state dict has the originals."""
        called = naming_of(module)
        keys = {called(key.removeprefix(prefix)): key for key in state}
        for number in self._frozen:
            for name in self._layers[number]:
                state[keys[name]] = self._quantized[name].original

    def begin(self, active: Iterable[int]) -> None:
        """Take rank 0's weights into the store, and quantize the inactive layers, one after the other.

        DeepSpeed sends rank 0's weights to all when an engine is built, but finds none where they are quantized.
        """
        active, several = set(active), dist.is_initialized() and dist.get_world_size() > 1
        for number, layer in enumerate(self._layers):
            for name, matrix in layer.items():
                if several:
                    weight = matrix.parameter.detach()
                    value = torch.empty_like(weight, device=self.device)
                    if dist.get_rank() == 0:  # another's may be no weights at all
                        value.copy_(weight)
                    dist.broadcast(value, src=0)
                    matrix.parameter.data = value
                self.store.write(name, matrix.parameter.detach())
                if number not in active:
                    self._quantized[name].quantize()
        self._frozen = set(range(len(self._layers))) - active
        gather(None)  # the host's first rank has written what the others will read
        self.store.pin()
        if self.stream is not None and self.form != 16:
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


def check_experts(implementation: str | None, flag: str) -> None:
    """Raise UserError for experts that are computed by a kernel which may read weights past their module."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise UserError(
            f"{flag} with experts_implementation {implementation}: its kernel reads the weights by itself; give one of "
            f"{', '.join(IMPLEMENTATIONS)}."
        )


def make_room_for_weights(model: nn.Module) -> bool:
    """Let a rank whose model has no weights (on the meta device) have memory for those of rank 0, and its buffers.

    All ranks call it, before anything looks at the parameters, which are others after it; the result is whether this
    one had none. Memory that nothing is written to is none: layers are broadcast one after the other as they are
    quantized, the rest by DeepSpeed.
    """
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    empty = gather(is_empty)
    if empty[0]:
        raise UserError(f"the {type(model).__name__} of rank 0 has no weights (it is on the meta device): load them.")
    if not any(empty):
        return False
    if is_empty:
        model.to_empty(device="cpu")
        tie: Any = getattr(model, "tie_weights", lambda: None)
        tie()
    device = get_accelerator().current_device_name()
    names = [name for name, _ in model.named_parameters()]
    of_ranks = gather(names)  # each of which is broadcast
    if any(one != of_ranks[0] for one in of_ranks):
        raise UserError(f"the {type(model).__name__} has weights tied by its own code: load them on every rank.")
    for _, buffer in model.named_buffers(remove_duplicate=False):
        value = buffer.to(device)
        dist.broadcast(value, src=0)
        buffer.copy_(value)
    return is_empty


def quantize_frozen_layers(
    model: nn.Module, blocks: Blocks, config: LisaConfig, active: Iterable[int], has_weights: bool = True
) -> FrozenLayers | None:
    """Quantize or stream the layers of a model that are not active; None where `config` has them stay as they are.

    `has_weights`: else this rank has room for those of rank 0 alone.
    """
    if config.frozen_form == 16 and not config.streams:
        return None
    device = torch.device(get_accelerator().current_device_name())
    place = config.lisa_frozen_store
    frozen = FrozenLayers(model, blocks, config.frozen_form, place, device, config.streams, has_weights)
    frozen.begin(active)
    return frozen
