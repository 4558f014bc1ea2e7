"""Norms and transfers of gradients: in chunks, and with one collective, where DeepSpeed copies whole gradients.

The embedding's gradient is the largest tensor of a step. A copy of it in fp64, which DeepSpeed makes to take its norm,
is 4 GiB for Llama-3.1-8B on one GPU: more than anything else of a step. On CPU norms are in fp64, as DeepSpeed's are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from lisa_dist.optim.row_gradient import RowGradient
from lisa_dist.zero.stages import Stage

NORM_CHUNK = 1 << 22  # elements of a gradient whose norm is taken at once: 32 MiB in fp64
CPU_NORM_CHUNK = 1 << 16  # the same on a CPU, whose cache holds it in fp64: written and read there


def norms_with_one_collective(zero: Any, stage: Stage) -> dict[str, Callable[..., Any]]:
    """Replace the norms of all groups, without optimizer offload: one all-reduce, and one wait of the host.

    DeepSpeed has an all-reduce for each group, and LISA has two groups for every block that trains. The norms are on
    the host: what DeepSpeed, a clipped step and a trainer's log ask of them asks the device for nothing more.
    """
    on_gpu = torch.device(zero.device).type == "cuda"
    sums_of_squares = sums_of_squares_in_fp32 if on_gpu else sums_of_squares_in_chunks

    def norms_of_groups() -> list[torch.Tensor]:
        groups = [zero.averaged_gradients[index] for index in range(len(stage.groups(zero)))]
        sums = sums_of_squares(
            [[one.rows if isinstance(one, RowGradient) else one for one in group] for group in groups]
        )
        sums = sums.to(zero.device) if stage.is_stage_3 else sums.to(zero.device, torch.float)
        torch.distributed.all_reduce(sums, group=zero.dp_process_group)
        return list(sums.pow(0.5).cpu())

    def scaled_global_norm() -> torch.Tensor:
        norm = torch.linalg.vector_norm(torch.stack(norms_of_groups()))
        return norm if norm.isfinite() else torch.full_like(norm, math.inf)

    def has_overflow(partition_gradients: bool = True) -> bool:
        # Where DeepSpeed takes the norm it does so right after this, and leaves a step out whose norm is not finite.
        takes_norm = getattr(zero, "compute_grad_norm", True)
        return not (takes_norm or torch.stack(norms_of_groups()).isfinite().all())

    if stage.is_stage_3:
        return {"has_overflow": has_overflow, "_get_norm_groups": norms_of_groups}
    return {"has_overflow": has_overflow, "scaled_global_norm": scaled_global_norm}


def sums_of_squares_in_fp32(groups: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """The sum of squares of each group, fp64: every gradient is read once, where a copy in fp64 costs 9 times as much.

    Norms of single gradients are in fp32, as GPUs add bf16 up: their relative error is some 1e-6.
    """
    gradients = [gradient for group in groups for gradient in group]
    if not gradients:  # of a rank that has no piece of what trains
        return torch.zeros(len(groups), dtype=torch.double)
    squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float)).double().pow(2)
    return torch.stack([of_group.sum() for of_group in squares.split([len(group) for group in groups])])


def sums_of_squares_in_chunks(groups: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """The same with norms in fp64 of chunks that are copied one after the other: DeepSpeed's bits within a chunk."""
    largest = max((one.numel() for group in groups for one in group), default=0)
    # One for all chunks: on CPU the pages of a new one for each take longer than everything else here.
    buffer = torch.empty(min(largest, CPU_NORM_CHUNK), dtype=torch.double)

    def sum_of_squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        chunks = (chunk for gradient in gradients for chunk in gradient.flatten().split(CPU_NORM_CHUNK))
        copies = (buffer[: len(chunk)].copy_(chunk) for chunk in chunks)
        norms = [torch.linalg.vector_norm(copy) for copy in copies]
        return torch.stack(norms).pow(2).sum() if norms else buffer.new_zeros(())

    return torch.stack([sum_of_squares(group) for group in groups])


