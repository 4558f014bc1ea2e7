"""The gradient of an embedding by the rows that occur: what trains is what trains by whole gradients."""

import functools
from unittest.mock import patch

import pytest
import torch
from cases import full
from engines import ROW_NAMES, full_weights, train_step, without
from models import tiny_gpt2, tiny_llama, token_batches
from ranks import run_ranks
from torch import nn

import lisa_dist
from lisa_dist.zero import embedding_rows
from lisa_dist.zero.embedding_rows import EmbeddingRows, embedding_of

STEPS, INTERVAL = 7, 2
FACTORED = {"lisa_state_bits": "embed=factored,head=factored"}
EIGHT_BITS = {"lisa_state_bits": "embed=8,head=8,layers=8"}
DRAWN = {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.6", "lisa_activated_layers": 1}


def train(ds_config: str, by_rows: bool, dtype: torch.dtype, settings: dict, options: dict) -> dict:
    """Losses and weights of a few steps; whether the embedding ever had a gradient of its own, or of rows."""
    settings = {"lisa_interval_steps": INTERVAL, "lisa_debug": True} | settings
    model = options.get("build", functools.partial(tiny_llama, vocab_size=131))().to(dtype)
    accumulation = options.get("accumulation", 1)
    most = options.get("max_ranks", embedding_rows.MAX_RANKS)
    with without(*(() if by_rows else ROW_NAMES)), patch.object(embedding_rows, "MAX_RANKS", most):
        engine, lisa = lisa_dist.initialize(
            model,
            options.get("config", ds_config),
            lisa_dist.LisaConfig.plain(**settings),
            lr=1e-3,
            weight_decay=0.1,
            optim="lisa_adamw",
            gradient_accumulation_steps=accumulation,
        )
        embedding = model.get_input_embeddings()
        whole, trains = [], embedding.weight.requires_grad
        embedding.weight.requires_grad_(True)  # to take the hook, whichever period is the first
        embedding.weight.register_post_accumulate_grad_hook(lambda weight: whole.append(weight.grad.shape))
        embedding.weight.requires_grad_(trains)
        losses, kept = [], []
        for micro_batches in token_batches(STEPS, rows=4, micro_batches=accumulation, length=8):
            losses.append(train_step(engine, lisa, micro_batches))
            kept.append(isinstance(getattr(embedding.forward, "__self__", None), EmbeddingRows))
        weights = full_weights(engine)
        lisa.close()
        assert "forward" not in vars(embedding), "another trainer's gradients are its own"
        engine.destroy()
    return {"losses": losses, "weights": weights, "whole": len(whole), "by_rows": kept}


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(
    ("ds_config", "world_size", "dtype", "settings", "options"),
    [
        ("zero2", 1, torch.float32, {}, {}),
        full("zero1", 1, torch.bfloat16, EIGHT_BITS | {"lisa_master": "bf16_sr"}, {"accumulation": 2}),
        ("zero2", 2, torch.bfloat16, FACTORED, {"accumulation": 2}),
        full("zero1", 2, torch.float32, {}, {"accumulation": 3}),
        ("zero2", 2, torch.float32, EIGHT_BITS | DRAWN, {}),
        full("zero2", 4, torch.float32, FACTORED, {}),
        full("zero1", 4, torch.bfloat16, {"lisa_master": "bf16_sr"}, {}),
    ],
)
def test_rows_train_as_whole_gradients_do(ds_config, world_size, dtype, settings, options):
    """To the bit where sums have one order: on one rank and on two, which add two numbers."""
    by_rows = run_ranks(train, world_size, ds_config, True, dtype, settings, options)
    whole = run_ranks(train, world_size, ds_config, False, dtype, settings, options)
    drawn = "embed" not in settings.get("lisa_always_on", "embed")
    for found, expected in zip(by_rows, whole, strict=True):
        assert found["whole"] == 0
        assert expected["whole"] > 0
        assert any(found["by_rows"])
        assert all(found["by_rows"]) != drawn, "an embedding that does not train is looked up as ever"
        assert not any(expected["by_rows"])
        if world_size <= 2:
            assert found["losses"] == expected["losses"]
        tolerance = 0.0 if world_size <= 2 else 1e-5 if dtype == torch.float32 else 1e-2
        assert found["losses"] == pytest.approx(expected["losses"], abs=tolerance)
        for name, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=10 * tolerance, msg=name)


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(("world_size", "dtype"), [(2, torch.bfloat16), full(4, torch.float32)])
def test_on_more_ranks_than_exchange_rows_the_whole_gradient_is_reduced(world_size, dtype):
    """To the bit on two ranks, to rounding on more."""
    options = {"accumulation": 2}
    whole = run_ranks(train, world_size, "zero2", True, dtype, {}, options | {"max_ranks": world_size - 1})[0]
    by_rows = run_ranks(train, world_size, "zero2", True, dtype, {}, options | {"max_ranks": world_size})[0]
    assert whole["whole"] > 0
    assert not any(whole["by_rows"])
    assert all(by_rows["by_rows"])
    for name, value in by_rows["weights"].items():
        torch.testing.assert_close(whole["weights"][name], value, rtol=0, atol=0 if world_size == 2 else 1e-4, msg=name)


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(
    ("ds_config", "options"),
    [
        ("zero2", {"build": tiny_gpt2}),  # tied, and beside the positions
        full("zero3", {}),
        full("zero2", {"build": functools.partial(tiny_llama, tied=True)}),
    ],
)
def test_others_keep_whole_gradients(ds_config, options):
    outcome = run_ranks(train, 2, ds_config, True, torch.float32, {}, options)[0]
    assert not any(outcome["by_rows"])


