"""Norms of the gradients of layers, over the steps that have been taken, from what the optimizer keeps of them."""

from collections.abc import Callable, Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.optimizer import mean_squared_norm
from lisa_dist.states import PartitionKey
from lisa_dist.zero import ZeroPartitions


def gradient_norms(
    partitions: ZeroPartitions, layers: Sequence[int], layer_of: Callable[[PartitionKey], int | None]
) -> list[float]:
    """Of each layer, all active, the root mean square of its gradient's norm since its moments began.

    All ranks call it, and 8 bytes a layer are summed. Gradients count as the optimizer has them, which is clipped.
    """
    get_accelerator().synchronize()
    pieces, beta2 = partitions.pieces(), partitions.optimizer.param_groups[0]["betas"][1]
    squares = torch.zeros(len(layers), dtype=torch.float64, device=partitions.engine.device)
    for key, state in partitions.states().items():
        if layer_of(key) in layers:
            squares[layers.index(layer_of(key))] += mean_squared_norm(state, pieces[key], beta2)
    dist.all_reduce(squares)
    return squares.sqrt().tolist()
