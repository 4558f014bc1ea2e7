"""Of layers that are alike few run in a traced step, and the trace is that of a step in which all do."""

import contextlib
from collections.abc import Sequence

import pytest
import torch
from transformers import FalconConfig, Gemma3TextConfig, LlamaConfig, PretrainedConfig
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from lisa_dist.core.head_gradient import LogProbsInSlabs
from lisa_dist.memory import trace as traces
from lisa_dist.memory.repeats import LayersDifferError, Stretch, stretches_of
from lisa_dist.memory.trace import CHUNKED, LOGITS, OWN, FakeRun, Trained, Workload

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=12)
# Every sixth layer attends to all tokens.
GEMMA = Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16, num_hidden_layers=32, sliding_window=8)
ALL = ("embed", "head", "rest")


def traced(config: PretrainedConfig, workload: Workload, trained: Trained | None, lora_rank: int = 0) -> tuple:
    """What a trace says, with parameters by name, and how many decoder layers have run forward."""
    run = FakeRun(config, workload, lora_rank)
    calls = []
    for layer in run.model.get_submodule(run.blocks.layers_path):
        layer.mlp.register_forward_hook(lambda *_: calls.append(None))
    trace = run.trace(run.groups(trained))
    names = {id(parameter): name for name, parameter in run._run.named_parameters()}
    arrivals = [(names[id(one.parameter)], one.peak_before, one.now) for one in trace.arrivals]
    return (trace.activations, trace.logits, arrivals, trace.peak_after, trace.now), len(calls)


def of_all_layers(monkeypatch, *of: object) -> tuple:
    with monkeypatch.context() as patched:
        patched.setattr(traces, "stretches_of", lambda layers, trained: [])
        return traced(*of)


@pytest.mark.parametrize(("checkpointed", "loss"), [(0, LOGITS), (6, CHUNKED), (12, OWN)])
@pytest.mark.parametrize(
    ("trained", "lora_rank"),
    [
        (Trained((0, 1), ALL), 0),
        (Trained((10, 11), ("head", "rest")), 0),  # layers below store nothing
        (Trained((0, 11), ALL), 0),
        (Trained(tuple(range(12)), ("head",)), 0),  # the input of the lowest requires no gradient
        (None, 0),
        (None, 4),
    ],
)
def test_a_short_trace_is_that_of_all_layers(monkeypatch, checkpointed, loss, trained, lora_rank):
    workload = Workload(24, dtype=torch.bfloat16, checkpointed_layers=checkpointed, loss=loss)
    of = (LLAMA, workload, trained, lora_rank)
    (few, runs), (all_of_them, all_runs) = traced(*of), of_all_layers(monkeypatch, *of)
    assert few == all_of_them
    assert runs < all_runs


def test_layers_repeat_in_a_pattern(monkeypatch):
    workload = Workload(24, 2, checkpointed_layers=32)
    (few, runs), (all_of_them, all_runs) = (
        traced(GEMMA, workload, None),
        of_all_layers(monkeypatch, GEMMA, workload, None),
    )
    assert few == all_of_them
    assert (runs, all_runs) == (2 * 20, 2 * 32), "three of five patterns of six layers, and two more; all run twice"


def kinds(*sizes: int) -> Sequence[torch.nn.Module]:
    """Layers of which only those of equal size are alike."""
    layer = type(FakeRun(LLAMA, Workload(8)).model.model.layers[0])
    layers = []
    for number, size in enumerate(sizes):
        config = LlamaConfig(**SIZES | {"intermediate_size": size})
        config._attn_implementation = "eager"
        layers.append(layer(config, number))
    return layers


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([8] * 4, []),  # three of four would run
        ([8] * 5, [(0, 1, 5)]),
        ([16, *[8] * 6, 16], [(1, 1, 6)]),
        ([8, 16] * 6, [(0, 2, 6)]),
        ([8] * 5 + [16] * 5, [(0, 1, 5), (5, 1, 5)]),
        ([8, 16, 8, 16, 16, 8, 16, 8], []),
    ],
)
def test_stretches_of_layers_that_are_alike(sizes, found):
    stretches = stretches_of(kinds(*sizes), trained=())
    assert [(one.start, one.period, one.repeats) for one in stretches] == found


@pytest.mark.parametrize("change", ["trained", "setting", "shared", "checkpointed"])
def test_one_layer_of_another_kind_ends_a_stretch(change):
    layers, trained = kinds(*[8] * 7), set()
    assert [one.repeats for one in stretches_of(layers, trained)] == [7]
    if change == "trained":
        trained = {id(layers[3].mlp.up_proj.weight)}
    elif change == "setting":
        layers[3].self_attn.scaling = 0.5
    elif change == "shared":
        layers[3].mlp = layers[2].mlp
    else:
        layers[3].gradient_checkpointing = True
    assert stretches_of(layers, trained) == []


def test_layers_that_hand_on_more_than_hidden_states_all_run(monkeypatch):
    config = FalconConfig(vocab_size=512, hidden_size=64, num_attention_heads=4, num_hidden_layers=8)
    (few, runs), (all_of_them, _) = (
        traced(config, Workload(16), None),
        of_all_layers(monkeypatch, config, Workload(16), None),
    )
    assert few == all_of_them
    assert runs > 8, "begun with few, and again with all"


def test_layers_that_are_given_different_tensors_all_run(monkeypatch):
    stretch = Stretch(0, 1, 6)
    layers = kinds(*[8] * 6)
    hidden = torch.zeros(1, 2, 64)
    with traces.skipping(layers, [stretch], lambda place: None, lambda: traces.AllocationTracker().bytes):
        mask = torch.zeros(2, 2)
        assert layers[1](hidden, attention_mask=mask) is hidden
        assert layers[3](hidden, attention_mask=mask) is hidden
        with pytest.raises(LayersDifferError):
            layers[4](hidden, attention_mask=torch.zeros(2, 2))
        with pytest.raises(LayersDifferError):  # where one layer may leave something for the next
            layers[4](hidden, attention_mask=mask, shared=object())
    assert "forward" not in vars(layers[1])


def test_a_gradient_is_not_counted_once_it_has_arrived():
    run = FakeRun(LLAMA, Workload(24))
    trace = run.trace(run.groups(Trained((0, 1), ALL)))
    assert [id(run.model.lm_head.weight), id(run.model.model.embed_tokens.weight)] == [
        id(trace.arrivals[at].parameter) for at in (0, -1)
    ]
    assert trace.peak_after < trace.arrivals[-1].nbytes
    assert trace.arrivals[1].peak_before < trace.arrivals[0].now


def test_two_slabs_of_the_heads_gradient_stand_for_all(monkeypatch):
    slabs = []
    backward = ChunkedLogProbFunction.backward
    monkeypatch.setattr(ChunkedLogProbFunction, "backward", lambda *of: slabs.append(None) or backward(*of))
    monkeypatch.setattr(LogProbsInSlabs, "words", 128)
    of = (LLAMA, Workload(200, dtype=torch.bfloat16, loss=CHUNKED), Trained((11,), ("head",)))
    few = traced(*of)
    assert len(slabs) == 2
    monkeypatch.setattr(traces, "head_gradient_of", lambda is_liger: contextlib.nullcontext())
    assert traced(*of) == few
    assert len(slabs) == 2 + 4, "of 512 words"
