"""Optimizer states of ZeRO partitions, and what becomes of them at a switch.

A rank holds, for each parameter group, one flat partition: the fp32 master weights and the optimizer's states over them
(two moments and a step count for AdamW). A switch takes the partitions out, decides here which go on, and puts those
back after the groups have been rebuilt.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

# A partition is known by the names of the parameters it was cut from: the same parameters in the same order have the
# same partition on the same rank, whichever group they are in.
PartitionKey = tuple[str, ...]


@dataclass
class PartitionState:
    """What one rank keeps of one parameter group: `master` is flat, in elements of this rank's partition."""

    master: torch.Tensor
    optimizer_state: dict

    @property
    def numel(self) -> int:
        return self.master.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the master and of everything that the optimizer keeps for it."""
        return tensor_bytes(self.master) + sum(tensor_bytes(value) for value in self.optimizer_state.values())


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of the flattened parameter `name`, at `offset` in a rank's partition."""

    name: str
    start: int
    length: int
    offset: int


def tensor_bytes(value: object) -> int:
    """Bytes of a tensor's elements; 0 for what is no tensor."""
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def states_to_carry(
    states: dict[PartitionKey, PartitionState], policy: str, active: Iterable[PartitionKey]
) -> dict[PartitionKey, PartitionState]:
    """The partitions that go on after a switch, by policy.

    reset: blocks that stay awake keep master and moments; a block that falls asleep loses both.
    reset_all: every block starts with fresh moments, as when the paper's runs saved and reloaded the model. Masters of
    blocks that stay awake go on all the same: they are the weights, and lose their low bits when cloned from bf16.
    """
    staying = {key: states[key] for key in active if key in states}
    if policy == "reset":
        return staying
    assert policy == "reset_all"
    return {key: PartitionState(state.master, {}) for key, state in staying.items()}
