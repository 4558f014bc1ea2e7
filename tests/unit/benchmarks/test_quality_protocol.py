"""The comparison of every method: which settings and rates they have, and how many steps they take."""

import argparse
import json
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from benchmarks.common.methods import METHODS
from benchmarks.quality import pareto
from benchmarks.quality.engines import planned, with_memory_of
from benchmarks.quality.quality import beyond, rates_by_time, window_of
from benchmarks.tables.outcomes import quality_key
from benchmarks.tables.pictures import front_of

pytestmark = pytest.mark.full


def test_every_method_tries_as_many_rates_and_more_where_the_best_is_at_an_end():
    arguments = argparse.Namespace(middle=["lora r16=1e-3"], rate=1e-4, num_rates=3)
    assert window_of("full", arguments) == [5e-5, 1e-4, 2e-4]
    assert window_of("lora r16", arguments) == [5e-4, 1e-3, 2e-3]

    def figures(*losses: float) -> dict:
        at_rates = zip([5e-5, 1e-4, 2e-4], losses, strict=True)
        return {quality_key("full", rate, 0): {"held_out": loss} for rate, loss in at_rates}

    assert beyond("full", figures(1.0, 2.0, 3.0)) == 2.5e-5
    assert beyond("full", figures(3.0, 2.0, 1.0)) == 4e-4
    assert beyond("full", figures(2.0, 1.0, 3.0)) is None


def test_at_equal_time_the_rate_falls_with_the_clock():
    """Steps begin while there is time; the rate rises over ten of them, and is linear in the time that is left."""
    times = iter([100.0, 100.0, 101.0, 105.0, 109.0, 110.0])
    assert list(rates_by_time(2.0, 10.0, lambda: next(times))) == pytest.approx([0.2, 0.4, 0.6, 0.2])


def test_the_settings_of_every_method_can_be():
    """Those that a run fills in stand for themselves."""
    for name, method in METHODS.items():
        layers = method.settings.get("lisa_activated_layers")
        settings = method.settings | ({"lisa_activated_layers": 2} if isinstance(layers, str) else {})
        settings |= {"lisa_budget": "0.1"} if "lisa_budget" in settings else {}
        assert replace(method, settings=settings).config, name


def test_costs_are_of_rounds_in_turns_and_other_tasks_stay(tmp_path, monkeypatch):
    """Medians of seconds, the highest peak; what is measured already is not measured again."""
    asked, found = [], iter([1.0, 9.0, 3.0, 8.0])

    class Ranks:
        """In the place of a process: seconds from a list."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def call(self, _, function, arguments, name, seed):
            asked.append((name, seed))
            return [{"peak": 100 + seed, "between": 10, "seconds": next(found)}]

    monkeypatch.setattr(pareto, "RankGroup", Ranks)
    results = tmp_path / "pareto.json"
    results.write_text(json.dumps({"figures": {"costs": {}, "tasks": {"another": {"arms": {}}}}}))
    runs = {quality_key(name, 1e-4, seed): {"held_out": 1.0 + seed} for name in ("full", "lisa 2") for seed in (0, 1)}
    task = {"model": "a/model", "figures": {"settings": {"model": "model", "rows": 1, "steps": 5}, "runs": runs}}
    figures = pareto.measure({"a task": task}, results, ["full", "lora r16", "lisa 2"])
    assert asked == [(name, seed) for seed in (0, 1) for name in ("full", "lisa 2")], "in turns, of those with runs"
    assert set(figures["tasks"]) == {"another", "a task"}
    of_methods = figures["tasks"]["a task"]["arms"]
    assert of_methods["full"] == {"peak": 101, "between": 10, "seconds": 2.0, "loss": 1.5, "losses": [1.0, 2.0]}
    assert of_methods["lisa 2"]["seconds"] == 8.5
    pareto.measure({"a task": task}, results, ["full", "lisa 2"])
    assert len(asked) == 4


def test_the_front_is_of_points_that_no_other_is_below_and_left_of():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 6.0), (3.0, 4.0), (4.0, 1.0)]
    assert front_of(points) == [(1.0, 5.0), (2.0, 4.0), (4.0, 1.0)]


def test_as_many_layers_as_fit_the_memory_of_lora(tmp_path):
    """The plan of one more would be above a tenth more than LoRA's."""
    config = LlamaConfig(
        num_hidden_layers=8, hidden_size=256, intermediate_size=512, num_attention_heads=4, vocab_size=64
    )
    config.save_pretrained(tmp_path)
    arguments = argparse.Namespace(model=str(tmp_path), rows=1, gpu=None)
    settings: dict = {}  # 32 bits

    def peak(count: int) -> int:
        return planned(arguments, settings | {"lisa_activated_layers": count}).peak

    fits = with_memory_of("lora r16", arguments, settings, 1.1)["lisa_activated_layers"]
    lora = planned(arguments, {}, method="lora", optim="adamw_torch").peak
    assert 0 < fits < 8, "the test needs a number between"
    assert peak(fits) <= 1.1 * lora < peak(fits + 1)
