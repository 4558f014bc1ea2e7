"""TRL's loss in chunks: the head's gradient in chunks of its rows, and torch's kernels where Triton cannot compile.

TRL sums the gradient of a head [vocabulary, size] in fp32 and rounds it to the weights' precision at the end: for
weights in bf16 that is three times the gradient's bytes at once (128,256 by 4,096: 2 GiB and 1 GiB). Here it is rounded
chunk by chunk, the same sums. Hidden states [tokens, size] have two more copies in fp32 meanwhile, so chunks are for
fewer tokens than two thirds of the vocabulary.
"""

from types import SimpleNamespace
from typing import Any

import torch
from trl.kernels import chunked_logprob
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils

from lisa_dist.optim.ops import why_no_compiler
from lisa_dist.patches import patch
from lisa_dist.zero.parameters import rows_of


class LogProbsInChunks(ChunkedLogProbFunction):
    """TRL's log-probabilities; of weights below fp32 the gradient is computed by chunks, where that takes less."""

    rows: int | None = 2048  # of a chunk; None: all at once, as TRL does
    chunks: int | None = None  # that are computed: all; a step that is only traced does with the first

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """TRL's gradients of hidden states [tokens, size], weight [vocabulary, size] and bias, in chunks."""
        saved = ctx.saved_tensors  # once: what offloads activations gives each but once
        hidden, weight, bias, targets, *statistics = saved
        rows, needed = LogProbsInChunks.rows, ctx.needs_input_grad

        def gradients_of(tensors: tuple[Any, ...], **changes: Any) -> tuple[Any, ...]:
            context = vars(ctx) | {"saved_tensors": tensors, "needs_input_grad": needed} | changes
            computed: tuple[Any, ...] = ChunkedLogProbFunction.backward(SimpleNamespace(**context), *gradients)
            return computed

        with utils.maybe_gather_lm_head_ctx(weight, bias):
            is_smaller = 3 * len(hidden) < 2 * len(weight)
            if rows is None or weight.dtype == torch.float32 or not needed[1] or not is_smaller:
                return gradients_of(saved)
            # TRL rounds what it returns to the precision of what it is given, and chunks are to be summed in fp32.
            exact = hidden.float()
            of_hidden = torch.zeros_like(exact) if needed[0] else None
            of_weight = torch.empty_like(weight)
            of_bias = torch.empty_like(bias) if needed[2] else None
            for start in range(0, len(weight), rows)[: LogProbsInChunks.chunks]:
                chunk = slice(start, start + rows)
                in_chunk = rows_of(weight, chunk), None if bias is None else rows_of(bias, chunk), targets - start
                found = gradients_of((exact, *in_chunk, *statistics), chunk_size=rows)
                of_weight[chunk] = found[1]
                if of_hidden is not None:
                    of_hidden += found[0]
                if of_bias is not None:
                    of_bias[chunk] = found[2]
        of_hidden = None if of_hidden is None else of_hidden.to(hidden.dtype)
        return of_hidden, of_weight, of_bias, *(None,) * (len(needed) - 3)


def use_chunks() -> None:
    """Have the fused heads that TRL gives to models compute the head's gradient by chunks, from now on."""
    patch(utils, "_ChunkedLogProbFunction", LogProbsInChunks, of="head_gradient")


def choose_loss_kernels() -> str | None:
    """Have TRL compute its loss in torch where Triton has no C compiler; why, for the header, or None."""
    if not torch.cuda.is_available() or not (missing := why_no_compiler()):
        return None
    patch(chunked_logprob, "_TRITON_AVAILABLE", False, of="no_compiler")
    return f"torch, slower than Triton ({missing})"
