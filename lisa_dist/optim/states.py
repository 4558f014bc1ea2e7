"""Optimizer states of ZeRO partitions, and what becomes of them at a switch.

A rank holds, for each parameter group, one flat partition: the fp32 master weights and the optimizer's states over them
(two moments and a step count for AdamW). A switch takes the partitions out, decides here which go on, and puts those
back after the groups have been rebuilt.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lisa_dist.errors import UserError

# A partition is known by the names of the parameters it was cut from: the same parameters in the same order have the
# same partition on the same rank, whichever group they are in.
PartitionKey = tuple[str, ...]
Fields = dict[str, Any]  # of a partition, by name: its master, moments and number of steps, or some of them


@dataclass
class PartitionState:
    """What one rank keeps of one parameter group: `master` is flat, in elements of this rank's partition.

    `is_weights`: the master is no copy, but the weights themselves.
    """

    master: torch.Tensor
    optimizer_state: Fields
    is_weights: bool = False

    @property
    def numel(self) -> int:
        return self.master.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the master and of everything that the optimizer keeps for it."""
        of_master = 0 if self.is_weights else tensor_bytes(self.master)
        return of_master + sum(tensor_bytes(value) for value in self.optimizer_state.values())


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of the flattened parameter `name`, at `offset` in a rank's partition."""

    name: str
    start: int
    length: int
    offset: int

    @property
    def elements(self) -> slice:
        """Where it is in the partition."""
        return slice(self.offset, self.offset + self.length)


class CopyStream:
    """Copies between host and device, queued on a stream of their own, or in order on a device without streams.

    What is copied on `after_compute` sees what was computed before; what is computed later sees it only after `wait`.
    """

    def __init__(self, device: torch.device | None = None):
        self._side = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    @property
    def overlaps(self) -> bool:
        """Whether copies run beside what is computed."""
        return self._side is not None

    @contextlib.contextmanager
    def after_compute(self) -> Iterator[None]:
        """Queue in here copies alone; what they write to is allocated before."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def hold(self, tensor: torch.Tensor) -> None:
        """Let the memory of a tensor that is copied from be used again only when that is done."""
        if self._side is not None:
            tensor.record_stream(self._side)

    def mark(self) -> Callable[[], None]:
        """A function that has the host wait for the copies that are queued now."""
        if self._side is None:
            return lambda: None
        event = torch.cuda.Event()
        event.record(self._side)
        return event.synchronize

    def wait(self, *_: object) -> None:
        """What is computed from here on comes after all copies."""
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)


class HostStates:
    """States of inactive partitions, kept on the host until they are activated again (state policy keep).

    On a device with streams they come in pinned memory, and buffers of partitions that were activated serve those
    that become inactive next: host bytes are bounded by the states of all layers. Copies are queued on `copies`, not
    waited for: whoever reads the tensors here synchronizes the device first.
    """

    def __init__(self, copies: CopyStream):
        self.copies = copies
        self._kept: dict[PartitionKey, tuple[PartitionState, list[Piece]]] = {}
        self._spare: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
        self._mine: set[int] = set()  # data pointers of the buffers made here

    def put(self, key: PartitionKey, state: PartitionState, pieces: list[Piece]) -> None:
        """Move a partition's master and moments to the host; what is there already stays as it is."""
        with self.copies.after_compute():
            moments = {name: self._to_host(value) for name, value in state.optimizer_state.items()}
            self._kept[key] = PartitionState(self._to_host(state.master.detach()), moments), pieces

    def take(self, key: PartitionKey) -> PartitionState | None:
        """Give up a partition's host copy, if there is one; it may be read until the next `put`."""
        state, _ = self._kept.pop(key, (None, []))
        for value in () if state is None else (state.master, *state.optimizer_state.values()):
            if isinstance(value, torch.Tensor) and value.data_ptr() in self._mine:
                self._spare.setdefault((value.dtype, value.numel()), []).append(value)
        return state

    def clear(self) -> None:
        """Forget everything, as at the beginning of a run."""
        self._kept.clear()

    @property
    def states(self) -> dict[PartitionKey, PartitionState]:
        """All kept partitions."""
        return {key: state for key, (state, _) in self._kept.items()}

    @property
    def pieces(self) -> dict[PartitionKey, list[Piece]]:
        """Which elements of which parameters each kept partition holds."""
        return {key: pieces for key, (_, pieces) in self._kept.items()}

    @property
    def nbytes(self) -> int:
        """Bytes on the host: kept partitions, and buffers that wait for the next ones."""
        spare = sum(tensor_bytes(buffer) for buffers in self._spare.values() for buffer in buffers)
        return spare + sum(state.nbytes for state in self.states.values())

    def _to_host(self, value: Any) -> Any:
        if not (is_moment(value) and self._moves(value)):
            return value
        spare = self._spare.get((value.dtype, value.numel()))
        host = spare.pop() if spare else self._new_buffer(value)
        self._mine.add(host.data_ptr())
        host = host.view(value.shape).copy_(value, non_blocking=True)
        self.copies.hold(value)
        return host

    def _moves(self, value: torch.Tensor) -> bool:
        return value.device.type != "cpu"

    def _new_buffer(self, like: torch.Tensor) -> torch.Tensor:
        count = buffers_of_block(like.nbytes)
        block = self._new_block(count * like.numel(), like.dtype)
        buffers: tuple[torch.Tensor, ...] = block.split(like.numel())
        self._spare.setdefault((like.dtype, like.numel()), []).extend(buffers[1:])
        return buffers[0]

    def _new_block(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, pin_memory=True)


