"""Bytes that live tensors hold on this rank, and those that operators allocate."""

import bisect
import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Where memory begins that the ranks of a host share: tensors see it on each of them, and it is there once.
shared_addresses: set[int] = set()


def live_tensor_bytes(device: torch.device | None = None) -> int:
    """Bytes of live tensors on this rank.

    On CUDA what the caching allocator has handed out. On CPU every storage that a live tensor points to, counted once;
    this walks the garbage collector's objects and takes some 0.1 s, so it is for switches and tests, not for steps.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return sum(storage.nbytes() for storage in live_storages())


def live_storages() -> list[torch.UntypedStorage]:
    """Every storage that a tensor known to the garbage collector points to, once; none that ranks share."""
    kinds = _tensor_classes()
    storages: dict[int, torch.UntypedStorage] = {}
    was_enabled = gc.isenabled()
    gc.disable()  # it may take the tensor from an object that torch 2.9 owns, whoever refers to it
    try:
        # By exact class: isinstance would be slower, and asks lazy proxies for __class__, which makes them load.
        for candidate in [thing for thing in gc.get_objects() if type(thing) in kinds]:
            # There is no other way to ask whether torch 2.9 has left no tensor in an object, or a compiler no memory.
            with contextlib.suppress(RuntimeError):
                for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
                    if tensor is not None and tensor.layout == torch.strided and not tensor.is_meta:
                        storage = tensor.untyped_storage()
                        is_planned = storage.device.type == "meta"
                        if not is_planned and storage.data_ptr() not in shared_addresses:
                            storages[storage.data_ptr()] = storage
    finally:
        if was_enabled:
            gc.enable()
    return list(storages.values())


def unmapped_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of CPU tensors that lie in memory, and not in files that are mapped into it.

    Deleting a tensor of a mapped file frees nothing: its pages are page cache, which counts as free already.
    """
    begins, ends = [], []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0":
            begin, _, end = addresses.partition("-")
            begins.append(int(begin, 16))
            ends.append(int(end, 16))
    total = 0
    for tensor in tensors:
        place = bisect.bisect_right(begins, tensor.data_ptr())
        is_mapped = place > 0 and tensor.data_ptr() < ends[place - 1]
        total += 0 if is_mapped else tensor.nbytes
    return total


def _tensor_classes() -> set[type]:
    pending: list[type] = [torch.Tensor]
    classes: set[type] = set()
    while pending:
        classes.add(kind := pending.pop())
        pending += kind.__subclasses__()
    return classes


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