def test_only_a_plain_embedding_is_looked_up_by_rows():
    class Scaled(nn.Embedding):
        def forward(self, tokens):
            return super().forward(tokens) * 2

    model = nn.Module()
    for name, module in {
        "plain": nn.Embedding(4, 3),
        "padded": nn.Embedding(4, 3, padding_idx=1),
        "scaled": Scaled(4, 3),
        "sparse": nn.Embedding(4, 3, sparse=True),
        "limited": nn.Embedding(4, 3, max_norm=1.0),
        "tied": nn.Embedding(4, 3),
    }.items():
        model.add_module(name, module)
    model.head = nn.Linear(3, 4, bias=False)
    model.head.weight = model.tied.weight
    found = [name for name, module in model.named_children() if embedding_of(model, module.weight) is module]
    assert found == ["plain", "padded"]


def test_padding_has_no_gradient():
    torch.manual_seed(0)
    embedding, plain = (nn.Embedding(10, 4, padding_idx=3) for _ in range(2))
    plain.load_state_dict(embedding.state_dict())
    rows = EmbeddingRows(embedding, [None], None, divides=False)
    tokens = torch.tensor([[3, 1, 7], [1, 3, 3]])
    gradient = torch.randn(2, 3, 4)
    plain(tokens).backward(gradient)
    looked_up = embedding(tokens)
    assert torch.equal(looked_up, plain(tokens))
    looked_up.backward(gradient)
    assert embedding.weight.grad is None
    ((indices, values),) = rows.noted
    assert torch.equal(plain.weight.grad[indices], values)
    with torch.no_grad():
        assert not embedding(tokens).requires_grad


def rows_of_a_backward_pass(is_thrown_away: bool) -> int:
    """How many wait for the step, of which this is the first micro-batch of two."""
    engine, lisa = lisa_dist.initialize(tiny_llama(), "zero2", optim="lisa_adamw", gradient_accumulation_steps=2)
    rows = engine.module.get_input_embeddings().forward.__self__
    tokens = token_batches(1, rows=2)[0, 0]
    lisa.on_step_begin()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    if is_thrown_away:
        engine.optimizer.zero_grad()
    return len(rows.take()[0].indices)


@pytest.mark.usefixtures("cpu_ops")
def test_gradients_that_are_set_to_zero_leave_no_rows():
    assert run_ranks(rows_of_a_backward_pass, 1, False)[0] > 0
    assert run_ranks(rows_of_a_backward_pass, 1, True)[0] == 0
