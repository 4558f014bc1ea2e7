"""What ZeRO-3 keeps for the backward pass, and until when."""

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_module
from models import tiny_llama, tiny_mixtral, token_batches
from ranks import run_ranks

import lisa_dist
from lisa_dist.zero import stage3


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_the_input_of_a_frozen_weight_is_not_kept(trains, has_bias):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 3, generator=generator, requires_grad=True)
    weight = torch.randn(4, 3, generator=generator, requires_grad=trains)
    bias = [torch.randn(4, generator=generator, requires_grad=True)] * has_bias
    wanted = [rows, *[weight] * trains, *bias]
    expected = torch.autograd.grad(torch.nn.functional.linear(rows, weight, *bias).square().sum(), wanted)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = stage3.LinearFunction.apply(rows, weight, *bias)
    assert (rows.data_ptr() in kept) == trains
    for gradient, right in zip(torch.autograd.grad(output.square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(gradient, right)


def test_a_recomputed_layer_stays_gathered_until_its_backward_pass_is_done(monkeypatch):
    """DeepSpeed's own ties it to the module whose backward pass began the recomputation."""
    model, kept = tiny_llama(num_layers=1), []
    monkeypatch.setattr(stage3, "keep_until_module_is_done", lambda *by_and_what: kept.append(by_and_what))
    stage3.remember_checkpointed_layers(model)
    (layer,) = model.model.layers
    for module, keeper in ((layer.mlp.down_proj, layer), (model.lm_head, model.lm_head)):
        stage3.keep_until_layer_is_done(module, module.weight)
        assert kept.pop() == (keeper, module.weight)


def whole_before_backward(passes: int) -> list[int]:
    """Elements that are whole when the backward passes of two steps begin, after so many forward passes alone."""
    engine, lisa = lisa_dist.initialize(tiny_llama(), "zero3", lisa_dist.LisaConfig.plain())
    rows, found = token_batches(1, rows=1)[0, 0], []
    with stage3.asking(engine) as model:
        for _ in range(passes):
            model(input_ids=rows)
    for _ in range(2):
        lisa.on_step_begin()
        loss = engine(input_ids=rows, labels=rows).loss
        whole = [one.ds_numel for one in engine.module.parameters() if one.ds_status is ZeroParamStatus.AVAILABLE]
        found.append(sum(whole))
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return found


@pytest.mark.usefixtures("cpu_ops")
def test_an_order_that_is_recorded_anew_is_not_followed_by_the_releases_of_the_old_one():
    plain, after_others = (run_ranks(whole_before_backward, 2, passes)[0] for passes in (0, 3))
    assert plain[0] < plain[1] == after_others[1]


def test_layers_with_parts_that_are_gathered_by_themselves_are_not_gathered_at_once():
    mixture, marked, plain = tiny_mixtral(), tiny_llama(), tiny_llama()
    set_z3_leaf_module(marked.model.layers[0].mlp, True)
    config = {"zero_optimization": {"stage": 3}}
    found = [stage3.gather_by_layers(model, [*model.model.layers], config) for model in (mixture, marked, plain)]
    assert found == [False, False, True]
    parameter = torch.nn.Parameter(torch.zeros(1))
    for leaf, is_left in ((marked.model.layers[0].mlp, True), (plain.model.layers[0], False)):
        parameter.ds_z3_leaf_module = leaf
        stage3.reduce_by_parameters([parameter])
        assert hasattr(parameter, "ds_z3_leaf_module") == is_left, "DeepSpeed reduces these together"
