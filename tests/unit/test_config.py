"""LisaConfig refuses what cannot work, naming the flag, the value and the rule."""

import math

import pytest

from lisa_dist import LisaConfig


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lisa_activated_layers": -1}, "--lisa_activated_layers -1: a period trains 0 decoder layers or more"),
        (
            {"lisa_activated_layers": 0, "lisa_always_on": "rest", "lisa_frozen": "embed,head"},
            "neither embed nor head trains: nothing to train but norms",
        ),
        (
            {"lisa_activated_layers": 0, "lisa_always_on": "embed,rest"},
            "--lisa_activated_layers 0: head is to be sampled",
        ),
        ({"lisa_importance": "loss"}, "--lisa_importance loss: unknown; choose one of gradient, update"),
        ({"lisa_importance_decay": 1.0}, "--lisa_importance_decay 1.0: a share of the past"),
        ({"lisa_importance_temperature": 0.0}, "--lisa_importance_temperature 0.0: a temperature is 0.001 or more"),
        ({"lisa_importance_floor": 1.5}, "--lisa_importance_floor 1.5: a part is from 0 to 1"),
        ({"lisa_lr_power": 2.0}, "--lisa_lr_power 2.0: a power is from -1 to 1"),
        ({"lisa_wake_warmup_steps": 20}, "--lisa_wake_warmup_steps 20: a period has --lisa_interval_steps 20 steps"),
        ({"lisa_interval_steps": 0}, "--lisa_interval_steps 0: a period lasts at least 1 optimizer step, or auto"),
        ({"lisa_interval_steps": "few"}, "--lisa_interval_steps few: a period lasts at least 1"),
        ({"lisa_interval_steps": "auto", "lisa_wake_warmup_steps": 20}, "has --lisa_interval_steps auto steps"),
        ({"lisa_sampler": "random"}, "--lisa_sampler random: unknown; choose one of uniform"),
        ({"lisa_sampler": "weighted"}, "--lisa_sampler weighted: it needs weights of the layers; give --lisa_weights"),
        (
            {"lisa_sampler": "weighted", "lisa_unit": "module", "lisa_budget": "3%"},
            "--lisa_sampler weighted: it needs weights of the layers; give --lisa_depth_bias.",
        ),
        ({"lisa_weights_file": "w.json"}, "--lisa_sampler uniform with --lisa_weights_file w.json"),
        ({"lisa_weights_file": "w.json", "lisa_sampler": "adaptive"}, "the weighted and the balanced sampler read one"),
        ({"lisa_depth_bias": 4.0}, "--lisa_depth_bias 4 with --lisa_sampler uniform: this sampler has no weights"),
        ({"lisa_depth_bias": 17.0, "lisa_sampler": "balanced"}, "--lisa_depth_bias 17.0: a power is from -16 to 16"),
        ({"lisa_depth_bias": math.nan, "lisa_sampler": "balanced"}, "--lisa_depth_bias nan: a power is from"),
        ({"lisa_unit": "block"}, "--lisa_unit block: unknown; choose one of layer, module"),
        ({"lisa_unit": "module"}, "--lisa_unit module: give --lisa_budget"),
        ({"lisa_budget": "3%"}, "--lisa_budget 3%: it is for --lisa_unit module"),
        ({"lisa_unit": "module", "lisa_budget": "0%"}, "--lisa_budget 0%: give a part of the whole, above 0 and at mo"),
        ({"lisa_unit": "module", "lisa_budget": "101%"}, "--lisa_budget 101%: give a part of the whole"),
        ({"lisa_unit": "module", "lisa_budget": "some"}, "--lisa_budget some: give a part of the whole"),
        (
            {"lisa_unit": "module", "lisa_budget": "3%", "lisa_activated_layers": 4},
            "--lisa_unit module with --lisa_activated_layers 4: of modules --lisa_budget says how many",
        ),
        (
            {"lisa_unit": "module", "lisa_budget": "3%", "lisa_activated_layers": "auto"},
            "--lisa_unit module with --lisa_activated_layers auto",
        ),
        (
            {"lisa_unit": "module", "lisa_budget": "3%", "lisa_sampler": "reshuffle"},
            "--lisa_unit module with --lisa_sampler reshuffle: it is for units of one size; give one of uniform, fixed",
        ),
        (
            {"lisa_unit": "module", "lisa_budget": "3%", "lisa_sampler": "weighted", "lisa_probe_steps": 5},
            "--lisa_unit module with --lisa_probe_steps 5: it is for layers",
        ),
        (
            {"lisa_unit": "module", "lisa_budget": "3%", "lisa_sampler": "weighted", "lisa_weights_file": "w.json"},
            "--lisa_unit module with --lisa_weights_file w.json: it is for layers",
        ),
        (
            {"lisa_unit": "module", "lisa_budget": "3%", "lisa_always_on": "embed,rest"},
            "--lisa_unit module: head would be sampled in the place of layers",
        ),
        ({"lisa_probe_steps": 10}, "--lisa_probe_steps 10 with --lisa_sampler uniform: this sampler has no weights"),
        ({"lisa_probe_steps": -1}, "--lisa_probe_steps -1: a probe takes 0 steps or more"),
        ({"lisa_probe_steps": 2.5}, "--lisa_probe_steps 2.5: a probe takes 0 steps or more"),
        (
            {"lisa_probe_steps": 5, "lisa_sampler": "balanced", "lisa_weights_file": "w.json"},
            "--lisa_probe_steps 5 with --lisa_weights_file w.json: both say how often layers train",
        ),
        (
            {"lisa_probe_steps": 5, "lisa_sampler": "balanced", "lisa_activated_layers": 0},
            "--lisa_probe_steps 5 with --lisa_activated_layers 0: no layer is sampled",
        ),
        ({"lisa_lr_scale": "embed=0"}, "--lisa_lr_scale embed=0: embed has 0; a scale is above 0, and finite; what"),
        ({"lisa_lr_scale": "embed=1,layers=-1"}, "layers has -1; a scale is above 0"),
        ({"lisa_lr_scale": "head=inf"}, "head has inf; a scale is above 0, and finite"),
        ({"lisa_lr_scale": "head=nan"}, "head has nan; a scale is above 0, and finite"),
        ({"lisa_lr_scale": "norms=2"}, "unknown block 'norms'; choose from embed, head, rest, layers"),
        ({"lisa_lr_scale": "embed=half"}, "'embed=half' is no block=number"),
        ({"lisa_state": "forget"}, "--lisa_state forget: unknown; choose one of reset"),
        ({"lisa_always_on": "embed,tail"}, "--lisa_always_on embed,tail: unknown block 'tail'"),
        ({"lisa_frozen": "embed"}, "both name embed"),
        (
            {"lisa_state_bits": "embed=4"},
            "embed=4: moments have 8 or 32 bits, or are factored; embed has 4",
        ),
        (
            {"lisa_state_bits": "layers=factored"},
            "embed and head can be factored, where a row is a token; give layers=8",
        ),
        ({"lisa_state_bits": "rest=factored"}, "give rest=8"),
        ({"lisa_state_bits": "embed=factor"}, "'embed=factor' is no block=number|factored"),
        (
            {"lisa_offload": "head", "lisa_state_bits": "head=factored"},
            "on the host have 32 bits; take head",
        ),
        ({"lisa_state_bits": "norms=8"}, "unknown block 'norms'; choose from embed, head, rest, layers"),
        (
            {"lisa_offload": "embed,tail"},
            "--lisa_offload embed,tail: unknown block 'tail'; choose from embed, head, rest",
        ),
        ({"lisa_offload": "embed", "lisa_state_bits": "embed=8"}, "--lisa_offload embed: states on the host have 32"),
        (
            {"lisa_block_probability": "embed=0.5"},
            "--lisa_block_probability embed=0.5: embed is always-trained or frozen",
        ),
        ({"lisa_always_on": "rest", "lisa_block_probability": "embed=2"}, "embed has 2"),
        ({"lisa_always_on": "rest", "lisa_block_probability": "embed=0"}, "embed has 0"),
        ({"lisa_always_on": "rest", "lisa_block_probability": "tail=0.5"}, "unknown block 'tail'"),
        ({"lisa_always_on": "rest", "lisa_block_probability": "embed=often"}, "'embed=often' is no block=number"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match="lisa_") as error:
        LisaConfig(**settings)
    assert said in str(error.value)


