"""Where every storage is, who has touched which of its bytes, and what the allocators count."""

import contextlib
import ctypes
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from simulated_gpu.clocks import CLOCKS, HOST
from simulated_gpu.problems import calls, report

DEVICE_BLOCK = 512  # bytes; the caching allocator rounds up to them
_NOBODY_READS = 0xFF  # of every byte of new memory: NaN in every floating-point type


@dataclass(frozen=True)
class Access:
    """Bytes [begin, end) were read or written by a stream or the host, as the piece of work `number`."""

    begin: int
    end: int
    writes: bool
    who: int
    number: int
    operator: str
    where: tuple[str, ...] = ()


@dataclass
class Storage:
    """A storage of a tensor: `place` is "cuda" or "cpu"."""

    place: str
    pinned: bool
    nbytes: int
    stream: int  # that it was allocated for
    made_at: tuple[str, ...]
    recorded: set[int] = field(default_factory=set)  # streams of `record_stream`
    accesses: list[Access] = field(default_factory=list)
    reference: weakref.ref | None = None

    @property
    def kind(self) -> str:
        return "pinned" if self.pinned else self.place


class Memory:
    """The storages of this process and the bytes that CUDA's allocators would have."""

    def __init__(self) -> None:
        self.now = self.peak = 0  # bytes of the device
        self.counts: Counter[str] = Counter()  # bytes copied between the device and pageable or pinned memory
        self._storages: dict[int, Storage] = {}
        self._unsafe: dict[int, list[tuple[int, int, str]]] = defaultdict(list)  # by stream: who still uses it
        self._registered: set[int] = set()  # addresses of what `cudaHostRegister` has pinned
        self._next = threading.local()

    @contextlib.contextmanager
    def placing(self, place: str, pinned: bool = False) -> Iterator[None]:
        """Have what operators make be in a place."""
        before, self._next.value = self.next_place, (place, pinned)
        try:
            yield
        finally:
            self._next.value = before

    @property
    def next_place(self) -> tuple[str, bool] | None:
        """Where `placing` wants what is made."""
        return getattr(self._next, "value", None)

    def storage(self, tensor: torch.Tensor, place: str = "cpu", pinned: bool = False) -> Storage:
        """The storage of a tensor; one that is new is in `place`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        registered = bool(self._registered) and storage.data_ptr() in self._registered
        if known is not None and known.reference is not None and known.reference() is not None:
            known.pinned |= registered
            return known
        where = calls(4) if place == "cuda" or pinned else ()
        pinned |= registered
        new = Storage(place, pinned, storage.nbytes(), CLOCKS.current.id, where)
        new.reference = weakref.ref(storage, lambda _: self._free(key, new))
        self._storages[key] = new
        self._allocate(new)
        return new

    def register(self, address: int, nbytes: int, flags: int) -> int:
        """cudaHostRegister, of the whole of a storage."""
        self._registered.add(address)
        return 0

    def unregister(self, address: int) -> int:
        """cudaHostUnregister, of memory that nobody uses any more."""
        self._registered.discard(address)
        return 0

    def place_of(self, tensor: torch.Tensor) -> str:
        """ "cuda" or "cpu"."""
        return self.storage(tensor).place

    def put_on_device(self, tensor: torch.Tensor) -> None:
        """Allocate a tensor that was made without the dispatcher, as `torch.tensor` makes it."""
        storage = self.storage(tensor)
        if storage.place != "cuda":
            storage.place, storage.stream = "cuda", CLOCKS.current.id
            self._allocate(storage)

    def touch(self, tensor: torch.Tensor, writes: bool, who: int, number: int, operator: str) -> None:
        """Note that a piece of work reads or writes a tensor, and report what it is not ordered after."""
        begin, end = extent(tensor)
        if begin == end:
            return
        storage = self.storage(tensor)
        if storage.kind == "cpu" and who == HOST and not storage.accesses:
            return  # nobody but the host has ever seen it
        kept = []
        for one in storage.accesses:
            overlaps = one.begin < end and begin < one.end
            if overlaps and (one.writes or writes) and not CLOCKS.sees(who, one.who, one.number):
                report(
                    "race",
                    f"{operator} {_verb(writes)} {storage.nbytes} bytes ({storage.kind}) on {_name(who)}, not ordered "
                    f"after {one.operator}, which {_verb(one.writes)} them on {_name(one.who)} at {one.where}",
                )
            is_covered = begin <= one.begin and one.end <= end
            # A write that covers it was ordered after it, or is reported; of one stream's the last is enough.
            if not (is_covered and (writes or (one.who == who and one.writes == writes))):
                kept.append(one)
        where = calls(4) if who not in (HOST, 0) else ()
        kept.append(Access(begin, end, writes, who, number, operator, where))
        storage.accesses = kept

    def _allocate(self, storage: Storage) -> None:
        if storage.place != "cuda":
            return
        for other, number, text in self._unsafe.pop(storage.stream, ()):
            if not CLOCKS.sees(storage.stream, other, number):
                report("memory is given out that another stream still uses", text)
        self.now += rounded(storage.nbytes)
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, storage: Storage) -> None:
        if self._storages.get(key) is storage:
            del self._storages[key]
        if storage.place != "cuda":
            return
        self.now -= rounded(storage.nbytes)
        # It is given out again when the streams that are recorded have done what they had to do at this moment.
        waited_for = {storage.stream} | storage.recorded
        for one in storage.accesses:
            if one.who != HOST and not any(CLOCKS.sees(who, one.who, one.number) for who in waited_for):
                text = f"{storage.nbytes} bytes of {_name(storage.stream)}, made at {storage.made_at}, last used by "
                text += f"{one.operator} on {_name(one.who)} at {one.where}: no record_stream"
                self._unsafe[storage.stream].append((one.who, one.number, text))
                break


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after its last."""
    if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.is_meta:
        return 0, 0
    begin = tensor.storage_offset() * tensor.element_size()
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return begin, begin + elements * tensor.element_size()


def rounded(nbytes: int) -> int:
    """What the device's allocator takes for so many bytes."""
    return -(-nbytes // DEVICE_BLOCK) * DEVICE_BLOCK


def poison(tensor: torch.Tensor) -> None:
    """Fill a tensor with what nobody should read."""
    begin, end = extent(tensor)
    if begin != end and tensor.is_contiguous():
        ctypes.memset(tensor.data_ptr(), _NOBODY_READS, end - begin)


def _verb(writes: bool) -> str:
    return "writes" if writes else "reads"


def _name(who: int) -> str:
    return "the host" if who == HOST else "the default stream" if who == 0 else f"stream {who}"


MEMORY = Memory()
