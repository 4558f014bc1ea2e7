"""The state of a saved run: which settings may change, and where."""

import pytest
from models import tiny_llama

import lisa_dist
from lisa_dist.core.controller import LisaController


def test_a_state_without_newer_settings_has_them_as_by_default():
    """In the middle of a period, where no other setting may come in."""
    lisa = LisaController(tiny_llama(), lisa_dist.LisaConfig.plain())
    state = lisa.state_dict() | {"step": 7}
    for name in ("lisa_unit", "lisa_lr_scale", "lisa_frozen_bits"):
        del state["config"][name]
    assert lisa.check_state_dict(state) == []
    other = LisaController(tiny_llama(), lisa_dist.LisaConfig(lisa_sampler="balanced"))
    with pytest.raises(ValueError, match="had other settings than --lisa_sampler balanced") as error:
        other.check_state_dict(state)
    assert "--lisa_weights_file" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 99}, "has version 99; this release reads 1"),
        ({"visit_counts": [0] * 4}, "of a model with 4 decoder"),
    ],
)
def test_a_state_of_another_kind_is_refused(change, said):
    lisa = LisaController(tiny_llama(), lisa_dist.LisaConfig.plain())
    with pytest.raises(ValueError, match=said):
        lisa.load_state_dict(lisa.state_dict() | change)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lisa_activated_layers": 3}, "--lisa_activated_layers 3 (it had 2)"),
        ({"lisa_interval_steps": 4}, "--lisa_interval_steps 4 (it had 6)"),
        (
            {"lisa_sampler": "reshuffle", "lisa_seed": 5},
            "reshuffle (it had uniform), --lisa_seed 5 (it had 0)",
        ),
        ({"lisa_always_on": "head,rest", "lisa_frozen": "embed"}, "--lisa_frozen embed (it had )"),
    ],
)
def test_other_settings_begin_with_a_period_only(settings, said):
    saved = LisaController(tiny_llama(), lisa_dist.LisaConfig(lisa_interval_steps=6)).state_dict()
    other = lisa_dist.LisaConfig(**{"lisa_interval_steps": 6} | settings)
    with pytest.raises(ValueError, match="had other settings than") as error:
        LisaController(tiny_llama(), other).load_state_dict(saved | {"step": 5})
    assert said in str(error.value)
    assert f"a multiple of {12 if 'lisa_interval_steps' in settings else 6} steps" in str(error.value)
    lisa = LisaController(tiny_llama(), other)
    lisa.load_state_dict(saved | {"step": 12, "period": 1})
    assert lisa.period == 12 // other.lisa_interval_steps
    assert len(lisa.active_layers) == other.lisa_activated_layers


def test_settings_that_decide_on_no_layer_may_change_at_any_step():
    saved = LisaController(tiny_llama(), lisa_dist.LisaConfig.plain()).state_dict() | {
        "step": 7,
        "active_layers": [1, 4],
    }
    lisa = LisaController(tiny_llama(), lisa_dist.LisaConfig(lisa_state="reset_all", lisa_debug=True))
    lisa.load_state_dict(saved)
    assert lisa.active_layers == (1, 4)