def test_settings_are_written_in_one_way():
    one, other = LisaConfig(lisa_state_bits="head=8, embed=8"), LisaConfig(lisa_state_bits="embed=8.0,head=8")
    assert one == other
    assert one.state_bits == {"embed": 8, "head": 8}
    assert LisaConfig(lisa_state_bits=" head = factored").lisa_state_bits == "head=factored"


def test_blocks_come_in_model_order():
    config = LisaConfig(lisa_always_on=" rest , head", lisa_frozen="embed")
    assert config.always_on == ("head", "rest")
    assert config.frozen == ("embed",)
    assert config.sampled == ()
    assert LisaConfig(lisa_always_on="rest", lisa_frozen="head").sampled == ("embed",)


def test_offload_of_a_frozen_block_is_warned_of():
    with pytest.warns(UserWarning, match="--lisa_offload embed,layers: embed is in --lisa_frozen embed and has no"):
        config = LisaConfig(lisa_offload="layers,embed", lisa_frozen="embed", lisa_always_on="head,rest")
    assert config.offloaded == ("embed", "layers")


def test_importance_without_the_adaptive_sampler_is_warned_of():
    with pytest.warns(UserWarning, match="--lisa_importance_floor 0.5 with --lisa_sampler uniform: it has no effect"):
        LisaConfig(lisa_importance_floor=0.5)


