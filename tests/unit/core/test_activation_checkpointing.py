"""Gradient checkpointing by number of layers: which layers, and how few."""

from collections import Counter

import pytest
import torch
from models import SIZES, tiny_llama, token_batches
from transformers import LlamaConfig

from lisa_dist.core import activation_checkpointing
from lisa_dist.core.activation_checkpointing import (
    Checkpointing,
    check_checkpointing,
    checkpoint_layers,
    checkpointed_layers,
    fewest_layers,
    number_of_layers,
    parse_budget,
    parse_checkpointed_layers,
    tile_mlps,
)
from lisa_dist.core.blocks import find_blocks
from lisa_dist.memory.trace import FakeRun
from lisa_dist.memory.workload import Trained, Workload


def test_values_of_the_flag():
    given = {None: None, "none": 0, "All": "all", "auto": "auto", "3": 3, 0: 0, 5: 5}
    assert {value: parse_checkpointed_layers(value) for value in given} == given
    assert number_of_layers("all", 6) == number_of_layers(6, 6) == 6
    for bad in ("some", "-1", "2.5", True):
        with pytest.raises(ValueError, match="give none, all, auto or a number"):
            parse_checkpointed_layers(bad)
    with pytest.raises(ValueError, match="--checkpointed_layers 7: the model has 6 decoder layers"):
        number_of_layers(7, 6)


def test_it_is_seen_whether_checkpointing_was_turned_on_or_off():
    model = tiny_llama(num_layers=1)
    checkpointing = Checkpointing(model)
    seen = [checkpointing.has_changed()]
    for turn in (lambda: None, model.gradient_checkpointing_disable, model.gradient_checkpointing_enable) * 2:
        turn()
        seen.append(checkpointing.has_changed())
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable()
    assert checkpointing.has_changed(), "as it was, but turned on anew"
    assert seen == [True, False, True, True, False, True, True]


def test_a_budget_is_of_what_keeps_to_it():
    assert parse_budget(None, is_kept_to=False) is None
    assert parse_budget("2GiB", is_kept_to=True) == 2 * 2**30
    with pytest.raises(ValueError, match="only --checkpointed_layers auto and --lisa_activated_layers auto keep to it"):
        parse_budget("2GiB", is_kept_to=False)
    with pytest.raises(ValueError, match="--gpu_memory much: not a size"):
        parse_budget("much", is_kept_to=True)


def test_the_fewest_layers_that_fit():
    peaks = [100, 93, 86, 80, 71, 65, 64, 50, 40]
    asked = []

    def peak(count: int) -> int:
        asked.append(count)
        return peaks[count]

    for budget in range(30, 110):
        fitting = [count for count, one in enumerate(peaks) if one <= budget]
        asked.clear()
        assert fewest_layers(peak, 8, budget) == (fitting[0] if fitting else 8)
        assert len(asked) <= 6
    assert fewest_layers(peak, 0, 1) == 0


def test_the_lowest_layers_are_checkpointed_and_their_number_goes_both_ways():
    model = tiny_llama().train()
    blocks = find_blocks(model)
    tokens = token_batches(1, rows=2)[0, 0]
    stored = {}
    for count in (0, 2, 6, 3, 0):
        checkpoint_layers(model, blocks, count)
        assert checkpointed_layers(model, blocks) == count
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [n < count for n in range(6)]
        saved = 0

        def save(tensor):
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model(input_ids=tokens, labels=tokens).loss.backward()
        assert stored.setdefault(count, saved) == saved
    assert stored[6] < stored[3] < stored[2] < stored[0]


def test_layers_that_cannot_be_checkpointed_one_by_one():
    model = tiny_llama()
    blocks = find_blocks(model)
    model.model.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(6))
    with pytest.raises(ValueError, match="--checkpointed_layers 2: the layers of LlamaForCausalLM cannot be"):
        checkpoint_layers(model, blocks, 2)


def test_layers_that_were_switched_off_are_not_reentrant_again():
    """Where the embedding is frozen, the reentrant way has no gradients to give."""
    model = tiny_llama().train()
    model.get_input_embeddings().requires_grad_(False)
    blocks = find_blocks(model)
    for count in (0, 6):
        checkpoint_layers(model, blocks, count)
    tokens = token_batches(1, rows=2)[0, 0]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
    check_checkpointing(model)
    model.gradient_checkpointing_disable()  # which leaves torch's own function
    check_checkpointing(model)
    model.model.layers[2].gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing is reentrant"):
        check_checkpointing(model)


def test_where_no_layer_is_checkpointed_no_other_module_is():
    model = tiny_llama()
    model.tower = type(model.model.layers[0])(model.config, 0)
    blocks = find_blocks(model, "model.layers")
    checkpoint_layers(model, blocks, 2)
    assert model.tower.gradient_checkpointing
    checkpoint_layers(model, blocks, 0)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def of_a_step(monkeypatch, tile: int) -> tuple[float, list[torch.Tensor], Counter, int]:
    """Loss, gradients, and tokens that MLPs were given, of rows of 40; the planned peak of rows of 512."""
    monkeypatch.setattr(activation_checkpointing, "TILE", tile)
    rows, seen = torch.randint(2, 128, (2, 40), generator=torch.Generator().manual_seed(0)), Counter()
    model = tiny_llama().train()
    blocks = find_blocks(model)
    checkpoint_layers(model, blocks, 4)
    tiles = tile_mlps(model, blocks)
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, inputs, output: seen.update([output.shape[1]]))
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    tiles.close()
    assert "forward" not in vars(model.model.layers[0].mlp)
    config = LlamaConfig(**SIZES | {"intermediate_size": 16384, "vocab_size": 128, "num_hidden_layers": 2})
    wide = FakeRun(config, Workload(512, checkpointed_layers=2))
    arrivals = wide.trace(wide.groups(Trained((0, 1), ()))).arrivals
    peak = max(arrival.peak_before for arrival in arrivals)
    return loss.item(), [parameter.grad for parameter in model.parameters()], seen, peak


def test_long_rows_go_through_the_mlps_of_checkpointed_layers_in_tiles(monkeypatch):
    whole, gradients, seen, peak = of_a_step(monkeypatch, 4096)
    tiled, of_tiles, seen_in_tiles, lower_peak = of_a_step(monkeypatch, 16)
    assert whole == tiled
    for one, other in zip(gradients, of_tiles, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)
    assert seen == {40: 4 * 2 + 2}, "each checkpointed layer twice"
    assert seen_in_tiles == {40: 2, 16: 4 * 3 * 2, 8: 4 * 2}, "each tile once more, but the last of a layer"
    assert lower_peak < 0.6 * peak
