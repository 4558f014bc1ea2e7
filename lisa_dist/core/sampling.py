"""Which blocks train in a period: pure functions of (seed, period, weights).

They know no rank, no state and no random generator of a library: every number is read from SHA-256, so the same seed
and period give the same layers on any rank, machine, world size and Python version.

The sampler "adaptive" gives `sample_period` its current weights, as "weighted" does; importance.py has its state.

Source: Algorithm 1, line 3 (uniform). Weighted sampling without replacement: Efraimidis and Spirakis, "Weighted random
sampling with a reservoir", 2006. Visits at given rates, each in a time window of its own: Baruah et al., "Proportionate
progress: a notion of fairness in resource allocation", 1996.
"""

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy

from lisa_dist.errors import UserError


@dataclass(frozen=True)
class SampledBlock:
    """An outer block (embed, head, rest) that is sampled as layers are, instead of being always trained.

    `probability` is that of a period to train it. It then takes the place of `places` layers in that period: as many as
    it is layers large, so that a period's memory does not grow by it.
    """

    name: str
    probability: float
    places: int


@dataclass(frozen=True)
class ActiveSet:
    """What trains in a period besides the always-trained blocks: layers, ascending, and at most one outer block."""

    layers: tuple[int, ...]
    blocks: tuple[str, ...] = ()


def sample_period(
    sampler: str,
    num_layers: int,
    num_active: int,
    seed: int,
    period: int,
    weights: Sequence[float] | None = None,
    outer: Sequence[SampledBlock] = (),
) -> ActiveSet:
    """Sample one period: `num_active` of range(`num_layers`), less the places that a sampled outer block takes.

    `weights` (one non-negative number a layer) count for the samplers "weighted", "balanced" and "adaptive". Costs a
    hash for each earlier period where layers come in a sequence, and for "balanced" a sort: 0.2 s after 10,000 periods.
    """
    assert 0 <= num_active <= num_layers
    assert period >= 0
    assert sum(block.probability for block in outer) <= 1
    block = _sample_outer(seed, period, outer)
    count = _num_layers(block, num_active)
    counts = [count]  # of every period up to this one, where one goes on from the others
    if sampler in ("reshuffle", "balanced"):
        earlier = (_sample_outer(seed, before, outer) for before in range(period))
        counts = [*(_num_layers(taking, num_active) for taking in earlier), count]
    if sampler == "uniform":
        chosen = _random_order(seed, period, num_layers)[:count]
    elif sampler == "fixed":
        chosen = _random_order(seed, 0, num_layers)[:count]
    elif sampler == "reshuffle":
        chosen = _reshuffled(seed, counts, num_layers)
    elif sampler == "balanced":
        rates = _rates(tuple(weights or [1.0] * num_layers), num_active)
        *_, chosen = balanced_samples(seed, counts, rates)
    elif sampler in ("weighted", "adaptive"):
        chosen = _random_order(seed, period, num_layers, weights)[:count]
    else:
        raise UserError(f"unknown sampler {sampler!r}")
    return ActiveSet(tuple(sorted(chosen)), () if block is None else (block.name,))


def sample_units(
    sampler: str, sizes: Sequence[int], budget: int, seed: int, period: int, weights: Sequence[float] | None = None
) -> ActiveSet:
    """Sample one period of units of different sizes: in random order, each that still fits `budget`, their sum's bound.

    `weights` (one non-negative number a unit) are those of the sampler "adaptive". `budget` is at least the smallest
    size.
    """
    order = _random_order(seed, 0 if sampler == "fixed" else period, len(sizes), weights)
    return ActiveSet(tuple(sorted(fill(order, sizes, budget))))


def fill(order: Iterable[int], sizes: Sequence[int], budget: int) -> list[int]:
    """The units of an order that fit a budget together, each that still does; none of size 0, which is frozen."""
    chosen = []
    for unit in order:
        if 0 < sizes[unit] <= budget:
            chosen.append(unit)
            budget -= sizes[unit]
    return chosen


def _num_layers(block: SampledBlock | None, num_active: int) -> int:
    return num_active - (0 if block is None else block.places)


