"""Products in fp8 with frozen matrices: against the same codes multiplied in fp32, and a run's losses."""

import pytest
import torch
from engines import train_step
from models import tiny_gpt2, tiny_llama, tiny_qwen3_moe, token_batches
from ranks import run_ranks

import lisa_dist
from lisa_dist.core.blocks import find_blocks
from lisa_dist.core.fp8_product import Fp8Product
from lisa_dist.core.frozen_layers import FrozenLayers
from lisa_dist.kernels.fp8_rows import fp8_rows_torch, from_fp8_rows


@pytest.mark.parametrize("has_bias", [False, True])
def test_both_passes_multiply_codes(has_bias, monkeypatch):
    multiply = torch._scaled_mm

    def by_columns(first, second, **options):
        assert (first.stride(1), second.stride(0)) == (1, 1), "GPUs take no other layout"
        return multiply(first, second, **options)

    monkeypatch.setattr(torch, "_scaled_mm", by_columns)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    inputs, weight, gradient = random(2, 24, 64).requires_grad_(), random(96, 64), random(2, 24, 96)
    bias = random(96).requires_grad_() if has_bias else None
    encoded = fp8_rows_torch(weight)
    product = Fp8Product.apply(inputs, bias, *encoded, lambda: encoded)
    product.backward(gradient)

    whole = from_fp8_rows(*encoded, torch.float32)
    rows = from_fp8_rows(*fp8_rows_torch(inputs.detach().view(-1, 64)), torch.float32).view(2, 24, 64)
    expected = rows @ whole.t() + (0 if bias is None else bias.detach().float())
    torch.testing.assert_close(product.float(), expected, rtol=2e-2, atol=2e-2)
    folded = fp8_rows_torch(gradient.view(-1, 96), encoded[1].view(-1))
    of_inputs = from_fp8_rows(*folded, torch.float32) @ encoded[0].float()
    torch.testing.assert_close(inputs.grad.float().view(-1, 64), of_inputs, rtol=2e-2, atol=2e-2)
    exact = gradient.float() @ weight.float()
    assert (inputs.grad.float() - exact).norm() < 0.06 * exact.norm()
    if bias is not None:
        assert torch.equal(bias.grad, gradient.flatten(0, 1).sum(0))


def passes(build, multiplies: bool) -> list[torch.Tensor]:
    model = build().to(torch.bfloat16)
    for layer in (blocks := find_blocks(model)).layers:
        layer.requires_grad_(False)
    frozen = FrozenLayers(model, blocks, "fp8", "host", torch.device("cpu"))
    frozen.multiplies_fp8 = multiplies
    frozen.begin(())
    (loss := model(input_ids=(rows := token_batches(1, rows=2)[0, 0]), labels=rows).loss).backward()
    return [loss.detach(), *(value.grad for value in model.parameters() if value.grad is not None)]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_qwen3_moe])
def test_without_such_units_a_matrix_is_made_whole(build):
    """As GPT-2's and experts are anyway: what is computed is near, and the weights are the same."""
    (loss, *gradients), (expected, *others) = passes(build, multiplies=True), passes(build, multiplies=False)
    assert loss.item() == pytest.approx(expected.item(), abs=0.02)
    for one, other in zip(gradients, others, strict=True):
        assert (one.float() - other.float()).norm() <= 0.15 * other.float().norm()
    assert torch.equal(loss, expected) == (build is tiny_gpt2)


def losses(bits: str, offload: str) -> list[float]:
    config = lisa_dist.LisaConfig(lisa_interval_steps=2, lisa_frozen_bits=bits, lisa_offload=offload, lisa_debug=True)
    model = tiny_llama().to(torch.bfloat16)
    engine, lisa = lisa_dist.initialize(model, "zero2", config, lr=1e-3)
    found = [train_step(engine, lisa, micro_batches) for micro_batches in token_batches(6, rows=4)]
    lisa.close()
    engine.destroy()
    return found


@pytest.mark.usefixtures("cpu_ops")
def test_a_run_in_fp8_is_near_that_in_16_bits_and_streams():
    whole, fp8, streamed = (run_ranks(losses, 2, *given)[0] for given in (("16", ""), ("fp8", ""), ("fp8", "frozen")))
    assert fp8 == streamed
    assert fp8 != whole
    assert fp8 == pytest.approx(whole, abs=0.03)
