"""LisaConfig refuses what cannot work, naming the flag, the value and the rule."""

from dataclasses import replace

import pytest

from lisa_dist import LisaConfig


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lisa_activated_layers": -1}, "--lisa_activated_layers -1: give a number of decoder layers, 0 or more"),
        (
            {"lisa_activated_layers": 0, "lisa_always_on": "rest", "lisa_frozen": "embed,head"},
            "neither embed nor head trains: nothing to train but norms",
        ),
        (
            {"lisa_activated_layers": 0, "lisa_always_on": "embed,rest"},
            "--lisa_activated_layers 0: head is to be sampled",
        ),
        ({"lisa_interval_steps": 0}, "--lisa_interval_steps 0: a period lasts at least 1 optimizer step."),
        ({"lisa_interval_steps": "few"}, "--lisa_interval_steps few: a period lasts at least 1"),
        ({"lisa_sampler": "random"}, "--lisa_sampler random: unknown; choose one of uniform"),
        ({"lisa_sampler": ["uniform"]}, "--lisa_sampler ['uniform']: unknown; choose one of uniform"),
        ({"lisa_sampler": "weighted"}, "--lisa_sampler weighted: it needs weights of the layers; give --lisa_weights"),
        (
            {"lisa_sampler": "weighted", "lisa_unit": "module", "lisa_budget": "3%"},
            "--lisa_unit module with --lisa_sampler weighted: it is for units of one size; give one of uniform, fixed",
        ),
        ({"lisa_weights_file": "w.json"}, "--lisa_sampler uniform with --lisa_weights_file w.json"),
        ({"lisa_weights_file": "w.json", "lisa_sampler": "adaptive"}, "the weighted and the balanced sampler read one"),
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
            {"lisa_unit": "module", "lisa_budget": "3%", "lisa_always_on": "embed,rest"},
            "--lisa_unit module: head would be sampled in the place of layers",
        ),
        ({"lisa_adapters": True}, "--lisa_adapters True: the rank of an adapter is at least 1"),
        ({"lisa_adapters": 0}, "--lisa_adapters 0: the rank of an adapter is at least 1; for none leave it out"),
        (
            {"lisa_adapters": 4, "lisa_unit": "module", "lisa_budget": "3%"},
            "--lisa_adapters 4 with --lisa_unit module: they are beside whole layers; leave one out",
        ),
        ({"lisa_lr_scale": "adapters=3"}, "--lisa_lr_scale adapters=3: there are no adapters; give --lisa_adapters"),
        ({"lisa_offload": "adapters"}, "--lisa_offload adapters: there are no adapters"),
        ({"lisa_adapters": 4, "lisa_state_bits": "adapters=factored"}, "embed and head can be factored"),
        ({"lisa_lr_scale": "embed=0"}, "--lisa_lr_scale embed=0: embed has 0; a scale is above 0, and finite; what"),
        ({"lisa_lr_scale": "embed=1,layers=-1"}, "layers has -1; a scale is above 0"),
        ({"lisa_lr_scale": "head=inf"}, "head has inf; a scale is above 0, and finite"),
        ({"lisa_lr_scale": "head=nan"}, "head has nan; a scale is above 0, and finite"),
        ({"lisa_lr_scale": "norms=2"}, "unknown block 'norms'; choose from embed, head, rest, adapters, layers"),
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
        ({"lisa_state_bits": "norms=8"}, "unknown block 'norms'; choose from embed, head, rest, adapters, layers"),
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
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match="lisa_") as error:
        LisaConfig.plain(**settings)
    assert said in str(error.value)


def test_settings_are_written_in_one_way():
    one, other = LisaConfig(lisa_state_bits="head=8, embed=8"), LisaConfig(lisa_state_bits="embed=8.0,head=8")
    assert one == other
    assert one.state_bits == {"embed": 8, "head": 8}
    assert LisaConfig(lisa_state_bits=" head = factored").lisa_state_bits == "head=factored"
    for given in ("3%", "0.03", 0.03, "3.00%"):
        assert LisaConfig(lisa_unit="module", lisa_budget=given).lisa_budget == "3%"
    assert LisaConfig(lisa_unit="module", lisa_budget=1 / 3).lisa_budget == "33.33333333%"


def test_blocks_come_in_model_order():
    config = LisaConfig(lisa_always_on=" rest , head", lisa_frozen="embed")
    assert config.always_on == ("head", "rest")
    assert config.frozen == ("embed",)
    assert config.sampled == ()
    assert LisaConfig(lisa_always_on="rest", lisa_frozen="head").sampled == ("embed",)


def test_adapters_are_always_on_at_a_rate_of_their_own():
    config = LisaConfig(lisa_adapters=4, lisa_always_on="rest", lisa_frozen="embed,head", lisa_activated_layers=0)
    assert (config.always_on, config.lisa_always_on) == (("rest", "adapters"), "rest")
    assert (config.lr_scales, config.lisa_lr_scale) == ({}, ""), "no layer is sampled, so the rate is theirs"
    assert LisaConfig().lr_scales == {"embed": 0.1, "head": 0.1}
    scales = {rank: LisaConfig.plain(lisa_adapters=rank).lr_scales for rank in (4, 16, 64)}
    assert scales == {rank: {"embed": 2, "head": 2, "adapters": rate} for rank, rate in ((4, 16), (16, 16), (64, 8))}
    assert replace(config, lisa_adapters=None, lisa_activated_layers=1).always_on == ("rest",)
    given = LisaConfig.plain(lisa_adapters=4, lisa_lr_scale="head=1,adapters=3").lr_scales
    assert given == {"embed": 2, "head": 1, "adapters": 3}
    assert LisaConfig.plain().lr_scales == {}


def test_offload_of_a_frozen_block_is_warned_of():
    with pytest.warns(UserWarning, match="--lisa_offload embed,layers: embed is in --lisa_frozen embed and has no"):
        config = LisaConfig(lisa_offload="layers,embed", lisa_frozen="embed", lisa_always_on="head,rest")
    assert config.offloaded == ("embed", "layers")


def test_a_scale_of_what_does_not_train_is_said():
    with pytest.warns(UserWarning, match="--lisa_lr_scale embed=0.5: embed does not train"):
        LisaConfig(lisa_lr_scale="embed=0.5", lisa_always_on="rest", lisa_frozen="embed,head")
    with pytest.warns(UserWarning, match="layers does not train"):
        LisaConfig(lisa_lr_scale="layers=0.123456789", lisa_activated_layers=0)
    assert LisaConfig.plain(lisa_lr_scale="layers=0.123456789").lr_scales == {"layers": 0.123456789}
