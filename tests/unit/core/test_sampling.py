"""The samplers: pure, portable, of exactly gamma distinct layers, and with the frequencies they promise."""

import json
import math
from collections import Counter
from itertools import combinations

import pytest

from lisa_dist.core.layer_weights import load_layer_weights
from lisa_dist.core.sampling import SampledBlock, balanced_samples, inclusion_probabilities, sample_period, sample_units


def sample_layers(*arguments) -> tuple[int, ...]:
    """The layers of a period where only layers are drawn."""
    return sample_period(*arguments).layers


OUTER = [SampledBlock("embed", 0.2, 2), SampledBlock("head", 0.1, 1)]


@pytest.mark.parametrize("sampler", ["uniform", "reshuffle", "fixed", "weighted", "balanced"])
@pytest.mark.parametrize(("num_layers", "num_active"), [(1, 1), (5, 2), (5, 5), (7, 3), (32, 2)])
def test_draws_are_distinct_sorted_and_repeatable(sampler, num_layers, num_active):
    weights = [1.0 + layer for layer in range(num_layers)]
    for period in range(40):
        layers = sample_layers(sampler, num_layers, num_active, 3, period, weights)
        assert layers == tuple(sorted(set(layers)))
        assert len(layers) == num_active
        assert set(layers) <= set(range(num_layers))
        assert layers == sample_layers(sampler, num_layers, num_active, 3, period, weights)


def test_draws_are_the_same_on_every_machine_and_release():
    """Frozen figures: a change here would change what every resumed run trains."""
    uniform = [sample_layers("uniform", 32, 2, 0, period) for period in range(4)]
    assert uniform == [(2, 7), (1, 22), (14, 19), (25, 26)]
    reshuffle = [sample_layers("reshuffle", 5, 2, 7, period) for period in range(5)]
    assert reshuffle == [(2, 4), (0, 1), (3, 4), (1, 2), (0, 3)]
    balanced = [sample_layers("balanced", 5, 2, 7, period, [1, 2, 3, 4, 5]) for period in range(5)]
    assert balanced == [(2, 4), (1, 3), (3, 4), (2, 3), (2, 4)]


def test_seeds_and_periods_matter():
    draws = {sample_layers("uniform", 32, 2, seed, period) for seed in range(10) for period in range(10)}
    assert len(draws) > 80
    assert sample_layers("fixed", 32, 2, 0, 0) == sample_layers("fixed", 32, 2, 0, 9)


@pytest.mark.parametrize(("num_layers", "num_active"), [(6, 2), (5, 2), (7, 3), (3, 2), (32, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_reshuffle_takes_every_layer_before_any_repeats(num_layers, num_active, seed):
    """Laid end to end, the draws are whole permutations: each count is what a full round and a part give."""
    counts = Counter(dict.fromkeys(range(num_layers), 0))
    for period in range(30):
        counts.update(sample_layers("reshuffle", num_layers, num_active, seed, period))
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
    weighted = (sample_layers("weighted", num_layers, num_active, 0, period, weights) for period in range(1000))
    assert max(deviations(weighted)) > 3


def test_balanced_samples_differ():
    """Not one order over and over."""
    samples = balanced_samples(1, [2] * 300, [1 / 3] * 6)
    pairs = Counter(tuple(sorted(layers)) for layers in samples)
    assert len(pairs) == 15
    assert max(pairs.values()) < 45


def test_balanced_counts_what_sampled_blocks_leave():
    visits, places = Counter(), 0
    for period in range(200):
        found = sample_period("balanced", 6, 3, 2, period, [1.0] * 6, OUTER)
        assert len(found.layers) == 3 - sum(block.places for block in OUTER if block.name in found.blocks)
        places += len(found.layers)
        visits.update(found.layers)
    assert max(abs(visits[layer] - places / 6) for layer in range(6)) < 2


def test_a_layer_without_weight_is_never_sampled():
    visits = Counter(layer for p in range(50) for layer in sample_layers("balanced", 4, 2, 0, p, [1.0, 0.0, 3.0, 1.0]))
    assert visits[1] == 0
    assert sample_layers("balanced", 4, 0, 0, 3) == ()


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


def test_uniform_inclusion_probability_is_gamma_over_layers():
    periods, num_layers, num_active = 4000, 12, 3
    visits = Counter(layer for p in range(periods) for layer in sample_layers("uniform", num_layers, num_active, 1, p))
    expected = [periods * num_active / num_layers] * num_layers
    # 11 degrees of freedom: 31.3 is the 0.999 quantile; drawing without replacement only tightens the spread.
    assert chi_square([visits[layer] for layer in range(num_layers)], expected) < 31.3


def test_weighted_draws_one_layer_in_proportion_to_its_weight():
    weights, periods = [1.0, 2.0, 0.0, 5.0], 8000
    visits = Counter(sample_layers("weighted", 4, 1, 2, period, weights)[0] for period in range(periods))
    assert visits[2] == 0
    drawn = [0, 1, 3]
    expected = [periods * weights[layer] / sum(weights) for layer in drawn]
    assert chi_square([visits[layer] for layer in drawn], expected) < 13.8  # 2 degrees of freedom, 0.999 quantile


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ('{"0": 1}', "must hold a JSON list of numbers"),
        ('[1, "2", 3]', "must hold a JSON list of numbers"),
        ("[1, 2]", "holds 2 weights, but the model has 3"),
        ("[1, -2, 3]", "the weight of layer 1 is -2"),
        ("[1, NaN, 3]", "the weight of layer 1 is nan"),
        ("[0, 0, 0]", "only 0 weights are positive, but --lisa_activated_layers 2"),
        ("[0, 1, 0]", "only 1 weights are positive"),
    ],
)
def test_a_bad_weights_file_is_named(tmp_path, content, said):
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="--lisa_weights_file") as error:
        load_layer_weights(str(path), 3, 2)
    assert str(path) in str(error.value)
    assert said in str(error.value)


