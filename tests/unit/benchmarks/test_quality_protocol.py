"""The comparison of every method: which arms run, which rates they try, and how many steps they take."""

import argparse
import json

import pytest
from transformers import LlamaConfig

from benchmarks.quality.arms import PROTOCOL, protocol_of
from benchmarks.quality.quality import beyond, steps_of, window_of
from benchmarks.tables.runs import quality_key

pytestmark = pytest.mark.full


def test_arms_of_more_layers_than_a_model_has_are_left_out(tmp_path):
    LlamaConfig(num_hidden_layers=5).save_pretrained(tmp_path / "five")
    LlamaConfig(num_hidden_layers=8).save_pretrained(tmp_path / "eight")
    assert set(PROTOCOL) - set(protocol_of(str(tmp_path / "five"))) == {"lisa 8 upper, embed frozen"}
    assert protocol_of(str(tmp_path / "eight")) == list(PROTOCOL)


def test_every_arm_tries_as_many_rates_and_more_where_the_best_is_at_an_end():
    arguments = argparse.Namespace(middle=["lora r16=1e-3"], rate=1e-4, num_rates=3)
    assert window_of("full", arguments) == [5e-5, 1e-4, 2e-4]
    assert window_of("lora r16", arguments) == [5e-4, 1e-3, 2e-3]

    def figures(*losses: float) -> dict:
        at_rates = zip([5e-5, 1e-4, 2e-4], losses, strict=True)
        return {quality_key("full", rate, 0): {"held_out": loss} for rate, loss in at_rates}

    assert beyond("full", figures(1.0, 2.0, 3.0)) == 2.5e-5
    assert beyond("full", figures(3.0, 2.0, 1.0)) == 4e-4
    assert beyond("full", figures(2.0, 1.0, 3.0)) is None


def test_at_equal_time_a_faster_arm_takes_more_steps(tmp_path):
    path, costs = tmp_path / "pareto.json", {"full": {"seconds": 3.0}, "lora r16": {"seconds": 1.2}}
    path.write_text(json.dumps({"figures": {"costs": {"model, rows: 1": costs}}}))
    arguments = argparse.Namespace(model="a/model", rows=1, steps=100, same_time_as=path)
    assert [steps_of(arm, arguments) for arm in ("full", "lora r16")] == [100, 250]
    with pytest.raises(SystemExit, match="has no lisa 2"):
        steps_of("lisa 2", arguments)
    arguments.rows = 2
    with pytest.raises(SystemExit, match="has no full, lora r16 of this model"):
        steps_of("lora r16", arguments)
    arguments.same_time_as = None
    assert steps_of("lisa 2", arguments) == 100
