"""Measuring memory: what live tensors hold, and what a step allocates on top of it."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_dist.optim.ops import OPERATORS


class AllocationTracker(TorchDispatchMode):
    """While it is on, every storage that an operator makes, until it is freed: bytes now, and the peak of each phase.

    Works on real tensors of any device and on fake ones (`FakeTensorMode`), in the forward and, on CPU, the backward
    pass. `kind_of(tensor)` names the part that a new storage is counted under. What exists before is known once it has
    been given to `add`.
    """

    def __init__(self, kind_of: Callable[[torch.Tensor], str] = lambda tensor: "other"):
        super().__init__()
        self._kind_of = kind_of
        self._seen: dict[int, weakref.ref] = {}
        self.bytes: Counter[str] = Counter()
        self.now = self.peak = 0
        self.at_peak: Counter[str] = Counter()

    def add(self, tensors: Iterable[torch.Tensor], kind: str | None = None) -> None:
        """Count the storages of `tensors` that are not counted yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # A storage's Python object lives as long as the storage, so its identity and a weak reference tell.
            if id(storage) in self._seen:
                continue
            key, size = id(storage), storage.nbytes()
            counted = self._kind_of(tensor) if kind is None else kind

            def forget(_, key=key, size=size, counted=counted):
                del self._seen[key]
                self.bytes[counted] -= size
                self.now -= size

            self._seen[key] = weakref.ref(storage, forget)
            self.bytes[counted] += size
            self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, +self.bytes

    def begin_phase(self) -> None:
        """The peak is that of what comes from here on."""
        self.peak, self.at_peak = self.now, +self.bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operator and count what it has made; of our own operators, what they make on the way too."""
        code = OPERATORS.get(function)
        if code is not None:
            with self:
                code(*args, **(kwargs or {}))
            return None
        made = function(*args, **(kwargs or {}))
        made_tensors = made if isinstance(made, tuple | list) else (made,)
        self.add(tensor for tensor in made_tensors if isinstance(tensor, torch.Tensor))
        return made
