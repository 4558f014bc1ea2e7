"""Frozen layers that stay on the host (`--lisa_offload frozen`): the device has two buffers of a layer.

A pass that comes to a layer finds it in one of them, and the next layer of the pass is copied into the other meanwhile:

    forward    computes 0   1   2   3          backward, computing again what was checkpointed    3   2   1   0
               copies     1   2   3                                                             2   1   0

A copy waits for what was computed with the layer before, and what is computed next for the copy; the host for neither.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch

from lisa_dist.core.frozen_forward import is_in_backward
from lisa_dist.core.weight_store import WeightStore
from lisa_dist.optim.states import CopyStream


class LayerStream:
    """Tensors of a store by layer, `layers`, in whose order they are in it; the device has two layers of them."""

    def __init__(self, store: WeightStore, layers: Mapping[int, Sequence[Hashable]], device: torch.device):
        self._layers = {layer: store.span(names) for layer, names in layers.items()}
        largest = max(bytes_of_layer.nbytes for bytes_of_layer, _ in self._layers.values())
        self.buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copies = CopyStream(device)
        self.choose(())

    def choose(self, layers: Iterable[int]) -> None:
        """The layers that passes come to from now on, with what the store has of them now."""
        self._order = sorted(layers)
        self._in_buffer: list[int | None] = [None, None]
        self._current: int | None = None
        self._tensors: dict[Hashable, torch.Tensor] = {}

    def tensor(self, layer: int, name: Hashable) -> torch.Tensor:
        """A tensor of a layer that a pass is at, on the device, until a pass comes to the next but one."""
        if layer != self._current:
            self._enter(layer)
        return self._tensors[name]

    def _enter(self, layer: int) -> None:
        if layer not in self._in_buffer:  # a pass begins
            self._fill(layer)
        self._copies.wait()
        self._current, buffer = layer, self.buffers[self._in_buffer.index(layer)]
        self._tensors = {
            name: buffer[begin : begin + like.nbytes].view(like.dtype).view(like.shape)
            for name, (begin, like) in self._layers[layer][1].items()
        }
        following = self._following(layer)
        if following is not None and following not in self._in_buffer:
            self._fill(following)

    def _following(self, layer: int) -> int | None:
        place = self._order.index(layer) + (-1 if is_in_backward() else 1)
        if place == len(self._order) and not torch.is_grad_enabled():  # no backward pass comes
            place = 0
        return self._order[place] if 0 <= place < len(self._order) else None

    def _fill(self, layer: int) -> None:
        """Copy a layer into the buffer that is not computed from."""
        number = 1 if self._in_buffer[0] == self._current is not None else 0
        of_layer, _ = self._layers[layer]
        with self._copies.after_compute():
            self.buffers[number][: of_layer.nbytes].copy_(of_layer, non_blocking=True)
        self._copies.hold(self.buffers[number])  # the last copy may be under way when nobody has the buffers any more
        self._in_buffer[number] = layer
