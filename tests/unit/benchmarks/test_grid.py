"""The grid of methods: names and their settings, the choice of rates, and paired differences."""

import argparse
import json
from fractions import Fraction

import pytest

from benchmarks.quality import grid
from benchmarks.quality.grid import (
    GRID,
    SMOLLM2,
    TASKS,
    TEST_ROWS,
    VALIDATION_ROWS,
    Parts,
    first_rung,
    next_rungs,
    read_data,
)
from benchmarks.tables.outcomes import best_rung, key_of, losses_on_test_rows, paired_difference
from lisa_dist import LisaConfig


def runs_of(method: str, losses: dict[int, float]) -> dict:
    return {key_of(method, rung, 0): {"validation": loss, "test": -loss} for rung, loss in losses.items()}


@pytest.mark.parametrize("num_layers", [5, 30])
@pytest.mark.parametrize("method", GRID)
def test_every_method_of_the_grid_has_valid_settings(method, num_layers):
    parts = Parts.parse(method)
    config = LisaConfig(**parts.settings(num_layers, seed=3))
    assert config.lisa_seed == 3
    assert (parts.ends is None) == (config.frozen == ("embed", "head", "rest"))
    config.check_num_layers(num_layers)


@pytest.mark.parametrize(("share", "of_5", "of_30"), [("1/15", 1, 2), ("1/6", 1, 5), ("1/3", 2, 10), ("1/2", 3, 15)])
def test_a_share_of_the_layers(share, of_5, of_30):
    parts = Parts.parse(f"sampled {share}")
    assert (parts.number_of_layers(5), parts.number_of_layers(30)) == (of_5, of_30)


def test_scales_are_relative_to_everything_else():
    scales = LisaConfig(**Parts.parse("sampled 1/6, ends 1/4").settings(30, 0)).lr_scales
    assert {name: scale for name, scale in scales.items() if scale != 1} == {"embed": 0.25, "head": 0.25}
    beside = LisaConfig(**Parts.parse("sampled 1/6, adapters 32, ends 1/10").settings(30, 0)).lr_scales
    assert beside == {"embed": 0.1, "head": 0.1, "adapters": 1, "layers": 0.0625}


def test_more_parts():
    parts = Parts.parse("fixed 1/3, ends 1/20, K 5, keep, warmup 3, frozen 8")
    assert parts == Parts("fixed", Fraction(1, 3), None, Fraction(1, 20), 5, "keep", warmup=3, frozen_bits=8)
    assert parts.settings(5, 0)["lisa_frozen_bits"] == 8


def test_the_rate_rises_after_each_switch():
    plain = Parts.parse("sampled 1/3, ends, K 20").rates(1.0, 100)
    assert plain[:2] + plain[20:22] == pytest.approx([0.1, 0.2, 0.8, 0.79])
    risen = Parts.parse("sampled 1/3, ends, K 20, warmup 3").rates(1.0, 100)
    assert risen[20:25] == pytest.approx([0.8 / 4, 0.79 / 2, 0.78 * 3 / 4, 0.77, 0.76])


@pytest.mark.parametrize("data", ["gsm8k", "alpaca", "wiki", "code"])
def test_rows_of_a_task_are_in_one_of_three_sets(data, data_dir):
    task = TASKS[f"stories_{data}"]
    training, validation, test = (
        {(*tokens, asked) for tokens, asked in part.rows}
        for part in read_data(task, str(data_dir), str(data_dir / task.model))
    )
    assert (len(validation), len(test)) == (VALIDATION_ROWS, TEST_ROWS)
    assert len(training | validation | test) == len(training) + VALIDATION_ROWS + TEST_ROWS
    assert len(training) > 1000


@pytest.mark.parametrize(
    ("steps", "rungs", "expected"),
    [
        (1600, None, [(1600, 4, 0), (1600, 3, 0), (1600, 5, 0), (1600, 4, 1)]),
        (1600, [0, -1], [(1600, 4, 0), (1600, 3, 0), (1600, 4, 1)]),
        (6400, [0], [(6400, 2, 0), (6400, 2, 1)]),
    ],
)
def test_a_longer_run_begins_at_the_rate_that_was_best_before(steps, rungs, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    for file, best in {"grid_stories_gsm8k": 4, "grid_stories_gsm8k_1200": 3, "grid_stories_gsm8k_2400": 2}.items():
        runs = runs_of("all, ends", {best - 1: 1.2, best: 1.0, best + 1: 1.1})
        if steps > 1600 or file == "grid_stories_gsm8k":
            (tmp_path / f"{file}.json").write_text(json.dumps({"figures": {"runs": runs}}), encoding="utf-8")
    tried = []

    def run(self, method, rung, seed):
        tried.append((self.task.steps, rung, seed))
        self.runs[key_of(method, rung, seed)] = {"validation": abs(rung - 4.2), "test": 1.0}

    monkeypatch.setattr(grid.Grid, "_run", run)
    arguments = argparse.Namespace(task="stories_gsm8k", steps=steps, data="", seeds=2, results=None, rungs=rungs)
    grid.Grid(arguments).tune("all, ends")
    assert tried == expected


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("sampled", "begins with"),
        ("half", "begins with"),
        ("none", "nothing trains"),
        ("all, end", "unknown part 'end'"),
    ],
)
def test_a_method_that_does_not_exist_is_refused(method, said):
    with pytest.raises(ValueError, match=said):
        Parts.parse(method)


def test_the_ladder_grows_until_the_best_rate_is_inside():
    assert next_rungs("all", {}, 2) == [2]
    assert next_rungs("all", runs_of("all", {2: 1.0}), 2) == [1, 3]
    assert next_rungs("all", runs_of("all", {1: 1.2, 2: 1.0, 3: 0.9}), 2) == [4]
    assert next_rungs("all", runs_of("all", {1: 1.2, 2: 1.0, 3: 1.1}), 2) == []


def test_rates_are_chosen_by_validation_rows_and_reported_on_test_rows():
    runs = runs_of("all", {1: 1.2, 2: 1.0, 3: 1.1})
    assert best_rung("all", runs) == 2
    assert losses_on_test_rows("all", runs) == {0: -1.0}, "not -1.2, the lowest test loss"


def test_another_scale_begins_where_the_first_one_ended():
    task = next(task for task in TASKS.values() if task.model == SMOLLM2)
    runs = runs_of("sampled 1/6, ends", {-1: 1.0, 0: 0.9, 1: 1.0})
    assert first_rung(task, "sampled 1/6, ends 1/4", runs) == 0
    assert first_rung(task, "sampled 1/6, ends 1/4", runs | runs_of("sampled 1/6", {2: 0.8})) == 2, "the highest"
    assert first_rung(task, "sampled 1/3, ends 1/4", runs) == -2, "the first rung of the model"


def test_differences_are_paired_by_seed():
    tests = {"all": [1.0, 2.0, 3.0], "none, ends": [1.5, 2.4, 3.6]}
    runs = {
        key_of(method, 0, seed): {"validation": 1.0, "test": loss}
        for method, losses in tests.items()
        for seed, loss in enumerate(losses)
    }
    mean, error = paired_difference("none, ends", "all", runs)
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(0.1 / 3**0.5)
    del runs[key_of("all", 0, 1)], runs[key_of("all", 0, 2)]
    assert paired_difference("none, ends", "all", runs) == (pytest.approx(0.5), None)
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference("none, ends", "lora 16", runs)
