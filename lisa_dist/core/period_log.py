"""lisa_log.jsonl, a line for each period, written after its first step; and the bytes of live tensors in it."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lisa_dist.core.sampling import ActiveSet
from lisa_dist.run_folder import LOG_NAME, append_line

# Where memory begins that the ranks of a host share: tensors see it on each of them, and it is there once.
shared_addresses: set[int] = set()


@dataclass
class PeriodRecord:
    """One line of lisa_log.jsonl. Seconds are of the switch; bytes are of this rank, after the period's first step.

    `blocks` are the outer blocks that train in this period in addition to the always-trained ones; `host_bytes` are
    states of inactive blocks that wait on the host; `probabilities`, of samplers with weights, are those of each layer
    to be sampled.
    """

    period: int
    step: int
    layers: list[int]
    blocks: list[str]
    seconds: float
    state_bytes_per_rank: int = 0
    bytes_released: int = 0
    live_bytes: int = 0
    host_bytes: int = 0
    probabilities: list[float] = field(default_factory=list)


class PeriodLog:
    """The records of a run in `records`; the rank that was given a folder writes them too."""

    def __init__(self) -> None:
        self.records: list[PeriodRecord] = []
        self.resumed = False
        self._open: PeriodRecord | None = None
        self._path: Path | None = None
        self._begun = False

    def write_to(self, folder: str) -> None:
        """Write to lisa_log.jsonl in a folder, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._path = Path(folder) / LOG_NAME

    def resume(self) -> None:
        """A state has been loaded: the lines of the steps before it stay, those of later ones go."""
        self.resumed, self._begun = True, False

    def begin(self, active: ActiveSet, **fields: Any) -> None:
        """A period begins, in which these blocks train; `fields` are further ones of its record."""
        self.open(PeriodRecord(layers=list(active.layers), blocks=list(active.blocks), **fields))

    def open(self, record: PeriodRecord | None) -> None:
        """A period begins; its bytes are not known yet. None: there is no line to be written before the next switch."""
        self._open = record
        if record is not None:
            self.records = [earlier for earlier in self.records if earlier.step < record.step]

    def close(self, step: int, measure: Callable[[], dict[str, int]]) -> None:
        """Complete the period's record by what `measure` gives, and write it, if its first step has been taken."""
        record = self._open
        if record is None or step == record.step:
            return
        self._open = None
        vars(record).update(measure())
        self.records.append(record)
        if self._path is not None:
            before = record.step if self.resumed else 0
            append_line(self._path, vars(record), None if self._begun else lambda earlier: earlier["step"] < before)
            self._begun = True

    def state_dict(self) -> dict[str, Any] | None:
        """The record that is still open, for a resumed run to complete."""
        return None if self._open is None else vars(self._open).copy()


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