def is_moment(value: object) -> bool:
    """Whether a field of an optimizer's state has numbers of elements, and is not a count of steps."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def buffers_of_block(nbytes: int) -> int:
    """How many buffers of so many bytes to cut from one block of pinned memory.

    Of one to eight, the number that wastes least of the power of two that torch takes: a fifth of it at most.
    """
    return min(range(1, 9), key=lambda count: pinned_block(count * nbytes) / count)


def pinned_bytes(nbytes: int, count: int) -> int:
    """Bytes that torch takes for so many buffers of `nbytes` each."""
    together = buffers_of_block(nbytes)
    return -(-count // together) * pinned_block(together * nbytes)


def pinned_block(nbytes: int) -> int:
    """Bytes that torch takes for one block of pinned memory."""
    return 1 << (nbytes - 1).bit_length()


def tensor_bytes(value: object) -> int:
    """Bytes of a tensor's elements; 0 for what is no tensor."""
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def check_steps_are_counted(states: Iterable[PartitionState]) -> None:
    """Raise UserError, on every rank alike, for an optimizer whose state a resume could not find."""
    if any(state.optimizer_state and "step" not in state.optimizer_state for state in states):
        raise UserError("the optimizer's state has no count `step`, by which a resume finds it: count its steps there.")


def states_to_carry(
    states: dict[PartitionKey, PartitionState], policy: str, active: Iterable[PartitionKey], host: HostStates
) -> dict[PartitionKey, PartitionState]:
    """The partitions that go on after a switch, by policy; the rest start afresh.

    reset: blocks that stay active keep master and moments; a block that becomes inactive loses both.
    reset_all: every block starts with fresh moments, as when the paper's runs saved and reloaded the model. Masters of
    blocks that stay active are carried over all the same: cloned from bf16 weights they would lose their low bits.
    keep: as reset, but the states of a block that becomes inactive were put on `host` and come back when it is active.
    """
    active = list(active)
    staying = {key: states[key] for key in active if key in states}
    if policy == "reset_all":
        return {key: PartitionState(state.master, {}) for key, state in staying.items()}
    kept = {key: state for key in active if (state := host.take(key)) is not None}
    assert not kept.keys() & staying.keys()
    return staying | kept