NORMS = "block,full.weight_norm,lora.weight_norm\nembed,1,2\nlayers.0,2,4\nlayers.1,4,2\nlayers.2,1,0\nhead,1,9\n"


def test_a_file_that_is_no_text_is_named(tmp_path):
    for name in ("weights.json", "norms.csv"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=r"--lisa_weights_file .*: is no text in UTF-8"):
            load_layer_weights(str(tmp_path / name), 3, 2)


def test_a_folder_may_have_a_number_sign_in_its_name(tmp_path):
    (tmp_path / "run#1").mkdir()
    (tmp_path / "run#1" / "weights.json").write_text("[1, 2, 3]")
    assert load_layer_weights(str(tmp_path / "run#1" / "weights.json"), 3, 2) == [1.0, 2.0, 3.0]


def test_columns_of_a_table_of_norms_are_weights(tmp_path):
    path = tmp_path / "norms.csv"
    path.write_text(NORMS)
    assert load_layer_weights(f"{path}#lora.weight_norm/full.weight_norm", 3, 2) == [2.0, 0.5, 0.0]
    assert load_layer_weights(f"{path}#full.weight_norm", 3, 3) == [2.0, 4.0, 1.0]


@pytest.mark.parametrize(
    ("content", "columns", "said"),
    [
        ("", "#a", "holds no norms of layers; it is the norms.csv that lisa-dist norms writes"),
        ("block,a\n", "#a", "holds no norms of layers"),
        ("layer,a\nlayers.0,1\n", "#a", "holds no norms of layers"),
        (NORMS, "", "behind the #, as norms.csv#A/B; it has full.weight_norm, lora.weight_norm"),
        (NORMS, "#lora", "it has full.weight_norm, lora.weight_norm"),
        (NORMS, "#full.weight_norm/lora.weight_norm/full.weight_norm", "it has full.weight_norm"),
        (NORMS, "#full.weight_norm/lora.weight_norm", "lora.weight_norm of a layer is 0"),
        (NORMS.replace("4,2", "4,x"), "#lora.weight_norm", "'x' is no number of a layer"),
        (NORMS.replace("4,2", "4"), "#lora.weight_norm", "is no number of a layer"),
        (NORMS.replace("layers.2,1,0\n", ""), "#full.weight_norm", "holds 2 weights, but the model has 3"),
        (NORMS.replace("layers.1,4,2\n", ""), "#full.weight_norm", "has no row layers.1, but has later ones"),
    ],
)
def test_a_bad_table_of_norms_is_named(tmp_path, content, columns, said):
    path = tmp_path / "norms.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match="--lisa_weights_file") as error:
        load_layer_weights(f"{path}{columns}", 3, 2)
    assert said in str(error.value)


def one_after_another(weights: list[float], chosen: tuple[int, int]) -> float:
    """The probability of two layers to be drawn, each among those that are left, by weight."""
    total = sum(weights)
    first, second = (weights[layer] for layer in chosen)
    return first * second / total * (1 / (total - first) + 1 / (total - second))


SKEWED = [1.0, 2.0, 4.0, 8.0, 0.5]


def test_two_layers_are_drawn_one_after_another_by_weight():
    periods = 8000
    drawn = Counter(sample_layers("adaptive", 5, 2, 11, period, SKEWED) for period in range(periods))
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
    visits = Counter(layer for p in range(periods) for layer in sample_layers("weighted", 8, num_drawn, 4, p, weights))

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


def test_a_good_weights_file_is_read(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps([1, 0.5, 2]))
    assert load_layer_weights(str(path), 3, 3) == [1.0, 0.5, 2.0]


@pytest.mark.parametrize("sampler", ["uniform", "reshuffle", "fixed", "weighted", "balanced"])
def test_a_drawn_block_takes_the_places_of_layers(sampler):
    draws = [sample_period(sampler, 12, 2, 5, period, [1.0] * 12, OUTER) for period in range(200)]
    for draw in draws:
        assert len(draw.blocks) <= 1
        places = sum(block.places for block in OUTER if block.name in draw.blocks)
        assert len(draw.layers) == 2 - places
        assert draw.layers == tuple(sorted(set(draw.layers)))
    assert draws == [sample_period(sampler, 12, 2, 5, period, [1.0] * 12, OUTER) for period in range(200)]


def test_blocks_are_drawn_with_their_probability_and_layers_with_what_is_left():
    periods = 4000
    draws = [sample_period("uniform", 12, 2, 1, period, None, OUTER) for period in range(periods)]
    visits = Counter(block for draw in draws for block in draw.blocks)
    none = periods - sum(visits.values())
    # 2 degrees of freedom: 13.8 is the 0.999 quantile.
    assert chi_square([visits["embed"], visits["head"], none], [0.2 * periods, 0.1 * periods, 0.7 * periods]) < 13.8
    layers = Counter(layer for draw in draws for layer in draw.layers)
    expected = [periods * (2 - 0.2 * 2 - 0.1) / 12] * 12
    assert chi_square([layers[layer] for layer in range(12)], expected) < 31.3


def test_reshuffle_covers_every_layer_though_blocks_come_between():
    counts = Counter(dict.fromkeys(range(7), 0))
    for period in range(60):
        counts.update(sample_period("reshuffle", 7, 3, 4, period, None, OUTER).layers)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_without_drawn_blocks_nothing_changes():
    draws = [sample_period("uniform", 32, 2, 0, period, None, []) for period in range(4)]
    assert [draw.layers for draw in draws] == [(2, 7), (1, 22), (14, 19), (25, 26)]
    assert not any(draw.blocks for draw in draws)