def inclusion_probabilities(weights: Sequence[float], num_sampled: int) -> list[float]:
    """The probability of each layer to be among `num_sampled` that are sampled by weight without replacement.

    A layer with weight w arrives after an exponential time of rate w, and the first `num_sampled` to arrive are
    sampled, so layer i is sampled where fewer than `num_sampled` others arrive before it: the integral over t of
    w_i exp(-w_i t) times that probability, a sum of independent events. They add up to `num_sampled`; no layer's is
    above 1, so where several are sampled heavy layers have less than `num_sampled` times their share of the weights.
    To about 1e-8.
    """
    highest = max(weights)
    rates = numpy.array([max(weight / highest, 1e-9) for weight in weights if weight > 0])  # less is next to never
    if num_sampled == 0:
        return [0.0] * len(weights)
    assert num_sampled <= len(rates)
    # On a logarithmic axis the integrand falls off smoothly at both ends: equal steps are as good as it gets.
    log_times = numpy.linspace(math.log(1e-12 / rates.max()), math.log(60 / rates.min()), 1200)
    scaled = rates[:, None] * numpy.exp(log_times)
    arrived = -numpy.expm1(-scaled)

    def counts(events: numpy.ndarray) -> list[numpy.ndarray]:
        """The probabilities that 0, 1, ..., num_sampled - 1 events of each prefix have happened."""
        prefixes = [numpy.eye(num_sampled, 1) * numpy.ones_like(log_times)]
        for event in events:
            last = prefixes[-1]
            prefixes.append(last * (1 - event) + numpy.vstack([numpy.zeros_like(event), last[:-1] * event]))
        return prefixes

    before, after = counts(arrived), counts(arrived[::-1])
    probabilities = []
    for layer, density in enumerate(scaled * numpy.exp(-scaled)):
        at_most = numpy.cumsum(after[len(rates) - 1 - layer], axis=0)[::-1]  # others after it in the list
        probabilities.append(float(numpy.trapezoid(density * (before[layer] * at_most).sum(axis=0), log_times)))
    of_positive = iter(probabilities)
    return [next(of_positive) if weight > 0 else 0.0 for weight in weights]


def _uniform(seed: int, stream: int | str, index: int) -> float:
    """A number in (0, 1), the same wherever it is computed."""
    digest = hashlib.sha256(f"lisa:{seed}:{stream}:{index}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") + 0.5) / 2**64


def _sample_outer(seed: int, period: int, outer: Sequence[SampledBlock]) -> SampledBlock | None:
    """The outer block of a period, if any: never two, so that their states never exist at once."""
    point = _uniform(seed, "outer", period) if outer else 0.0
    for block in outer:
        if point < block.probability:
            return block
        point -= block.probability
    return None


def _random_order(seed: int, stream: int, num_layers: int, weights: Sequence[float] | None = None) -> list[int]:
    """All layers in random order; the first n of them are a sample of n without replacement.

    Each layer waits an exponential time whose rate is its weight, and the order is that of arrival. With equal weights
    it is a uniform permutation.
    """

    def arrival(layer: int) -> float:
        rate = 1.0 if weights is None else weights[layer]
        return math.inf if rate == 0 else -math.log(_uniform(seed, stream, layer)) / rate

    return sorted(range(num_layers), key=lambda layer: (arrival(layer), layer))


def _reshuffled(seed: int, counts: Iterable[int], num_layers: int) -> list[int]:
    """The last of successive samples, of `counts` layers each, from permutations laid end to end.

    Every layer comes once before any comes twice. A sample may straddle two permutations. The layers left over from the
    first then must not come up again at once, so the second has them moved behind its part of that sample.
    """
    waiting: list[int] = []
    chosen: list[int] = []
    epoch = 0
    for count in counts:
        if len(waiting) < count:
            order = _random_order(seed, epoch, num_layers)
            epoch += 1
            head = [layer for layer in order if layer not in waiting][: count - len(waiting)]
            if waiting:
                order = head + [layer for layer in order if layer not in head]
            waiting += order
        chosen, waiting = waiting[:count], waiting[count:]
    return chosen


@functools.lru_cache(maxsize=8)
def _rates(weights: tuple[float, ...], num_active: int) -> list[float]:
    """Visits a period of each layer, by its weight."""
    return inclusion_probabilities(weights, num_active)


def balanced_samples(seed: int, counts: Iterable[int], rates: Sequence[float]) -> Iterator[list[int]]:
    """Successive samples, of `counts` layers each, in which layers come as often as their rates a period say.

    The n-th visit of a layer with rate r has a window of its own, from n / r to (n + 1) / r periods, and is due at a
    random time in it. Windows that end with this period come first, then those that have begun, in the order in which
    they are due. So at any time a layer has had its rate's visits within one and a half, within one nearly always.
    """
    total, now = sum(rates), 0.0

    def window(layer: int, visit: int) -> tuple[float, float, float, int]:
        """When a visit begins, is due, and ends; and its number."""
        due = visit + _uniform(seed, f"balanced {layer}", visit)
        return visit / rates[layer], due / rates[layer], (visit + 1) / rates[layer], visit

    windows = {layer: window(layer, 0) for layer, rate in enumerate(rates) if rate > 0}
    for count in counts:
        now += count / max(total, 1e-9)
        late, early = now + 1e-6, now - 1e-6  # rates are that exact
        order = sorted(
            (0, ends, layer) if ends <= late else (1 if begins < early else 2, due, layer)
            for layer, (begins, due, ends, _) in windows.items()
        )
        chosen = [layer for *_, layer in order[:count]]
        yield chosen
        for layer in chosen:
            windows[layer] = window(layer, windows[layer][3] + 1)
