"""Which layers train in a period: pure functions of (seed, period, weights).

They know no rank, no state and no random generator of a library: every draw is read from SHA-256, so the same seed and
period give the same layers on any rank, machine, world size and Python version.

A later sampler that learns its weights needs nothing new here: it hands its current weights to `sample_layers` as
"weighted" does, and keeps them in its own state.

Source: Algorithm 1, line 3 (uniform). Weighted draws without replacement: Efraimidis and Spirakis, "Weighted random
sampling with a reservoir", 2006.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from lisa_dist.config import UserError


def sample_layers(
    sampler: str,
    num_layers: int,
    num_active: int,
    seed: int,
    period: int,
    weights: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """The layers that train in `period`, ascending; exactly `num_active` of range(`num_layers`).

    `weights` (one non-negative number a layer) counts for the sampler "weighted" alone.
    """
    assert 1 <= num_active <= num_layers
    assert period >= 0
    if sampler == "uniform":
        chosen = _random_order(seed, period, num_layers)[:num_active]
    elif sampler == "fixed":
        chosen = _random_order(seed, 0, num_layers)[:num_active]
    elif sampler == "cyclic":
        chosen = [(period * num_active + slot) % num_layers for slot in range(num_active)]
    elif sampler == "reshuffle":
        chosen = _reshuffled(seed, period, num_layers, num_active)
    elif sampler == "weighted":
        chosen = _random_order(seed, period, num_layers, weights)[:num_active]
    else:
        raise UserError(f"unknown sampler {sampler!r}")
    return tuple(sorted(chosen))


def load_layer_weights(path: str, num_layers: int, num_active: int) -> list[float]:
    """Read the JSON list of layer weights and check it against the model.

    Raises ValueError, naming the file and the rule, when it is missing, not a list of numbers, of another length,
    negative, not finite, or has fewer positive weights than layers must be drawn.
    """
    flag = f"--lisa_weights_file {path}"
    try:
        weights = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{flag}: is not JSON ({error}).") from error
    numbers = isinstance(weights, list) and all(type(weight) in (int, float) for weight in weights)
    if not numbers:
        raise UserError(f"{flag}: must hold a JSON list of numbers, such as [1, 0.5, 2].")
    if len(weights) != num_layers:
        raise UserError(f"{flag}: holds {len(weights)} weights, but the model has {num_layers} decoder layers.")
    for layer, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"{flag}: the weight of layer {layer} is {weight}; weights are finite and not negative.")
    positive = sum(weight > 0 for weight in weights)
    if positive < num_active:
        raise UserError(
            f"{flag}: only {positive} weights are positive, but --lisa_activated_layers {num_active} layers are drawn."
        )
    return [float(weight) for weight in weights]


def _uniform(seed: int, stream: int, layer: int) -> float:
    """A number in (0, 1), the same wherever it is computed."""
    digest = hashlib.sha256(f"lisa:{seed}:{stream}:{layer}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") + 0.5) / 2**64


def _random_order(seed: int, stream: int, num_layers: int, weights: Sequence[float] | None = None) -> list[int]:
    """All layers in random order; the first n of them are a draw of n without replacement.

    Each layer waits an exponential time whose rate is its weight, and the order is that of arrival. With equal weights
    it is a uniform permutation.
    """

    def arrival(layer: int) -> float:
        rate = 1.0 if weights is None else weights[layer]
        return math.inf if rate == 0 else -math.log(_uniform(seed, stream, layer)) / rate

    return sorted(range(num_layers), key=lambda layer: (arrival(layer), layer))


def _reshuffled(seed: int, period: int, num_layers: int, num_active: int) -> list[int]:
    """Draw `period` of a sequence of permutations laid end to end: every layer comes once before any comes twice.

    A draw may straddle two permutations. The layers left over from the first then must not come up again at once, so
    the second permutation has them moved behind its part of that draw.
    """
    drawn: list[int] = []
    needed = (period + 1) * num_active
    epoch = 0
    while len(drawn) < needed:
        order = _random_order(seed, epoch, num_layers)
        left_over = len(drawn) % num_active
        if left_over:
            pending = set(drawn[-left_over:])
            fresh = [layer for layer in order if layer not in pending]
            head = fresh[: num_active - left_over]
            order = head + [layer for layer in order if layer not in head]
        drawn += order
        epoch += 1
    return drawn[period * num_active : needed]