def test_the_learning_rate_scales_with_gamma():
    assert LisaConfig().rate_factor(32) == 1
    assert LisaConfig(lisa_lr_power=0.5).rate_factor(32) == 4  # the root of 32 / 2
    assert LisaConfig(lisa_lr_power=0.5, lisa_activated_layers=32).rate_factor(32) == 1
    assert LisaConfig(lisa_lr_power=1.0, lisa_activated_layers=0).rate_factor(32) == 32


@pytest.mark.parametrize(
    ("total_steps", "num_layers", "settings", "steps"),
    [
        (10_000, 32, {}, 20),  # the paper's
        (400, 32, {}, 12),  # 33 periods, of which a layer has two
        (64, 32, {}, 2),
        (10, 32, {}, 1),
        (400, 32, {"lisa_unit": "module", "lisa_budget": "5%"}, 10),
        (400, 32, {"lisa_activated_layers": 8}, 20),
        (5, 32, {"lisa_activated_layers": 0}, 20),  # nothing is sampled
        (10, 32, {"lisa_wake_warmup_steps": 3}, 4),  # a warm-up is shorter
    ],
)
def test_periods_are_so_short_that_each_layer_has_two(total_steps, num_layers, settings, steps):
    config = LisaConfig(lisa_interval_steps="auto", **settings)
    settled = config.with_interval(total_steps, num_layers)
    assert settled.to_dict() == config.to_dict() | {"lisa_interval_steps": steps}
    if 1 < steps < 20 and not config.lisa_wake_warmup_steps:
        share = config.budget if config.by_module else config.lisa_activated_layers / num_layers
        assert total_steps // steps * share >= 2
        assert total_steps // (steps + 1) * share < 2


def test_layers_are_settled_before_the_steps_of_a_period():
    config = LisaConfig(lisa_interval_steps="auto", lisa_activated_layers="auto")
    with pytest.raises(ValueError, match="--lisa_activated_layers auto: lisa-dist train and lisa-dist plan make"):
        config.with_interval(100, 32)


def test_a_scale_of_what_does_not_train_is_said():
    with pytest.warns(UserWarning, match="--lisa_lr_scale embed=0.5: embed does not train"):
        LisaConfig(lisa_lr_scale="embed=0.5", lisa_always_on="rest", lisa_frozen="embed,head")
    with pytest.warns(UserWarning, match="layers does not train"):
        LisaConfig(lisa_lr_scale="layers=0.123456789", lisa_activated_layers=0)
    assert LisaConfig(lisa_lr_scale="layers=0.123456789").lr_scales == {"layers": 0.123456789}


def test_a_loop_of_ones_own_gives_a_number_of_steps():
    with pytest.raises(ValueError, match="--lisa_interval_steps auto: a trainer makes a number of it"):
        LisaConfig(lisa_interval_steps="auto").check_settled()


def test_a_budget_has_one_way_of_writing():
    for given in ("3%", "0.03", 0.03, "3.00%"):
        assert LisaConfig(lisa_unit="module", lisa_budget=given).lisa_budget == "3%"
    assert LisaConfig(lisa_unit="module", lisa_budget=1 / 3).lisa_budget == "33.33333333%"
