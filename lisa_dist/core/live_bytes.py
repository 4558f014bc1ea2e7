"""Bytes that live tensors hold on this rank."""

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
    # By exact class: isinstance would be slower, and asks lazy proxies for __class__, which makes them load.
    for candidate in [thing for thing in gc.get_objects() if type(thing) in kinds and _is_defined(thing)]:
        for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
            if tensor is not None and tensor.layout == torch.strided and not tensor.is_meta:
                storage = tensor.untyped_storage()
                address = _address(storage) if storage.device.type != "meta" else None  # a plan's
                if address is not None and address not in shared_addresses:
                    storages[address] = storage
    return list(storages.values())


def _is_defined(tensor: torch.Tensor) -> bool:
    """Whether there is a tensor behind an object; autograd of torch 2.9 and older has some without."""
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
