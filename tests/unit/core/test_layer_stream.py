"""Frozen layers on the host: the order in which they are copied, and what the device has of them."""

import gc
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from models import tiny_gpt_oss, tiny_llama, tiny_qwen3_moe, token_batches

from lisa_dist.core.blocks import Block, find_blocks
from lisa_dist.core.frozen_layers import FrozenLayers
from lisa_dist.core.layer_stream import LayerStream
from lisa_dist.core.live_bytes import live_tensor_bytes

ACTIVE = 2


def streamed(model, bits: int = 16, active=(ACTIVE,)) -> FrozenLayers:
    """Layers of a model on the host, but for those that train."""
    blocks = find_blocks(model.to(torch.bfloat16))
    for number, layer in enumerate(blocks.layers):
        layer.requires_grad_(number in active)
    frozen = FrozenLayers(model, blocks, bits, "host", torch.device("cpu"), streams=True)
    frozen.begin(active)
    return frozen


def note_order(model, frozen: FrozenLayers, monkeypatch) -> list[tuple[str, int]]:
    """Copies as they are queued, and layers as passes begin to compute with them and have computed with them."""
    seen: list[tuple[str, int]] = []
    fill, layers = LayerStream._fill, model.model.layers

    def noted(stream: LayerStream, layer: int) -> None:
        seen.append(("copied", layer))
        fill(stream, layer)

    monkeypatch.setattr(LayerStream, "_fill", noted)
    for number, layer in enumerate(layers):
        layer.self_attn.q_proj.register_forward_hook(lambda *_, number=number: seen.append(("computed", number)))
        layer.register_full_backward_hook(lambda *_, number=number: seen.append(("backward", number)))
    return seen


@pytest.mark.parametrize("checkpointed", [False, True])
def test_each_layer_is_copied_before_the_layer_before_it_computes(checkpointed, monkeypatch):
    model = tiny_llama()
    frozen = streamed(model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = note_order(model, frozen, monkeypatch)
    loss = model(input_ids=(rows := token_batches(1, rows=2)[0, 0]), labels=rows).loss
    order = [layer for layer in range(6) if layer != ACTIVE]
    copies = [layer for what, layer in seen if what == "copied"]
    assert copies == order
    for layer, following in itertools.pairwise(order):
        assert seen.index(("copied", following)) < seen.index(("computed", layer))
    seen.clear()
    loss.backward()
    assert [layer for what, layer in seen if what == "copied"] == order[-3::-1], "the two highest are still there"
    for layer, following in itertools.pairwise(order[::-1]):
        if ("copied", following) in seen:
            assert seen.index(("copied", following)) < seen.index(("backward", layer))


def test_a_pass_without_gradients_begins_again_at_the_lowest_layer(monkeypatch):
    frozen = streamed(model := tiny_llama())
    seen = note_order(model, frozen, monkeypatch)
    with torch.no_grad():
        for loads in (False, False, True):
            if loads:  # other weights, beside which no copy is of use any more
                frozen.quantized[0].load(frozen.quantized[0].original + 1)
            model(input_ids=token_batches(1, rows=2)[0, 0])
    assert "".join(str(layer) for what, layer in seen if what == "copied") == "013450" + "13450" + "013450"


@pytest.mark.parametrize("bits", [16, 4])
def test_the_device_has_two_layers_however_many_there_are(bits):
    found = []
    for number in (6, 12, 24):
        frozen = streamed(model := tiny_llama(num_layers=number), bits)
        rest = sum(value.nbytes for value in model.parameters() if value.numel())
        gc.collect()
        beside = live_tensor_bytes() - rest
        found.append((sum(buffer.nbytes for buffer in frozen.stream.buffers), beside))
        del model, frozen
    two_layers = 2 * sum(value.nbytes // 2 for value in tiny_llama().model.layers[0].parameters() if value.ndim == 2)
    assert len({buffers for buffers, _ in found}) == 1
    assert found[0][0] <= 1.05 * two_layers * bits / 16 + 2 * 7 * 4 * 256
    assert max(beside for _, beside in found) - min(beside for _, beside in found) <= 4096


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3_moe, tiny_gpt_oss])
def test_passes_with_streamed_layers_are_those_with_resident_ones(build, bits, checkpointed):
    """Two passes and then their backward pass, an evaluation between, through switches after which weights differ."""
    (first, second), outcomes = token_batches(2, rows=2)[:, 0], []
    for streams in (False, True):
        model, found = build().to(torch.bfloat16), []
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        blocks, frozen = find_blocks(model), None
        if streams or bits != 16:
            frozen = FrozenLayers(model, blocks, bits, "host", torch.device("cpu"), streams)
            frozen.begin((ACTIVE,))
        for active in (ACTIVE, 0, 5):
            for number, layer in enumerate(blocks.layers):
                layer.requires_grad_(number == active)
            if frozen is not None:
                frozen.switch((active,))
            model.zero_grad()
            loss = model(input_ids=first, labels=first).loss
            with torch.no_grad():
                found.append(model(input_ids=first, labels=first).loss)
            (loss + model(input_ids=second, labels=second).loss).backward()
            found += [value.grad.clone() for value in model.parameters() if value.grad is not None]
            with torch.no_grad():
                for value in blocks.layers[active].parameters.values():
                    value.add_(0.01)  # which is what a stream must take over
        outcomes.append(found)
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


class Gate(torch.nn.Module):
    def forward(self, inputs):
        return (inputs @ self.weight).sigmoid()  # which keeps its output for the backward pass


def test_a_pass_without_a_backward_pass_keeps_nothing():
    model, gate = torch.nn.Module(), Gate()
    gate.weight = torch.nn.Parameter(torch.ones(2, 64, 64, dtype=torch.bfloat16), requires_grad=False)
    model.layers = torch.nn.ModuleList([gate])
    block = Block("layers.0", {"layers.0.weight": model.layers[0].weight})
    frozen = FrozenLayers(model, SimpleNamespace(layers=[block]), 8, "host", torch.device("cpu"))
    frozen.begin(())
    output = weakref.ref(model.layers[0](torch.ones(3, 64, dtype=torch.bfloat16, requires_grad=True)))
    gc.collect()
    assert output() is None
