"""Count the storages that operators allocate, on real tensors and on fake ones."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class AllocationTracker(TorchDispatchMode):
    """While it is entered, the bytes of all storages that operators allocate and that are not freed, and their peak.

    Works on real tensors of any device and on fake ones (`FakeTensorMode`), in the forward and, on CPU, the backward
    pass. `kind_of(tensor)` names the part that a new storage is counted under. Storages that exist already are counted
    once they are given to `add`.
    """

    def __init__(self, kind_of: Callable[[torch.Tensor], str] = lambda tensor: "other") -> None:
        super().__init__()
        self._kind_of = kind_of
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.bytes: Counter[str] = Counter()
        self.now = self.peak = 0

    def add(self, tensors: Iterable[torch.Tensor], kind: str | None = None) -> None:
        """Count the storages of `tensors` that are not counted yet."""
        for tensor in tensors:
            if tensor.device.type == "meta":  # no memory; a fake tensor has the device it stands for
                continue
            storage = tensor.untyped_storage()
            # A storage's Python object lives as long as the storage, so its id and a weak reference identify it.
            if id(storage) in self._seen:
                continue
            key, size = id(storage), storage.nbytes()
            part = self._kind_of(tensor) if kind is None else kind

            def forget(_: object, key: int = key, size: int = size, part: str = part) -> None:
                del self._seen[key]
                self.bytes[part] -= size
                self.now -= size

            self._seen[key] = weakref.ref(storage, forget)
            self.bytes[part] += size
            self.now += size
        self.peak = max(self.peak, self.now)

    def begin_phase(self) -> None:
        """Begin to record the peak anew."""
        self.peak = self.now

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count what it allocates."""
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        self.add(tensor for tensor in results if isinstance(tensor, torch.Tensor))
        return result
