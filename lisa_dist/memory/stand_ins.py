"""What is replaced while a step is traced: code that fake tensors cannot run, or that a run replaces by its own.

`patches.py` has what is replaced, why, and when it can go. All of it is put back after the trace.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import masking_utils
from transformers.integrations import moe

from lisa_dist.config_rules import Form
from lisa_dist.core import fp8_product
from lisa_dist.core.fp8_product import takes_fp8
from lisa_dist.core.frozen_forward import WholeTensors, frozen_forward
from lisa_dist.core.matrices import Matrix
from lisa_dist.memory.workload import LIGER, OF_TRL, Workload
from lisa_dist.patches import patched

_IN_FLIGHT, _SMALL = 5, 1024  # of TRL's OffloadActivations: tensors, bytes
_cross_entropy = torch.nn.functional.cross_entropy  # before Liger can have replaced it


@contextlib.contextmanager
def stand_ins(workload: Workload, quantized: Sequence[Matrix]) -> Iterator[None]:
    """All of them, in a step of this workload whose matrices `quantized` are in fewer bits."""
    with contextlib.ExitStack() as stack:
        _make_whole(stack, quantized, workload.frozen_bits)
        stack.enter_context(_experts_of_any_dtype())
        if not workload.padded or workload.sequence_parallel > 1:  # SDPA gets a mask only where examples are packed
            not_packed = patched(masking_utils, "find_packed_sequence_indices", lambda _: None, of="packed_mask")
            stack.enter_context(not_packed)
        if workload.loss in OF_TRL:
            if workload.triton:  # whose kernels take a tile as it is; else copies in fp32 would be made in their place
                from trl.kernels import chunked_logprob

                for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):  # the last is one product on a GPU
                    stack.enter_context(patched(chunked_logprob, name, lambda *args, **kwargs: None, of="tiles"))
            stack.enter_context(_chunks(workload.loss == LIGER))
        yield


@contextlib.contextmanager
def offloaded_activations(workload: Workload, hidden_size: int) -> Iterator[None]:
    """What TRL's `activation_offloading` leaves on the device: parameters, what is small, and the last few tensors.

    Those before the last one are in one of their size, the same in every layer, as layers that repeat are not run.
    """
    last = [torch.empty(_IN_FLIGHT - 1, workload.tokens, hidden_size, dtype=workload.dtype), torch.empty(0)]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, torch.nn.Parameter) or tensor.nbytes < _SMALL:
            return tensor
        last[1:] = [tensor]
        return tensor.to("meta")

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        last.clear()
        return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _make_whole(stack: contextlib.ExitStack, quantized: Sequence[Matrix], bits: Form) -> None:
    """Weights in fewer bits, dequantized in each pass, or of 16 in a buffer: a fake tensor has no codes."""
    tensors = WholeTensors()
    for matrix in quantized:
        forward = frozen_forward(matrix, tensors)
        if not forward.weights:
            stack.callback(forward.remove)
        weight = matrix.parameter.detach()
        whole = weight.detach if bits == 16 else functools.partial(torch.empty_like, weight)
        fp8 = functools.partial(_fp8_rows, weight) if bits == "fp8" and takes_fp8(weight.shape) else tuple
        forward.weights[matrix.attribute] = SimpleNamespace(whole=whole, fp8=fp8)
    stack.enter_context(patched(fp8_product, "fp8_rows", _fp8_rows, of="traced_fp8"))


def _fp8_rows(values: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What Triton's kernel allocates; torch's has rows in fp32 besides."""
    scales = torch.empty(*values.shape[:-1], 1, device=values.device)
    return torch.empty_like(values, dtype=torch.float8_e4m3fn), scales


def _experts_of_any_dtype() -> contextlib.AbstractContextManager[None]:
    """Torch's product of groups for bf16 alone: else transformers' own way, which has the same shapes."""
    original = moe._can_use_grouped_mm

    def can_use(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and original(input, weight, offs)

    return patched(moe, "_can_use_grouped_mm", can_use, of="grouped_experts")


@contextlib.contextmanager
def _chunks(liger: bool) -> Iterator[None]:
    """All chunks of the head's gradient after the second allocate what that does.

    Liger too sums the whole gradient in fp32, and rounds it: for it `rows` is None.
    """
    from lisa_dist.loss.chunked import LogProbsInChunks as Ours

    rows, chunks = Ours.rows, Ours.chunks
    Ours.rows, Ours.chunks = None if liger else rows, 2
    try:
        yield
    finally:
        Ours.rows, Ours.chunks = rows, chunks


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
