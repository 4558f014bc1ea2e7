"""Which blocks train in a period: pure functions of (seed, period, weights).

Every number is read from SHA-256, so the same seed and period give the same layers on any rank, machine, world size and
Python version.

Source: Algorithm 1, line 3 (uniform). Weighted sampling without replacement: Efraimidis and Spirakis, "Weighted random
sampling with a reservoir", 2006. Visits at given rates, each in a time window of its own: Baruah et al., "Proportionate
progress: a notion of fairness in resource allocation", 1996.
"""

import bisect
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy

from lisa_dist.config_rules import SAMPLERS
from lisa_dist.errors import UserError


@dataclass(frozen=True)
class SampledBlock:
    """An outer block (embed, head, rest) that a period trains with a probability.

    It then takes the place of `places` layers, as many as it is layers large: a period's memory does not grow by it.
    """

    name: str
    probability: float
    places: int


@dataclass(frozen=True)
class ActiveSet:
    """What trains in a period besides the always-trained blocks: layers, ascending, and at most one outer block."""

    layers: tuple[int, ...]
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Period:
    """What a sampler is given: `count` of range(`num_layers`) are to be sampled for the period `number`, from 0 on.

    `count` is `num_active`, less the places of a sampled outer block. `weights` are one non-negative number a layer.
    """

    num_layers: int
    num_active: int
    seed: int
    number: int
    weights: Sequence[float] | None = None
    outer: Sequence[SampledBlock] = ()

    @property
    def count(self) -> int:
        """How many layers to sample."""
        return self._count(self.number)

    @property
    def counts(self) -> list[int]:
        """How many in each period up to this one, for samples that go on from one another."""
        return [self._count(number) for number in range(self.number + 1)]

    def _count(self, number: int) -> int:
        block = _sample_outer(self.seed, number, self.outer)
        return self.num_active - (0 if block is None else block.places)


Sampler = Callable[[Period], Iterable[int]]


def register_sampler(name: str) -> Callable[[Sampler], Sampler]:
    """Decorate a function by which `LisaConfig(lisa_sampler=name)` samples layers. It is called with a `Period`.

    It gives `period.count` different ones of range(period.num_layers), by the period alone: all ranks call it, and a
    resumed run again. Raises UserError for the name of a sampler of this library.
    """
    if getattr(SAMPLERS.get(name), "__module__", "") == __name__:
        raise UserError(f"register_sampler({name!r}): this is a sampler of lisa_dist; choose another name.")

    def register(sampler: Sampler) -> Sampler:
        SAMPLERS[name] = sampler
        return sampler

    return register


def sample_period(sampler: str, period: Period) -> ActiveSet:
    """Sample one period by a registered sampler; UserError where it gives other than `period.count` different layers.

    Samples that go on from one another cost a hash for each earlier period, and for "balanced" a sort: 0.2 s after
    10,000 periods.
    """
    assert 0 <= period.num_active <= period.num_layers
    chosen = sorted(int(layer) for layer in SAMPLERS[sampler](period))
    if len(chosen) != period.count or len({*range(period.num_layers)} & {*chosen}) != period.count:
        raise UserError(
            f"--lisa_sampler {sampler}: gave {chosen} for period {period.number}; a sampler gives {period.count} "
            f"different layers of 0 to {period.num_layers - 1}."
        )
    block = _sample_outer(period.seed, period.number, period.outer)
    return ActiveSet(tuple(chosen), () if block is None else (block.name,))


def sample_units(
    sampler: str, sizes: Sequence[int], budget: int, seed: int, period: int, weights: Sequence[float] | None = None
) -> ActiveSet:
    """Sample one period of units of different sizes: in random order, each that still fits the sum's `budget`."""
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


@register_sampler("uniform")
def _sample_uniform(period: Period) -> list[int]:
    return _random_order(period.seed, period.number, period.num_layers)[: period.count]


@register_sampler("fixed")
def _sample_fixed(period: Period) -> list[int]:
    return _random_order(period.seed, 0, period.num_layers)[: period.count]


@register_sampler("weighted")
@register_sampler("adaptive")  # whose weights are those of `layer_weights.LayerImportance`
def _sample_weighted(period: Period) -> list[int]:
    return _random_order(period.seed, period.number, period.num_layers, period.weights)[: period.count]


