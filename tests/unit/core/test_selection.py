"""Which blocks a period trains: what the optimizer is built over, and at which rates it steps."""

import pytest
import torch
from models import tiny_llama

from lisa_dist import LisaConfig
from lisa_dist.core.blocks import find_blocks, split_into_modules
from lisa_dist.core.controller import LisaController
from lisa_dist.core.sampling import ActiveSet
from lisa_dist.core.selection import BlockSelection, most_active, scale_rates, unit_budget


def test_the_optimizer_is_built_over_a_layer_in_every_slot_and_every_sampled_block():
    rare = "embed=0.2,head=0.2"
    config = LisaConfig(lisa_always_on="rest", lisa_activated_layers=4, lisa_block_probability=rare)
    sampling = BlockSelection(config, find_blocks(tiny_llama()))
    widest = sampling.widest(ActiveSet((1, 4), ("embed",)))
    assert widest == ActiveSet((0, 1, 2, 4), ("embed", "head"))
    assert sampling.widest(ActiveSet((0, 2, 3, 5))) == ActiveSet((0, 2, 3, 5), ("embed", "head"))


def test_a_model_of_which_nothing_would_train_is_refused():
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name)
    with pytest.raises(ValueError, match="--lisa_activated_layers 0, and what else would train has requires_grad"):
        LisaController(model, LisaConfig(lisa_activated_layers=0)).param_groups()


MODULES = {"lisa_unit": "module", "lisa_budget": "8%"}


def by_module(model, **settings) -> BlockSelection:
    blocks = split_into_modules(model, find_blocks(model))
    blocks.leave_out_frozen()
    return BlockSelection(LisaConfig.plain(**MODULES | settings), blocks)


def test_there_is_a_slot_for_the_most_modules_that_fit():
    """A tiny Llama's linear modules have 2 x 2,048, 2 x 4,096 and 3 x 6,144 parameters, in 6 layers."""
    sampling = by_module(tiny_llama())
    assert sampling.most_active == 7, "of 14,745 parameters: 7 x 2,048"
    sets = [sampling.sample(period) for period in range(30)]
    assert len({len(active.layers) for active in sets}) > 1
    assert all(len(sampling.widest(active).layers) == 7 for active in sets)
    groups = sampling.param_groups(sets[0])
    assert [group["lisa_group"] for group in groups[-7:]] == [f"slot{slot}/decay" for slot in range(7)]
    for active in sets:
        found = sampling.params_of_groups(active)
        assert len(found) == len(groups)
        assert sum(bool(params) for params in found[-7:]) == len(active.layers)


@pytest.mark.parametrize(("budget", "sizes"), [("29%", [29, 71]), (1 / 3, [10**8, 10**8, 10**8])])
def test_a_budget_that_is_a_module_s_share_to_the_last_digit_holds_it(budget, sizes):
    config = LisaConfig(lisa_unit="module", lisa_budget=budget)
    assert unit_budget(config, sizes) == sizes[0]
    assert most_active(config, sizes) == 1


def test_a_budget_below_the_smallest_module_is_refused():
    with pytest.raises(ValueError, match=r"--lisa_budget 1%: 1843 of 0.18 M parameters, .* has 2048; give 1.12% or"):
        by_module(tiny_llama(), lisa_budget="1%")
    assert by_module(tiny_llama(), lisa_budget="1.12%").most_active == 1
    assert by_module(tiny_llama(), lisa_budget="100%").most_active == 42


def test_a_module_that_the_user_has_frozen_is_never_sampled():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.requires_grad_(False)
        layer.self_attn.q_proj.requires_grad_(False)
    sampling = by_module(model, lisa_budget="20%")
    names = {sampling.describe(sampling.sample(period)) for period in range(40)}
    assert not any("mlp" in name or "q_proj" in name for name in names)
    assert any("o_proj" in name for name in names)
    groups = sampling.param_groups(sampling.sample(0))
    trained = [name for key in sampling.names_of(group["params"] for group in groups) for name in key]
    assert not any("mlp" in name or "q_proj" in name for name in trained)
    slots = {group["lisa_group"].partition("/")[0] for group in groups} - {"embed", "head", "rest"}
    assert len(slots) == sampling.most_active, "no slot is taken by a frozen module"


def test_the_optimizer_is_built_over_the_smallest_modules_besides_those_of_a_period():
    model = tiny_llama()
    sampling = by_module(model)
    numel = [module.numel for module in split_into_modules(model, find_blocks(model)).layers]
    active = ActiveSet((numel.index(max(numel)),))
    others = set(sampling.widest(active).layers) - set(active.layers)
    assert [numel[module] for module in others] == [min(numel)] * 6


def test_modules_have_no_probabilities_of_their_own():
    """Since a module is sampled where it still fits, its weight is no chance."""
    sampling = by_module(tiny_llama(), lisa_sampler="adaptive")
    assert sampling.probabilities(sampling.sample(0)) == []


def test_a_budget_may_change_where_a_period_begins():
    state = LisaController(tiny_llama(), LisaConfig.plain(**MODULES)).state_dict()
    other = LisaController(tiny_llama(), LisaConfig(**MODULES | {"lisa_budget": "30%"}))
    with pytest.raises(ValueError, match=r"--lisa_budget 30% \(it had 8%\)"):
        other.load_state_dict(state | {"step": 5})
    other.load_state_dict(state | {"step": 40})
    assert other.period == 2
    active = sum(other.blocks.layers[module].numel for module in other.active_layers)
    assert 0.2 < active / sum(module.numel for module in other.blocks.layers) <= 0.3


def test_rates_are_whole_again_after_a_step_that_has_raised():
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([{"params": [parameter], "lisa_group": "slot0/decay", "lr": 1.0}])
    scale_rates(optimizer, {"layers": 0.5})
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(parameter, torch.full((2, 2), -0.5))
    assert optimizer.param_groups[0]["lr"] == 1.0
