"""What the adaptive sampler learns when a period ends: norms of gradients, from AdamW's moments, or of updates."""

import math
from collections.abc import Callable, Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.optim.build import mean_squared_norm
from lisa_dist.optim.states import PartitionKey
from lisa_dist.zero.partitions import ZeroPartitions


def observe_layers(lisa) -> None:
    """Take in what the layers have shown whose period ends: the same numbers on all ranks, rank 0's. All ranks call it.

    `lisa` is an attached controller, which has just looked at the movement of the weights.
    """
    importance, layers = lisa.selection.importance, lisa.active_layers
    if importance is None:
        return
    if lisa.config.lisa_importance == "gradient":
        norms = gradient_norms(lisa.partitions, layers, lisa.selection.layer_of)
    else:  # which rank 0 alone has
        moved = lisa.movement.lines[-1]["blocks"] if lisa.movement.lines else {}
        norms = [moved.get(f"layers.{layer}", {}).get("update", math.nan) for layer in layers]
    norms = torch.tensor(norms, dtype=torch.float64, device=lisa.engine.device)
    dist.broadcast(norms, src=0)
    importance.observe(dict(zip(layers, norms.tolist(), strict=True)))


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
