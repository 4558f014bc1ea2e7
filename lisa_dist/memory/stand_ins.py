"""What a traced step runs in the place of what cannot run on fake tensors, or that a run replaces too."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lisa_dist.core.frozen_layers import held_forward


class _LookUp(torch.autograd.Function):
    """What an embedding allocates whose gradient is of rows: those of its tokens, for the end of the backward pass."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of the tokens."""
        ctx.vocabulary = len(weight)
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        """No gradient of the weight."""
        rows = gradients[0].reshape(-1, gradients[0].shape[-1])
        torch.empty_like(rows[: ctx.vocabulary])
        return None, None, None


@contextlib.contextmanager
def looked_up(embeddings: Sequence[Any]) -> Iterator[None]:
    """Have these embeddings' gradients be of rows."""

    def look_up(embedding: Any, tokens: torch.Tensor) -> torch.Tensor:
        leaf = torch.zeros((), requires_grad=True)
        return _LookUp.apply(leaf, embedding.weight.detach(), tokens)

    for embedding in embeddings:
        embedding.forward = functools.partial(look_up, embedding)
    try:
        yield
    finally:
        for embedding in embeddings:
            del embedding.forward


class _MadeWhole:
    """A matrix that is held in fewer bits, as a trace sees it: made whole whenever it is computed with."""

    in_fp32 = False

    def __init__(self, module: Any):
        self._weight = module.weight

    def whole(self) -> torch.Tensor:
        """The memory that it takes then."""
        return torch.empty_like(self._weight.detach())


@contextlib.contextmanager
def made_whole(modules: Sequence[Any]) -> Iterator[None]:
    """Have these linear modules make their matrix whole in each pass, as frozen layers in fewer bits do."""
    for module in modules:
        forward = functools.partial(held_forward, module)
        module.lisa_held, module.forward = _MadeWhole(module), forward
    try:
        yield
    finally:
        for module in modules:
            del module.lisa_held, module.forward


@contextlib.contextmanager
def as_triton(is_triton: bool) -> Iterator[None]:
    """Have TRL's loss in chunks allocate what it does with Triton, whose kernels take a tile as it is."""
    if not is_triton:
        yield
        return
    from trl.kernels import chunked_logprob

    # The last is one product on a GPU; elsewhere it is of copies in fp32.
    by_torch = {name: vars(chunked_logprob)[name] for name in ("_forward_tile", "_backward_tile", "_addmm_fp32")}
    vars(chunked_logprob).update(dict.fromkeys(by_torch, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        vars(chunked_logprob).update(by_torch)


@contextlib.contextmanager
def head_gradient_of(is_liger: bool) -> Iterator[None]:
    """Have the loss in chunks compute two slabs of the head's gradient, for all that come after allocate the same.

    Where it stands for Liger's, all of it at once: Liger too sums the whole gradient in fp32, and rounds it.
    """
    from lisa_dist.loss.chunked import LogProbsInSlabs

    ours = LogProbsInSlabs.words, LogProbsInSlabs.slabs
    LogProbsInSlabs.words, LogProbsInSlabs.slabs = None if is_liger else ours[0], 2
    try:
        yield
    finally:
        LogProbsInSlabs.words, LogProbsInSlabs.slabs = ours


class TritonScores(torch.autograd.Function):
    """What TRL's Triton kernel allocates for log-probabilities and entropies; it cannot run on fake tensors."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two values for each row of the logits, which are kept."""
        ctx.save_for_backward(logits)
        return torch.empty(len(targets), device=logits.device), torch.empty(len(targets), device=logits.device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """A gradient beside the logits, in their precision."""
        (logits,) = ctx.saved_tensors
        return torch.empty_like(logits), None
