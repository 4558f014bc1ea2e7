"""What is replaced while a step is traced: code that fake tensors cannot run, or that a run replaces by its own.

Each says what it replaces, why, and when it can go. All are of names outside this package, and are put back after the
trace.
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
            stack.enter_context(_replaced(embedding, forward=functools.partial(_look_up, embedding)))
        stack.enter_context(_experts_of_any_dtype())
        stack.enter_context(_no_mask(padded))
        if fused and triton:
            stack.enter_context(_tiles())
        if fused:
            stack.enter_context(_slabs(liger))
        yield


@contextlib.contextmanager
def _replaced(of: Any, **names: Any) -> Iterator[None]:
    """Attributes of a module, a class or an object have other values; those that it had none of it loses again."""
    before = {name: vars(of)[name] for name in names if name in vars(of)}
    for name, value in names.items():
        setattr(of, name, value)
    try:
        yield
    finally:
        for name in names:
            if name in before:
                setattr(of, name, before[name])
            else:
                delattr(of, name)


def _experts_of_any_dtype() -> contextlib.AbstractContextManager[None]:
    """`transformers.integrations.moe._can_use_grouped_mm`: torch's product of groups is for fake tensors in bf16 alone.

    Transformers' own way has the same shapes. It can go when `torch._grouped_mm` has a meta kernel for all precisions.
    """
    original = moe._can_use_grouped_mm

    def can_use(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and original(input, weight, offs)

    return _replaced(moe, _can_use_grouped_mm=can_use)


def _no_mask(padded: bool) -> contextlib.AbstractContextManager[None]:
    """`transformers.masking_utils.find_packed_sequence_indices`: it asks for values, and fake tensors have none.

    Without padding SDPA gets a mask only where examples are packed. It can go when the mask is given by argument.
    """
    if padded:
        return contextlib.nullcontext()
    return _replaced(masking_utils, find_packed_sequence_indices=lambda position_ids: None)


def _tiles() -> contextlib.AbstractContextManager[None]:
    """Three functions of `trl.kernels.chunked_logprob`: its Triton kernels, which take a tile as it is.

    They do not run without a GPU, where copies in fp32 are made. It can go when a trace runs on a GPU.
    """
    from trl.kernels import chunked_logprob

    names = ("_forward_tile", "_backward_tile", "_addmm_fp32")  # the last is one product on a GPU
    return _replaced(chunked_logprob, **dict.fromkeys(names, lambda *args, **kwargs: None))


def _slabs(liger: bool) -> contextlib.AbstractContextManager[None]:
    """`LogProbsInSlabs.slabs`, ours: all slabs of the head's gradient after the second allocate what that does.

    Liger too sums the whole gradient in fp32, and rounds it: for it `words` is None. It goes with the slabs.
    """
    from lisa_dist.loss.chunked import LogProbsInSlabs

    return _replaced(LogProbsInSlabs, slabs=2, **({"words": None} if liger else {}))


# Of the model's own modules


def _made_whole(module: Any) -> contextlib.AbstractContextManager[None]:
    """A linear module's `forward`: its matrix is in fewer bits, and made whole in each pass.

    A fake tensor has no codes. It can go when `core/frozen_layers.py` quantizes tensors without data.
    """
    return _replaced(module, lisa_held=_Whole(module), forward=functools.partial(held_forward, module))


class _Whole:
    """A matrix that is held in fewer bits, as a trace sees it."""

    in_fp32 = False

    def __init__(self, module: Any):
        self._weight = module.weight

    def whole(self) -> torch.Tensor:
        """The memory that it takes then."""
        return torch.empty_like(self._weight.detach())


def _look_up(embedding: Any, tokens: torch.Tensor) -> torch.Tensor:
    """An embedding's `forward`: its gradient is of the rows that occur, which depend on values.

    It can go when `zero/embedding_rows.py` does.
    """
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
    a null pointer: on a GPU that ends the process. It can go when Liger replaces names of one model alone.
    """
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.models.") and ".modeling_" in name:
                names = [key for key, value in vars(module).items() if _is_from_liger(value)]
                if names:
                    stack.enter_context(_replaced(module, **{key: _originals(name)[key] for key in names}))
        if _is_from_liger(torch.nn.functional.cross_entropy):
            stack.enter_context(_replaced(torch.nn.functional, cross_entropy=_cross_entropy))
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
