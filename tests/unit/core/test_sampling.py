"""The samplers: pure, portable, of exactly gamma distinct layers, and with the frequencies they promise."""

import math
from collections import Counter
from itertools import combinations

import pytest
from engines import train_step
from models import tiny_llama, token_batches
from ranks import run_ranks

import lisa_dist
from lisa_dist.config_rules import SAMPLERS
from lisa_dist.core.sampling import (
    ActiveSet,
    Period,
    SampledBlock,
    balanced_samples,
    coverage,
    describe_coverage,
    inclusion_probabilities,
    sample_period,
    sample_units,
)

OUTER = [SampledBlock("embed", 0.2, 2), SampledBlock("head", 0.1, 1)]
BUILT_IN = ("uniform", "reshuffle", "fixed", "weighted", "balanced")


def sample(sampler: str, *period, **others) -> ActiveSet:
    return sample_period(sampler, Period(*period, **others))


def count_layers(sampler: str, periods: int, num_layers: int, num_active: int, seed: int, weights=None) -> list[int]:
    """How often each layer is sampled."""
    visits = Counter()
    for period in range(periods):
        visits.update(sample(sampler, num_layers, num_active, seed, period, weights).layers)
    return [visits[layer] for layer in range(num_layers)]


@pytest.mark.parametrize("sampler", BUILT_IN)
@pytest.mark.parametrize(
    ("num_layers", "num_active", "outer"),
    [(1, 1, ()), (5, 2, ()), (5, 5, ()), (7, 3, ()), (32, 2, ()), (12, 2, OUTER)],
)
def test_samples_are_distinct_sorted_and_repeatable(sampler, num_layers, num_active, outer):
    """A sampled block takes the places of layers."""
    weights = [1.0 + layer for layer in range(num_layers)]
    for number in range(200 if outer else 40):
        period = Period(num_layers, num_active, 3, number, weights, outer)
        active = sample_period(sampler, period)
        assert active.layers == tuple(sorted(set(active.layers)))
        assert len(active.blocks) <= 1
        assert len(active.layers) == num_active - sum(block.places for block in outer if block.name in active.blocks)
        assert set(active.layers) <= set(range(num_layers))
        assert active == sample_period(sampler, period)


def test_samples_are_the_same_on_every_machine_and_release():
    """Frozen figures: a change here would change what every resumed run trains."""
    uniform = [sample("uniform", 32, 2, 0, period) for period in range(4)]
    assert uniform == [ActiveSet(layers) for layers in ((2, 7), (1, 22), (14, 19), (25, 26))]
    reshuffle = [sample("reshuffle", 5, 2, 7, period).layers for period in range(5)]
    assert reshuffle == [(2, 4), (0, 1), (3, 4), (1, 2), (0, 3)]
    balanced = [sample("balanced", 5, 2, 7, period, [1, 2, 3, 4, 5]).layers for period in range(5)]
    assert balanced == [(2, 4), (1, 3), (3, 4), (2, 3), (2, 4)]


def test_seeds_and_periods_matter():
    assert len({sample("uniform", 32, 2, seed, period) for seed in range(10) for period in range(10)}) > 80
    assert sample("fixed", 32, 2, 0, 0) == sample("fixed", 32, 2, 0, 9)


def sample_in_turn(period: Period) -> list[int]:
    first = period.number * period.count
    return [layer % period.num_layers for layer in range(first, first + period.count)]


def train_in_turn() -> list[tuple[int, ...]]:
    lisa_dist.register_sampler("in_turn")(sample_in_turn)
    config = lisa_dist.LisaConfig(lisa_sampler="in_turn", lisa_interval_steps=1)
    engine, lisa = lisa_dist.initialize(tiny_llama(), "zero2", config)
    for micro_batches in token_batches(3, rows=4):
        train_step(engine, lisa, micro_batches)
    lisa.close()
    engine.destroy()
    del SAMPLERS["in_turn"]
    with pytest.raises(
        lisa_dist.config.UserError, match="--lisa_sampler in_turn: unknown; choose one of uniform, resh"
    ):
        lisa_dist.LisaConfig(lisa_sampler="in_turn")
    return [tuple(record.layers) for record in lisa.records]


