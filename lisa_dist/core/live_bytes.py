"""Bytes that live tensors hold on this rank."""

import contextlib
import gc
from collections.abc import Iterator

import torch

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
    with _without_collection():
        # By exact class: isinstance would be slower, and asks lazy proxies for __class__, which makes them load.
        for candidate in [thing for thing in gc.get_objects() if type(thing) in kinds]:
            if not _is_defined(candidate):
                continue
            for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
                if tensor is not None and tensor.layout == torch.strided and not tensor.is_meta:
                    storage = tensor.untyped_storage()
                    address = _address(storage) if storage.device.type != "meta" else None  # a plan's
                    if address is not None and address not in shared_addresses:
                        storages[address] = storage
    return list(storages.values())


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """The garbage collector may take the tensor from an object that torch 2.9 and older own, whoever refers to it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_defined(tensor: torch.Tensor) -> bool:
    """Whether the tensor behind an object is there still."""
    try:
        return tensor.device is not None
    except RuntimeError:  # there is no other way to ask
        return False


def _address(storage: torch.UntypedStorage) -> int | None:
    """Where a storage is; None for one without memory, of a tensor that torch has compiled with."""
    try:
        return storage.data_ptr()
    except RuntimeError:  # there is no other way to ask
        return None


def _tensor_classes() -> set[type]:
    pending: list[type] = [torch.Tensor]
    classes: set[type] = set()
    while pending:
        classes.add(kind := pending.pop())
        pending += kind.__subclasses__()
    return classes
