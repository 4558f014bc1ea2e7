"""What each decoder layer is worth, learned while it trains, for the sampler "adaptive"; numbers alone.

A layer is looked at when its period ends, by the norm of its gradients or of its update, which the optimizer and the
log have anyway. The paper samples uniformly and leaves importance to later work; norms of gradients by layer, averaged
over visits and made probabilities by a softmax that is mixed with the uniform, are what GRASS and MISA go by.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.optim.moments import mean_squared_norm
from lisa_dist.optim.states import PartitionKey
from lisa_dist.zero.partitions import ZeroPartitions


class LayerImportance:
    """Averages of what was observed of each layer, and the sampling weights that follow from them.

    A layer's average is exponential over its visits: `decay` is the share that the past keeps at each. Averages are
    divided by their mean over the layers seen, so `temperature` has no unit; a layer that was never seen counts as the
    highest that was, so that each is looked at soon. A `prior` multiplies the weights, the even part of them too.
    """

    def __init__(
        self, num_layers: int, decay: float, temperature: float, floor: float, prior: Sequence[float] | None = None
    ):
        assert num_layers > 0
        self.prior = prior
        self.averages: list[float | None] = [None] * num_layers
        self._decay, self._temperature, self._floor = decay, temperature, floor

    def observe(self, seen: Mapping[int, float]) -> None:
        """Take in what the period's layers showed; a value that is not finite says nothing."""
        for layer, value in seen.items():
            if math.isfinite(value):
                past = self.averages[layer]
                self.averages[layer] = value if past is None else self._decay * past + (1 - self._decay) * value

    def weights(self) -> list[float]:
        """Weights of the layers, which add up to 1: `floor` of it evenly, the rest by a softmax, times the prior."""
        weights = self._by_averages()
        if self.prior is None:
            return weights
        weights = [prior * weight for prior, weight in zip(self.prior, weights, strict=True)]
        return [weight / sum(weights) for weight in weights]

    def _by_averages(self) -> list[float]:
        known = [value for value in self.averages if value is not None]
        mean = sum(known) / len(known) if known else 0.0
        if mean <= 0:
            return [1 / len(self.averages)] * len(self.averages)
        scores = [(max(known) if value is None else value) / mean / self._temperature for value in self.averages]
        return weights_of_scores(scores, self._floor)

    def state_dict(self) -> list[float | None]:
        """The averages, as JSON has them."""
        return list(self.averages)

    def load_state_dict(self, averages: Sequence[float | None]) -> None:
        """Go on with saved averages, of as many layers."""
        assert len(averages) == len(self.averages)
        self.averages = list(averages)


def weights_of_scores(scores: Sequence[float], floor: float) -> list[float]:
    """Weights that add up to 1: `floor` of it evenly, the rest by a softmax of scores.

    No power is below a millionth of the highest, so that there are always layers enough to sample.
    """
    powers = [max(math.exp(score - max(scores)), 1e-6) for score in scores]
    return [floor / len(scores) + (1 - floor) * power / sum(powers) for power in powers]


def observe_layers(
    importance: LayerImportance,
    layers: Mapping[int, str],
    partitions: ZeroPartitions,
    layer_of: Callable[[PartitionKey], int | None],
    updates: Mapping[str, float] | None = None,
) -> None:
    """Have `importance` observe the layers whose period ends: the same numbers on all ranks, rank 0's. All ranks call.

    `layers` are their numbers, with the names of their blocks. By the norms of their gradients, or by `updates`, the
    norms of what the period added to each block's weights, which rank 0 alone needs to have.
    """
    if updates is None:
        norms = gradient_norms(partitions, list(layers), layer_of)
    else:
        norms = [updates.get(name) or math.nan for name in layers.values()]  # 0 where every step was skipped
    message = torch.tensor(norms, dtype=torch.float64, device=partitions.engine.device)
    dist.broadcast(message, src=0)
    importance.observe(dict(zip(layers, message.tolist(), strict=True)))


def gradient_norms(
    partitions: ZeroPartitions, layers: Sequence[int], layer_of: Callable[[PartitionKey], int | None]
) -> list[float]:
    """Of each layer, all active, the root mean square of its gradient's norm since its moments began; NaN before that.

    All ranks call it, and 8 bytes a layer are summed. Gradients count as the optimizer has them, which is clipped.
    """
    get_accelerator().synchronize()
    pieces, beta2 = partitions.pieces(), partitions.optimizer.param_groups[0]["betas"][1]
    squares = torch.zeros(len(layers), dtype=torch.float64, device=partitions.engine.device)
    for key, state in partitions.states().items():
        layer = layer_of(key)
        if layer in layers:
            squares[layers.index(layer)] += mean_squared_norm(state, pieces[key], beta2)
    dist.all_reduce(squares)
    return squares.sqrt().tolist()
