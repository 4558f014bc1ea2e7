"""Bytes that live tensors hold on this rank."""

import contextlib
import gc

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


def _tensor_classes() -> set[type]:
    pending: list[type] = [torch.Tensor]
    classes: set[type] = set()
    while pending:
        classes.add(kind := pending.pop())
        pending += kind.__subclasses__()
    return classes
