"""The input embedding's gradient by the rows that occur, on stages 1 and 2 under LisaAdamW.

The gradient of an embedding is zero but for the tokens of a batch, and DeepSpeed has it whole: V D elements on each
rank, the largest tensor of a step on today's vocabularies. Here the lookup's backward pass makes rows of it, the
parameter has no gradient, and DeepSpeed's reduction knows nothing of it:

    backward pass   rows of this rank's tokens, each token once              n D elements, n the tokens of a micro-batch
    its end         divided by W and sent to the ranks whose pieces they     n D elements sent, of each rank
                    are in, which add them up (all_to_all)
    step            RowGradient, laid out a chunk at a time                  min(W n, rows of the piece) D elements kept

Only where the embedding is a matrix of its own group, looked up by a plain `nn.Embedding` and tied to nothing; and on
at most MAX_RANKS ranks, since each sends to all others, W - 1 messages of about n / W rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional

from lisa_dist.optim.row_gradient import RowGradient
from lisa_dist.optim.states import Piece
from lisa_dist.zero.stages import Stage

MAX_RANKS = 64


def exchanges_rows(world_size: int) -> bool:
    """Whether so many ranks send each other rows; more have DeepSpeed reduce the whole gradient, as plans count it."""
    return world_size <= MAX_RANKS


def embedding_of(model: nn.Module, parameter: nn.Parameter) -> nn.Embedding | None:
    """The module that alone has a matrix, if it is an embedding that looks rows up and does nothing else."""
    owners = [module for module in model.modules() if any(one is parameter for one in module._parameters.values())]
    if len(owners) != 1 or type(owners[0]) is not nn.Embedding:
        return None
    embedding = owners[0]
    own = vars(embedding).get("forward")
    if own is not None and not isinstance(getattr(own, "__self__", None), EmbeddingRows):
        return None  # somebody has replaced it
    plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
    return embedding if plain else None


class EmbeddingRows:
    """Takes the place of the gradient of one embedding, whose piece on each rank is in `pieces` (None: it has none)."""

    def __init__(self, embedding: nn.Embedding, pieces: Sequence[Piece | None], group: Any, divides: bool):
        self._embedding, self._pieces, self._group, self._divides = embedding, pieces, group, divides
        self.noted: list[tuple[torch.Tensor, torch.Tensor]] = []  # tokens, once each, and their rows, of lookups
        self._owned: tuple[torch.Tensor, torch.Tensor] | None = None
        self._leaf = torch.zeros((), device=embedding.weight.device, requires_grad=True)
        module: Any = embedding
        module.forward = self._look_up

    def note(self, tokens: torch.Tensor, gradient: torch.Tensor) -> None:
        """The gradient of what a lookup has given."""
        if self._embedding.padding_idx is not None:
            gradient = gradient.masked_fill((tokens == self._embedding.padding_idx)[..., None], 0)
        self.noted.append(_add_up(tokens.reshape(-1), gradient.reshape(-1, gradient.shape[-1])))
        if sum(len(indices) for indices, _ in self.noted) > self._embedding.num_embeddings:  # on stage 1
            self.noted = [_merge(self.noted)]

    def clear(self) -> None:
        """Forget what waits for a step, as when gradients are set to zero."""
        self.noted, self._owned = [], None

    def reduce(self) -> None:
        """At the end of a backward pass: every row to the ranks that have a piece of it; all ranks call it."""
        lookups, self.noted = self.noted, []
        indices, rows = _merge(lookups) if lookups else self._nothing()
        if self._divides:
            rows.div_(len(self._pieces))
        owned = (indices, rows) if len(self._pieces) == 1 else self._exchange(indices, rows)
        self._owned = owned if self._owned is None else _merge([self._owned, owned])

    def take(self) -> list[RowGradient | torch.Tensor]:
        """The gradient of this rank's piece for the step, of all micro-batches; nothing where it has no piece."""
        owned, self._owned = self._owned, None
        piece = self._pieces[dist.get_rank(self._group)]
        if piece is None:
            return [self._nothing()[1].view(-1)]
        return [RowGradient(piece.start, piece.length, self._embedding.embedding_dim, *(owned or self._nothing()))]

    def _look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """In the place of the embedding's `forward`."""
        weight = self._embedding.weight
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return functional.embedding(tokens, weight, self._embedding.padding_idx)
        rows: torch.Tensor = _Lookup.apply(self._leaf, weight.detach(), tokens, self)
        return rows

    def _nothing(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self._embedding.weight
        return torch.zeros(0, dtype=torch.long, device=weight.device), weight.new_zeros(0, weight.shape[1])

    def _exchange(self, indices: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        columns, device = self._embedding.embedding_dim, rows.device
        bounds = [
            (0, 0) if piece is None else (piece.start // columns, -(-(piece.start + piece.length) // columns))
            for piece in self._pieces
        ]
        places = torch.searchsorted(indices, torch.tensor(bounds, device=device)).tolist()
        parts = [slice(low, high) for low, high in places]
        sent = [part.stop - part.start for part in parts]
        counts = torch.tensor(sent, device=device)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=self._group)
        received: list[int] = coming.tolist()
        found = []
        for values in (indices, rows):
            outgoing = torch.cat([values[part] for part in parts])
            incoming = values.new_empty(sum(received), *values.shape[1:])
            dist.all_to_all_single(incoming, outgoing, received, sent, group=self._group)
            found.append(incoming)
        return _add_up(*found)


class _Lookup(torch.autograd.Function):
    """Rows of a matrix that has no gradient; what it would be is noted. `leaf` has the backward pass come here."""

    @staticmethod
    def forward(
        ctx: Any, leaf: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, rows: EmbeddingRows
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = rows
        return functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None, None]:
        (tokens,) = ctx.saved_tensors
        ctx.rows.note(tokens, gradients[0])
        return None, None, None, None


def _add_up(indices: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each index once, ascending, with the sum of its rows in their order, as an embedding's own backward pass does."""
    if not len(indices):
        return indices, rows
    once, place = torch.unique(indices, return_inverse=True)
    return once, torch.ops.aten.embedding_dense_backward(rows, place, len(once), -1, False)


def _merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(parts) == 1:
        return parts[0]
    indices, rows = (torch.cat(values) for values in zip(*parts, strict=True))
    return _add_up(indices, rows)


def reduces_plainly(zero: Any, stage: Stage) -> bool:
    """Whether a ZeRO optimizer adds gradients up in the dtype of the weights and divides by W, as is done with rows."""
    return (
        not stage.is_stage_3
        and not stage.offloads_optimizer(zero)
        and zero.model_parallel_group is None
        and zero.sequence_parallel_size == 1
        and zero.postscale_gradients
        and zero.gradient_predivide_factor == 1.0
        and zero.dtype == zero.communication_data_type == zero.gradient_accumulation_dtype
    )


def leave(model: nn.Module) -> None:
    """Let embeddings have gradients of their own again."""
    for module in model.modules():
        if isinstance(getattr(module.forward, "__self__", None), EmbeddingRows):
            del module.forward


def reduced_by_rows(
    model: nn.Module, zero: Any, index: int, pieces: Sequence[Piece | None]
) -> dict[str, Callable[..., Any]]:
    """Replace what the end of a backward pass does about group `index`, whose one parameter then has no gradient."""
    (parameter,) = zero.bit16_groups[index]
    embedding = embedding_of(model, parameter)
    assert embedding is not None
    rows, optimizer_class = EmbeddingRows(embedding, pieces, zero.dp_process_group, zero.gradient_average), type(zero)

    def gradients_of(params: list[nn.Parameter], dtype: torch.dtype) -> list[torch.Tensor]:
        if params is not zero.params_in_partition[index]:
            gradients: list[torch.Tensor] = optimizer_class.get_all_grad_tensors(zero, params, dtype)
            return gradients
        if zero.get_gradient_for_reduction(parameter) is not None:
            raise RuntimeError(
                f"{type(model).__name__} reads the matrix of its input embedding elsewhere than in a lookup, so its "
                "gradient would be lost: use another --optim than lisa_adamw."
            )
        rows.reduce()
        return []

    def zero_grad(*args: Any, **kwargs: Any) -> None:
        rows.clear()
        optimizer_class.zero_grad(zero, *args, **kwargs)

    def flat_partition(*args: Any, param_group_idx: int, **kwargs: Any) -> Any:
        if param_group_idx != index:
            return optimizer_class.get_flat_partition(zero, *args, param_group_idx=param_group_idx, **kwargs)
        return rows.take()

    return {
        "get_all_grad_tensors": gradients_of,
        "get_flat_partition": flat_partition,
        "zero_grad": zero_grad,
    }
