"""The rule for defaults: regrets, scores, times, planned memory, and the choice."""

import pytest

from benchmarks.quality.decide import CARD, Memory, decide, mechanisms, regrets, relative_times, scores
from benchmarks.quality.grid import Parts
from benchmarks.tables.outcomes import key_of


def task(losses: dict[str, list[float]], untrained: float | None = 5.0, seconds: float = 1.0) -> dict:
    runs = {
        key_of(method, 0, seed): {"validation": 1.0, "test": loss, "seconds_per_step": seconds}
        for method, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    }
    if untrained is not None:
        runs[key_of("full", 0, 0)] = {"validation": 1.0, "test": 2.0, "seconds_per_step": 3.0, "untrained": untrained}
    return runs


def test_regret_is_relative_to_what_the_best_method_has_gained():
    found = regrets(task({"lora 16": [3.0, 4.0], "all, ends": [1.0]}))
    assert found == {"lora 16": pytest.approx(2.5 / 4), "all, ends": 0, "full": pytest.approx(1 / 4)}


def test_there_is_no_regret_without_the_loss_of_the_untrained_model():
    assert regrets(task({"lora 16": [3.0]}, untrained=None)) == {}


def test_a_score_needs_every_task():
    both = task({"lora 16": [3.0]}), task({"lora 16": [2.5], "lora 64": [2.0]})
    assert scores(dict(zip(("a", "b"), both, strict=True))) == {
        "lora 16": pytest.approx((1 / 3 + 0.5 / 3) / 2),
        "full": 0,
    }


def test_methods_with_quantized_layers_take_the_other_losses_where_nothing_is_in_bf16():
    in_fp32, in_bf16 = task({"sampled 1/6": [3.0]}), task({"sampled 1/6": [2.0], "sampled 1/6, frozen 8": [2.6]})
    assert scores({"a": in_fp32, "b": in_bf16})["sampled 1/6, frozen 8"] == pytest.approx((1 / 3 + 0.6 / 3) / 2)


def test_times_are_relative_to_lora():
    found = relative_times(task({"lora 16": [1.0, 1.0]}))
    assert found == {"lora 16": 1, "full": 3}


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("lora 16", 1),
        ("lora 16, ends", 2),
        ("sampled 1/6", 1),
        ("fixed 1/6, adapters 32, ends 1/4, frozen 8", 4),
        ("full", 0),
    ],
)
def test_mechanisms(method, count):
    assert mechanisms(Parts.parse(method)) == count


def one(score: float | None, gib: float, time: float = 1.0, count: int = 1) -> dict:
    return {"score": score, "peak": int(gib * 2**30), "time": time, "mechanisms": count}


def test_the_best_eligible_method_is_the_default():
    methods = {"large": one(0.0, 30), "slow": one(0.01, 10, time=2), "good": one(0.1, 10), "bad": one(0.3, 5)}
    assert decide(methods | {"not run everywhere": one(None, 5)}) == "good"


def test_of_two_that_are_close_the_simpler_one_is_the_default():
    methods = {"best": one(0.1, 10, count=3), "simple": one(0.109, 10, count=2), "simplest": one(0.12, 10, count=1)}
    assert decide(methods) == "simple"


def test_no_default_if_nothing_fits():
    assert decide({"large": one(0.0, CARD / 2**30)}) is None


def test_embedding_and_head_with_small_states_cost_less_than_their_gradients_and_weights_in_fp32():
    memory = Memory()
    lora, with_ends = memory.peak("lora 16"), memory.peak("lora 16, ends")
    embedding_and_head = 2 * 128256 * 4096
    assert 0 < with_ends - lora < 2 * embedding_and_head
    assert memory.peak("lora 16, ends, frozen 8") < lora
