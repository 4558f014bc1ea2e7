"""What each decoder layer is worth, learned while it trains, for the sampler "adaptive"; numbers alone.

A layer is looked at when its period ends, by the norm of its gradients, which the optimizer has anyway. The paper
samples uniformly and leaves importance to later work; norms of gradients by layer, averaged over visits and made
probabilities by a softmax that is mixed with the uniform, are what GRASS and MISA go by.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.optim.moments import mean_squared_norm
from lisa_dist.optim.states import PartitionKey
from lisa_dist.zero.partitions import ZeroPartitions

DECAY = 0.5  # the share that the past keeps at each visit
TEMPERATURE = 1.0  # of the softmax over averages whose mean is 1
FLOOR = 0.2  # the part of the probability that is spread evenly


class LayerImportance:
    """Averages of what was observed of each layer, and the sampling weights that follow from them.

    A layer's average is exponential over its visits. Averages are divided by their mean over the layers seen, so the
    temperature has no unit; a layer that was never seen counts as the highest that was, so that each is looked at soon.
    """

    def __init__(self, num_layers: int):
        assert num_layers > 0
        self.averages: list[float | None] = [None] * num_layers

    def observe(self, seen: Mapping[int, float]) -> None:
        """Take in what the period's layers showed; a value that is not finite says nothing."""
        for layer, value in seen.items():
            if math.isfinite(value):
                past = self.averages[layer]
                self.averages[layer] = value if past is None else DECAY * past + (1 - DECAY) * value

    def weights(self) -> list[float]:
        """Weights of the layers, which add up to 1: a part of it evenly, the rest by a softmax.

        No power is below a millionth of the highest, so that there are always layers enough to sample.
        """
        count, known = len(self.averages), [value for value in self.averages if value is not None]
        mean = sum(known) / len(known) if known else 0.0
        if mean <= 0:
            return [1 / count] * count
        scores = [(max(known) if value is None else value) / mean / TEMPERATURE for value in self.averages]
        powers = [max(math.exp(score - max(scores)), 1e-6) for score in scores]
        return [FLOOR / count + (1 - FLOOR) * power / sum(powers) for power in powers]

    def state_dict(self) -> list[float | None]:
        """The averages, as JSON has them."""
        return list(self.averages)

    def load_state_dict(self, averages: Sequence[float | None]) -> None:
        """Go on with saved averages, of as many layers."""
        assert len(averages) == len(self.averages)
        self.averages = list(averages)


def observe_layers(
    importance: LayerImportance,
    layers: Sequence[int],
    partitions: ZeroPartitions,
    layer_of: Callable[[PartitionKey], int | None],
) -> None:
    """Have `importance` observe the layers whose period ends: the same numbers on all ranks, rank 0's. All ranks call.

    By the root mean square of each layer's gradient norm since its moments began; NaN before that. Gradients count as
    the optimizer has them, which is clipped. 8 bytes a layer are summed, and broadcast.
    """
    get_accelerator().synchronize()
    pieces, beta2 = partitions.pieces(), partitions.optimizer.param_groups[0]["betas"][1]
    squares = torch.zeros(len(layers), dtype=torch.float64, device=partitions.engine.device)
    for key, state in partitions.states().items():
        layer = layer_of(key)
        if layer in layers:
            squares[layers.index(layer)] += mean_squared_norm(state, pieces[key], beta2)
    dist.all_reduce(squares)
    norms = squares.sqrt()
    dist.broadcast(norms, src=0)
    importance.observe(dict(zip(layers, norms.tolist(), strict=True)))
