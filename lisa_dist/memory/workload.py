"""What a planned step is of: the shape of a micro-batch, the blocks that train, and their parameter groups."""

from dataclasses import dataclass

import torch

from lisa_dist.config import StateBits

# How a step computes its loss.
CHUNKED, LOGITS, LIGER, OWN, SCORE, RATIO = "chunked", "logits", "liger", "own", "score", "ratio"


@dataclass(frozen=True)
class Workload:
    """The shape of one micro-batch of a rank, and how the model computes it."""

    seq_length: int
    micro_batch_size: int = 1
    dtype: torch.dtype = torch.bfloat16
    checkpointed_layers: int = 0  # so many of the lowest layers store only their inputs
    attention: str = "sdpa"
    # TRL's in chunks, of LOGITS of the positions with a label, LIGER's, the model's OWN, of a reward model's SCORE, or
    # of a RATIO: as the model's own, and whoever computes it keeps the logits.
    loss: str = CHUNKED
    labels: int | None = None  # positions with a label, where LOGITS are not of all that can have one
    triton: bool = False  # TRL's loss by its Triton kernels, as on a GPU
    padded: bool = False  # examples of several lengths: the attention has a mask
    frozen_bits: int = 16  # of the matrices of frozen decoder layers
    by_module: bool = False  # linear modules are sampled in the place of layers

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch of a rank."""
        return self.micro_batch_size * self.seq_length


@dataclass(frozen=True)
class Trained:
    """The blocks that one period trains: layers, or modules, by number, outer blocks by name."""

    layers: tuple[int, ...]
    always_on: tuple[str, ...]
    sampled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """One parameter group: its parameters, the bits of its moments or "factored", whether it trains in every period.

    `on_host`: its states are on the host (--lisa_offload). `by_rows`: an embedding whose gradient is of the rows that
    occur (`zero/embedding_rows.py`).
    """

    params: tuple[torch.nn.Parameter, ...]
    bits: StateBits = 32
    always_on: bool = True
    on_host: bool = False
    by_rows: bool = False

    @property
    def numels(self) -> list[int]:
        """Elements of each parameter."""
        return [parameter.numel() for parameter in self.params]

    @property
    def widths(self) -> list[int]:
        """Elements of a row of each parameter."""
        return [parameter.shape[-1] for parameter in self.params]

    @property
    def named_numels(self) -> list[tuple[str, int]]:
        """The same for `zero.layout`, which names pieces: here by the parameter's number in the group."""
        return [(str(number), numel) for number, numel in enumerate(self.numels)]