@pytest.mark.usefixtures("cpu_ops")
def test_a_sampler_of_the_users_own():
    assert run_ranks(train_in_turn, 2) == [[(0, 1), (2, 3), (4, 5)]] * 2


@pytest.mark.parametrize("layers", [[0], [0, 0], [0, 6], [0, 1, 2], []])
def test_a_sampler_that_gives_other_layers_is_named(monkeypatch, layers):
    monkeypatch.setitem(SAMPLERS, "wrong", lambda period: layers)
    with pytest.raises(ValueError, match=r"--lisa_sampler wrong: gave .* a sampler gives 2 different layers of 0 to 5"):
        sample("wrong", 6, 2, 0, 4)


def test_a_sampler_of_the_library_cannot_be_replaced():
    with pytest.raises(ValueError, match="this is a sampler of lisa_dist; choose another name"):
        lisa_dist.register_sampler("uniform")


@pytest.mark.parametrize(("num_layers", "num_active"), [(6, 2), (5, 2), (7, 3), (3, 2), (32, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_reshuffle_takes_every_layer_before_any_repeats(num_layers, num_active, seed):
    """Laid end to end, the samples are whole permutations: each count is what a full round and a part give."""
    counts = Counter(dict.fromkeys(range(num_layers), 0))
    for period in range(30):
        counts.update(sample("reshuffle", num_layers, num_active, seed, period).layers)
        complete, begun = divmod((period + 1) * num_active, num_layers)
        assert sorted(counts.values()) == [complete] * (num_layers - begun) + [complete + 1] * begun


@pytest.mark.parametrize(
    ("num_layers", "num_active", "bias"),
    [(5, 2, 0), (5, 2, 8), (12, 3, 2), (32, 2, 1), (32, 2, 4), (30, 8, 4), (9, 1, 2)],
)
def test_balanced_visits_follow_the_weights_at_any_time(num_layers, num_active, bias):
    """Within one and a half, within one nearly always, where weighted draws go astray by the root of their number."""
    weights = [((layer + 1) / num_layers) ** bias for layer in range(num_layers)]
    rates = inclusion_probabilities(weights, num_active)

    def deviations(samples) -> list[float]:
        visits, worst = Counter(), []
        for period, layers in enumerate(samples, 1):
            visits.update(layers)
            worst.append(max(abs(visits[layer] - period * rates[layer]) for layer in range(num_layers)))
        return worst

    found = [worst for seed in range(2) for worst in deviations(balanced_samples(seed, [num_active] * 1000, rates))]
    assert max(found) < 1.5
    assert sum(worst > 1.05 for worst in found) <= 0.05 * len(found)
    weighted = (sample("weighted", num_layers, num_active, 0, period, weights).layers for period in range(1000))
    assert max(deviations(weighted)) > 3


def test_balanced_samples_differ():
    """Not one order over and over."""
    samples = balanced_samples(1, [2] * 300, [1 / 3] * 6)
    pairs = Counter(tuple(sorted(layers)) for layers in samples)
    assert len(pairs) == 15
    assert max(pairs.values()) < 45


@pytest.mark.parametrize(("sampler", "num_layers", "within"), [("balanced", 6, 3), ("reshuffle", 7, 1)])
def test_every_layer_is_sampled_as_often_though_blocks_come_between(sampler, num_layers, within):
    counts = Counter(dict.fromkeys(range(num_layers), 0))
    for period in range(200 if sampler == "balanced" else 60):
        counts.update(sample(sampler, num_layers, 3, 2, period, [1.0] * num_layers, OUTER).layers)
        assert max(counts.values()) - min(counts.values()) <= within


def test_a_layer_without_weight_is_never_sampled():
    assert count_layers("balanced", 50, 4, 2, 0, [1.0, 0.0, 3.0, 1.0])[1] == 0
    assert sample("balanced", 4, 0, 0, 3).layers == ()


@pytest.mark.parametrize("sampler", ["uniform", "fixed", "adaptive"])
def test_units_fill_the_budget(sampler):
    """In random order each that still fits: none that is left would, and all come about as often as their sizes let."""
    sizes, weights = [4, 4, 1, 1, 10, 10, 10, 0], [1.0] * 8
    visits = [0] * 8
    for period in range(400):
        active = sample_units(sampler, sizes, 13, 3, period, weights)
        assert active.blocks == ()
        assert list(active.layers) == sorted(set(active.layers))
        left = 13 - sum(sizes[unit] for unit in active.layers)
        assert left >= 0
        assert all(sizes[unit] > left for unit in set(range(7)) - set(active.layers))
        for unit in active.layers:
            visits[unit] += 1
    assert visits[7] == 0, "of size 0"
    if sampler == "fixed":
        assert set(visits) <= {0, 400}
    else:
        assert min(visits[:7]) > 50
        assert max(visits[4:7]) < min(visits[2:4]), "small ones fit more often"


def test_heavy_units_come_first():
    sizes, weights = [1] * 10, [0.0] * 8 + [1.0, 1.0]
    assert {sample_units("adaptive", sizes, 2, 0, period, weights).layers for period in range(20)} == {(8, 9)}
    assert len({sample_units("uniform", sizes, 2, 0, period).layers for period in range(20)}) > 10


def chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def one_after_another(weights: list[float], chosen: tuple[int, int]) -> float:
    """The probability of two layers to be drawn, each among those that are left, by weight."""
    total = sum(weights)
    first, second = (weights[layer] for layer in chosen)
    return first * second / total * (1 / (total - first) + 1 / (total - second))


SKEWED = [1.0, 2.0, 4.0, 8.0, 0.5]


def test_two_layers_are_drawn_one_after_another_by_weight():
    periods = 8000
    drawn = Counter(sample("adaptive", 5, 2, 11, period, SKEWED).layers for period in range(periods))
    pairs = list(combinations(range(5), 2))
    expected = [periods * one_after_another(SKEWED, pair) for pair in pairs]
    assert sum(expected) == pytest.approx(periods)
    assert chi_square([drawn[pair] for pair in pairs], expected) < 27.9  # 9 degrees of freedom, 0.999 quantile


def test_inclusion_probabilities_of_two_layers_are_the_sums_over_pairs():
    found = inclusion_probabilities(SKEWED, 2)
    for layer in range(5):
        pairs = [pair for pair in combinations(range(5), 2) if layer in pair]
        assert found[layer] == pytest.approx(sum(one_after_another(SKEWED, pair) for pair in pairs), abs=1e-8)


@pytest.mark.parametrize("num_drawn", [1, 2, 3, 5])
def test_layers_are_drawn_with_their_inclusion_probabilities(num_drawn):
    """And not with gamma times their share of the weights, once more than one is drawn."""
    weights, periods = [1.0, 3.0, 0.5, 6.0, 2.0, 0.0, 9.0, 1.5], 6000
    visits = count_layers("weighted", periods, 8, num_drawn, 4, weights)

    def squares(expected: list[float]) -> float:
        """Deviations in units of a binomial count's, squared and added up; of the layers that can be drawn."""
        chosen = [layer for layer in range(8) if weights[layer]]
        odds = [min(expected[layer], 1 - 1e-6) for layer in chosen]
        pairs = zip(chosen, odds, strict=True)
        return sum((visits[layer] - periods * odd) ** 2 / (periods * odd * (1 - odd)) for layer, odd in pairs)

    expected = inclusion_probabilities(weights, num_drawn)
    assert sum(expected) == pytest.approx(num_drawn)
    assert visits[5] == 0
    assert expected[5] == 0
    # Of counts that hang together the sum is no chi-square of 7 degrees, but lies above its 0.999 quantile as seldom:
    # in 0.07% to 0.33% of seeds, by simulation. That of pairs, above, is one.
    assert squares(expected) < 24.3
    if num_drawn > 1:
        assert squares([num_drawn * weight / sum(weights) for weight in weights]) > 100


def test_inclusion_probabilities_at_the_ends():
    assert inclusion_probabilities([1.0, 2.0], 0) == [0.0, 0.0]
    assert inclusion_probabilities([1.0, 1e6, 0.0, 3.0], 3) == pytest.approx([1, 1, 0, 1], abs=1e-6)
    assert inclusion_probabilities([1.0, 1e-307, 0.5], 2) == pytest.approx([1, 0, 1], abs=1e-6)
    assert inclusion_probabilities([1e-300, 1e-300], 1) == pytest.approx([0.5, 0.5])
    assert inclusion_probabilities([1.0] * 32, 2) == pytest.approx([2 / 32] * 32, abs=1e-8)
    spread = inclusion_probabilities([math.exp(layer / 4) for layer in range(80)], 8)
    assert spread == sorted(spread)
    assert sum(spread) == pytest.approx(8)


def test_blocks_are_drawn_with_their_probability_and_layers_with_what_is_left():
    periods = 4000
    draws = [sample("uniform", 12, 2, 1, period, None, OUTER) for period in range(periods)]
    visits = Counter(block for draw in draws for block in draw.blocks)
    none = periods - sum(visits.values())
    # 2 degrees of freedom: 13.8 is the 0.999 quantile.
    assert chi_square([visits["embed"], visits["head"], none], [0.2 * periods, 0.1 * periods, 0.7 * periods]) < 13.8
    layers = Counter(layer for draw in draws for layer in draw.layers)
    expected = [periods * (2 - 0.2 * 2 - 0.1) / 12] * 12
    assert chi_square([layers[layer] for layer in range(12)], expected) < 31.3


@pytest.mark.parametrize("sampler", BUILT_IN)
@pytest.mark.parametrize("outer", [(), OUTER])
def test_as_many_layers_train_as_are_expected(sampler, outer):
    """In the mean of many seeds; in turn, without sampled outer blocks, with each seed."""
    weights = [1.0 + layer for layer in range(12)] if sampler == "weighted" else None
    found = coverage(sampler, 12, 2, 20, 70, weights, outer)
    assert found.periods == 4
    counts = []
    for seed in range(400):
        periods = [sample_period(sampler, Period(12, 2, seed, number, weights, outer)) for number in range(4)]
        counts.append(len({layer for active in periods for layer in active.layers}))
    in_turn = sampler in ("reshuffle", "balanced")
    tolerance = {"abs": 1e-9} if in_turn and not outer else {"abs": 0.15}
    if in_turn and not outer:
        assert {*counts} == {8}
    assert found.layers == pytest.approx(sum(counts) / len(counts), **tolerance)


@pytest.mark.parametrize(
    ("sampler", "layers", "interval"),
    [
        ("uniform", 5 * (1 - 0.6**3), 15),  # 5 periods leave 0.39 layers, 4 leave 0.65
        ("reshuffle", 5, None),
        ("fixed", 2, None),
    ],
)
def test_the_largest_k_that_reaches_all_layers_is_named(sampler, layers, interval):
    steps = 61 if sampler == "uniform" else 60
    found = coverage(sampler, 5, 2, 25, steps)
    assert (found.periods, found.layers, found.interval) == (3, pytest.approx(layers), interval)
    assert found.reaches_all == (sampler == "reshuffle")
    if interval is not None:
        assert coverage(sampler, 5, 2, interval, steps).reaches_all
        assert not coverage(sampler, 5, 2, interval + 1, steps).reaches_all
        text = "3 periods in 61 steps; 3.9 of 5 layers are expected to train at least once"
        assert describe_coverage(found, 5) == f"{text}. `--lisa_interval_steps 15` would reach all"


def test_a_run_too_short_for_all_layers_names_no_k():
    found = coverage("uniform", 32, 2, 20, 3)
    assert (found.periods, found.reaches_all, found.interval) == (1, False, None)
    assert describe_coverage(found, 32) == "1 period in 3 steps; 2 of 32 layers are expected to train at least once"