def kept_by_themselves(zero: Any) -> Callable[..., None]:
    """A replacement for `copy_grads_in_partition` of stages 1 and 2: where gradients of this rank's partition are kept.

    DeepSpeed has one buffer for all of them, whole as soon as the first has been reduced, to which one that is larger
    than the bucket is copied beside itself. Here such a gradient stays where it is, and one in the bucket is copied out
    of it: there is memory for those that have arrived, and it goes as their groups step.
    """

    def keep(param: torch.nn.Parameter, *_: Any) -> None:
        if param.numel() <= zero.reduce_bucket_size:
            gradient = zero.get_gradient_for_reduction(param)
            gradient.data = gradient.data.clone()

    return keep


def kept_until_reduced(zero: Any) -> Callable[..., None]:
    """A replacement for `average_tensor` of stages 1 and 2: what is reduced keeps its memory until that is done.

    With overlap_comm a gradient larger than the bucket is divided, copied and reduced on a stream of its own, while a
    rank that keeps none of it lets it go. Its memory would be given out again, and written, before that is done.
    """

    def average(tensor: torch.Tensor, *args: Any) -> None:
        if zero.overlap_comm and not get_accelerator().resolves_data_dependency():
            tensor.record_stream(zero.reduction_stream)
        type(zero).average_tensor(zero, tensor, *args)

    return average


def kept_on_one_rank(zero: Any) -> dict[str, Any]:
    """Replace the reduction of stages 1 and 2 where a rank is alone: a gradient stays where it is.

    DeepSpeed copies it to the bucket or, where it is larger, to itself, and divides it by 1.
    """

    def keep(param: torch.nn.Parameter, group_index: int) -> None:
        if param.numel() and getattr(param, "ds_grad_is_ready", True):
            key = zero.get_param_id(param)
            assert not zero.params_already_reduced[key], "a gradient is computed twice"
            zero.params_already_reduced[key] = True

    return {"reduce_independent_p_g_buckets_and_remove_grads": keep}


def sent_in_chunks(zero: Any) -> dict[str, Callable[..., Any]]:
    """Replace how gradients go to the host under optimizer offload on stages 1 and 2: chunk by chunk, with its norm.

    In the middle of the backward pass DeepSpeed makes a copy in fp64 for the norm and one in fp32 to send, each of the
    whole gradient.
    """

    def norm_by_chunks(param: torch.nn.Parameter) -> None:
        key, squares = zero.get_param_id(param), []
        for _ in _chunks_of_gradient(zero, key):
            type(zero).set_norm_for_param_grad_in_gpu(zero, param)
            squares.append(zero.norm_for_param_grads[key] ** 2)
        zero.norm_for_param_grads[key] = sum(squares) ** 0.5

    def copy_by_chunks(param: torch.nn.Parameter) -> None:
        attribute = "grad_accum" if zero.use_grad_accum_attribute else "grad"
        gradient = getattr(param, attribute)
        for _ in _chunks_of_gradient(zero, zero.get_param_id(param)):
            setattr(param, attribute, gradient)  # DeepSpeed sets it to None after each copy
            type(zero).async_inplace_copy_grad_to_fp32_buffer_from_gpu(zero, param)

    return {
        "set_norm_for_param_grad_in_gpu": norm_by_chunks,
        "async_inplace_copy_grad_to_fp32_buffer_from_gpu": copy_by_chunks,
    }


def _chunks_of_gradient(zero: Any, key: int) -> Iterator[None]:
    """Set `grad_position`, from where to where this rank's part of a gradient is copied, to one chunk after another."""
    group, source, target, numel = position = zero.grad_position[key]
    for begins in range(0, numel, NORM_CHUNK):
        zero.grad_position[key] = [group, source + begins, target + begins, min(NORM_CHUNK, numel - begins)]
        yield
    zero.grad_position[key] = position
