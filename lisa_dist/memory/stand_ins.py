"""What is replaced while a step is traced: code that fake tensors cannot run, or that a run replaces by its own.

`patches.py` has what is replaced, why, and when it can go. All of it is put back after the trace.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import masking_utils
from transformers.integrations import moe

from lisa_dist.core.frozen_layers import held_forward
from lisa_dist.patches import patched

_cross_entropy = torch.nn.functional.cross_entropy  # before Liger can have replaced it


@contextlib.contextmanager
def stand_ins(
    held: Sequence[Any], by_rows: Sequence[Any], *, padded: bool, fused: bool, triton: bool, liger: bool
) -> Iterator[None]:
    """All of them: of linear modules that are `held` in fewer bits, of embeddings whose gradient is `by_rows`.

    `padded`: rows have several lengths. `fused`: the model has TRL's head; `triton`: that runs as on a GPU; `liger`: it
    stands for Liger's.
    """
    with contextlib.ExitStack() as stack:
        for module in held:
            stack.enter_context(_made_whole(module))
        for embedding in by_rows:
            stack.enter_context(patched(embedding, "forward", functools.partial(_look_up, embedding), of="rows"))
        stack.enter_context(_experts_of_any_dtype())
        if not padded:  # SDPA gets a mask only where examples are packed
            stack.enter_context(patched(masking_utils, "find_packed_sequence_indices", _not_packed, of="packed_mask"))
        if fused and triton:
            stack.enter_context(_tiles())
        if fused:
            stack.enter_context(_slabs(liger))
        yield


def _experts_of_any_dtype() -> contextlib.AbstractContextManager[None]:
    """Torch's product of groups for bf16 alone: else transformers' own way, which has the same shapes."""
    original = moe._can_use_grouped_mm

    def can_use(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and original(input, weight, offs)

    return patched(moe, "_can_use_grouped_mm", can_use, of="grouped_experts")


def _not_packed(position_ids: torch.Tensor) -> None:
    return None


@contextlib.contextmanager
def _tiles() -> Iterator[None]:
    """TRL's Triton kernels, which take a tile as it is; without a GPU copies in fp32 would be made in their place."""
    from trl.kernels import chunked_logprob

    with contextlib.ExitStack() as stack:
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):  # the last is one product on a GPU
            stack.enter_context(patched(chunked_logprob, name, lambda *args, **kwargs: None, of="tiles"))
        yield


@contextlib.contextmanager
def _slabs(liger: bool) -> Iterator[None]:
    """All slabs of the head's gradient after the second allocate what that does.

    Liger too sums the whole gradient in fp32, and rounds it: for it `words` is None.
    """
    from lisa_dist.loss.chunked import LogProbsInSlabs as Ours

    words, slabs = Ours.words, Ours.slabs
    Ours.words, Ours.slabs = None if liger else words, 2
    try:
        yield
    finally:
        Ours.words, Ours.slabs = words, slabs


# Of the model's own modules


@contextlib.contextmanager
def _made_whole(module: Any) -> Iterator[None]:
    """A linear module whose matrix is in fewer bits, and made whole in each pass: a fake tensor has no codes."""
    module.lisa_held = _Whole(module)
    try:
        with patched(module, "forward", functools.partial(held_forward, module), of="held_matrix"):
            yield
    finally:
        del module.lisa_held


class _Whole:
    """A matrix that is held in fewer bits, as a trace sees it."""

    in_fp32 = False

    def __init__(self, module: Any):
        self._weight = module.weight

    def whole(self) -> torch.Tensor:
        """The memory that it takes then."""
        return torch.empty_like(self._weight.detach())


def _look_up(embedding: Any, tokens: torch.Tensor) -> torch.Tensor:
    """An embedding's `forward`: its gradient is of the rows that occur, which depend on values."""
    leaf = torch.zeros((), requires_grad=True)
    return _LookUp.apply(leaf, embedding.weight.detach(), tokens)


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


@contextlib.contextmanager
def without_liger() -> Iterator[None]:
    """Names of `transformers.models.*.modeling_*` and `torch.nn.functional.cross_entropy` that Liger has replaced.

    What it replaces applies to all models of a type. A Triton kernel is launched with the address of a fake tensor, 0,
    a null pointer: on a GPU that ends the process.
    """
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.models.") and ".modeling_" in name:
                for key in [key for key, value in vars(module).items() if _is_from_liger(value)]:
                    stack.enter_context(patched(module, key, _originals(name)[key], of="traced_liger"))
        if _is_from_liger(torch.nn.functional.cross_entropy):
            stack.enter_context(patched(torch.nn.functional, "cross_entropy", _cross_entropy, of="traced_liger"))
        yield


def _is_from_liger(value: object) -> bool:
    return str(getattr(value, "__module__", "")).startswith("liger_kernel.")


@functools.cache
def _originals(name: str) -> dict[str, Any]:
    """The names of a modeling module, from a second run of its code that replaces nothing."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)
