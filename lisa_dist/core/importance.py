"""What each decoder layer is worth, learned while it trains, for the sampler "adaptive"; numbers alone.

A layer is looked at when its period ends, by the norm of its gradients or of its update, which the optimizer and the
log have anyway. The paper samples uniformly and leaves importance to later work; norms of gradients by layer, averaged
over visits and made probabilities by a softmax that is mixed with the uniform, are what GRASS and MISA go by.
"""

import math
from collections.abc import Mapping, Sequence


class LayerImportance:
    """Averages of what was seen of each layer, and the weights to draw by that follow from them.

    A layer's average is exponential over its visits: `decay` is the share that the past keeps at each. Averages are
    divided by their mean over the layers seen, so `temperature` has no unit; a layer that was never seen counts as the
    highest that was, so that each is looked at soon.
    """

    def __init__(self, num_layers: int, decay: float, temperature: float, floor: float):
        assert num_layers > 0
        self.averages: list[float | None] = [None] * num_layers
        self._decay, self._temperature, self._floor = decay, temperature, floor

    def observe(self, seen: Mapping[int, float]) -> None:
        """Take in what the period's layers showed; a value that is not finite says nothing."""
        for layer, value in seen.items():
            if math.isfinite(value):
                past = self.averages[layer]
                self.averages[layer] = value if past is None else self._decay * past + (1 - self._decay) * value

    def weights(self) -> list[float]:
        """Weights of the layers, which add up to 1: `floor` of it spread evenly, the rest by a softmax."""
        num_layers = len(self.averages)
        known = [value for value in self.averages if value is not None]
        mean = sum(known) / len(known) if known else 0.0
        if mean <= 0:
            return [1 / num_layers] * num_layers
        scores = [(max(known) if value is None else value) / mean / self._temperature for value in self.averages]
        # Not below a millionth, so that there are always layers enough to draw, however sharp the softmax is.
        powers = [max(math.exp(score - max(scores)), 1e-6) for score in scores]
        return [self._floor / num_layers + (1 - self._floor) * power / sum(powers) for power in powers]

    def state_dict(self) -> list[float | None]:
        """The averages, as JSON has them."""
        return list(self.averages)

    def load_state_dict(self, averages: Sequence[float | None]) -> None:
        """Go on with saved averages, of as many layers."""
        assert len(averages) == len(self.averages)
        self.averages = list(averages)
