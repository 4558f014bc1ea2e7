"""What ZeRO-3 keeps for the backward pass, and until when."""

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from models import tiny_llama, token_batches
from ranks import run_ranks

import lisa_dist
from lisa_dist.core.sequence_parallel import probing
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
    engine, lisa = lisa_dist.initialize(tiny_llama(), "zero3", lisa_dist.LisaConfig())
    rows, found = token_batches(1, rows=1)[0, 0], []
    with probing(engine) as model:
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