@register_sampler("reshuffle")
def _sample_reshuffled(period: Period) -> list[int]:
    """The last of successive samples from permutations laid end to end.

    Every layer comes once before any comes twice. A sample may straddle two permutations. The layers left over from the
    first then must not come up again at once, so the second has them moved behind its part of that sample.
    """
    waiting: list[int] = []
    chosen: list[int] = []
    epoch = 0
    for count in period.counts:
        if len(waiting) < count:
            order = _random_order(period.seed, epoch, period.num_layers)
            epoch += 1
            head = [layer for layer in order if layer not in waiting][: count - len(waiting)]
            if waiting:
                order = head + [layer for layer in order if layer not in head]
            waiting += order
        chosen, waiting = waiting[:count], waiting[count:]
    return chosen


@register_sampler("balanced")
def _sample_balanced(period: Period) -> list[int]:
    rates = _rates(tuple(period.weights or [1.0] * period.num_layers), period.num_active)
    *_, chosen = balanced_samples(period.seed, period.counts, rates)
    return chosen


@functools.lru_cache(maxsize=1)  # weights stay for a run, and the integral takes tens of milliseconds
def _rates(weights: tuple[float, ...], num_sampled: int) -> list[float]:
    return inclusion_probabilities(weights, num_sampled)


def inclusion_probabilities(weights: Sequence[float], num_sampled: int) -> list[float]:
    """The probability of each layer to be among `num_sampled` that are sampled by weight without replacement.

    A layer with weight w arrives after an exponential time of rate w, and the first `num_sampled` to arrive are
    sampled, so layer i is sampled where fewer than `num_sampled` others arrive before it: the integral over t of
    w_i exp(-w_i t) times that probability, a sum of independent events. To about 1e-8.
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


@dataclass(frozen=True)
class Coverage:
    """How many layers the periods of a run of so many `steps` are expected to train at least once.

    `layers` is None for a registered sampler. `interval` is the largest K that would reach all layers, or None where
    they are reached or no K is enough.
    """

    steps: int
    periods: int
    layers: float | None
    reaches_all: bool
    interval: int | None


def coverage(
    sampler: str,
    num_layers: int,
    num_active: int,
    interval: int,
    steps: int,
    weights: Sequence[float] | None = None,
    outer: Sequence[SampledBlock] = (),
) -> Coverage:
    """Return what a run of so many `steps` covers with periods of `interval` steps; `weights` and `outer` as of Period.

    By chance a layer of rate r trains in one of P periods with the probability 1 - (1 - r)^P, exactly; there all but
    half a layer count as all. In turn it has r P visits.
    """
    per_period = num_active - sum(block.probability * block.places for block in outer)
    rates = [per_period / num_layers] * num_layers
    if weights is not None and sampler in ("weighted", "balanced"):
        rates = [rate * per_period / max(1, num_active) for rate in inclusion_probabilities(weights, num_active)]

    def layers_in(periods: int) -> float:
        if sampler == "fixed":
            return float(num_active)
        if sampler in ("reshuffle", "balanced"):
            return sum(min(1.0, rate * periods) for rate in rates)
        return sum(1 - (1 - rate) ** periods for rate in rates)

    def reaches_all(interval: int) -> bool:
        missed = sum(rate > 0 for rate in rates) - layers_in(math.ceil(steps / interval))
        return missed <= (1e-6 if sampler in ("reshuffle", "balanced", "fixed") else 0.5)

    periods = math.ceil(steps / interval)
    if getattr(SAMPLERS[sampler], "__module__", "") != __name__:
        return Coverage(steps, periods, None, True, None)
    if reaches_all(interval):
        return Coverage(steps, periods, layers_in(periods), True, None)
    smaller = bisect.bisect_left(range(1, interval), True, key=lambda one: not reaches_all(one))
    return Coverage(steps, periods, layers_in(periods), False, smaller or None)


def describe_coverage(found: Coverage, num_layers: int) -> str:
    """Return a line on the periods of a run, with the K that would reach all layers if these do not."""
    text = f"{found.periods} period{'s' if found.periods > 1 else ''} in {found.steps} steps"
    if found.layers is None:
        return text
    count = f"{found.layers:.1f}".removesuffix(".0")
    text += f"; {count} of {num_layers} layers are expected to train at least once"
    if found.interval is not None:
        text += f". `--lisa_interval_steps {found.interval}` would reach all"
    return text


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
