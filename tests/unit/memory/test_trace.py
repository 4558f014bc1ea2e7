"""What a traced step has allocated, and when."""

import contextlib
import sys

import pytest
import torch
from models import VOCABULARY, tiny_llama
from transformers import LlamaConfig, MixtralConfig
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from lisa_dist.loss.chunked import LogProbsInChunks
from lisa_dist.memory import stand_ins
from lisa_dist.memory.trace import AllocationTracker, FakeRun
from lisa_dist.memory.workload import CHUNKED, OWN, Trained, Workload

LLAMA = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=12)
ALL = ("embed", "head", "rest")


def test_sleeping_layers_below_the_lowest_active_one_store_nothing():
    """With the embedding frozen the backward pass ends at the lowest active layer."""
    run = FakeRun(LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=8), Workload(64))

    def activations(layer: int, always_on: tuple[str, ...]) -> int:
        return run.trace(run.groups(Trained((layer,), always_on))).activations

    active = [activations(layer, ALL) for layer in (0, 7)]
    frozen = [activations(layer, ("head", "rest")) for layer in (0, 4, 7)]
    assert active[0] == active[1]
    assert frozen[0] > frozen[1] > frozen[2]
    assert frozen[2] < 0.35 * frozen[0]


def test_tensors_without_memory_are_not_counted():
    with AllocationTracker() as tracker:
        weights = torch.zeros(1000)
        on_meta = weights.to("meta")
    assert on_meta.numel() == 1000
    assert tracker.peak == weights.nbytes


def test_logits_are_told_apart():
    run = FakeRun(tiny_llama().config, Workload(64, 4, torch.float32, loss=OWN))
    trace = run.trace(run.groups(Trained((0, 1), ALL)))
    assert trace.logits == 4 * 64 * VOCABULARY * 4


MIXTRAL = MixtralConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_local_experts=4,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


def test_a_mixture_of_experts_can_be_planned(caplog):
    """Also in fp32, for which torch's product of groups has no form on tensors without data."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        run = FakeRun(MIXTRAL, Workload(32, dtype=dtype))
        found.append(run.trace(run.groups(Trained((0, 1), ALL))).activations)
    assert 0 < found[0] < found[1] < 2.5 * found[0]
    assert not caplog.records


def test_a_model_that_cannot_be_planned_says_why(monkeypatch, caplog):
    """In one line: torch's traceback of what is caught is left out."""
    run = FakeRun(MIXTRAL, Workload(32))
    monkeypatch.setattr(run.model.model, "forward", lambda **inputs: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(ValueError, match="MixtralConfig: this model cannot be planned"):
        run.trace(run.groups(Trained((0, 1), ALL)))
    assert not caplog.records


def test_a_trace_of_a_models_own_loss_does_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "lisa_dist.loss.chunked", raising=False)
    run = FakeRun(LLAMA, Workload(24, loss=OWN))
    assert run.trace(run.groups(Trained((0, 1), ALL))).arrivals


def test_a_gradient_is_not_counted_once_it_has_arrived():
    run = FakeRun(LLAMA, Workload(24))
    trace = run.trace(run.groups(Trained((0, 1), ALL)))
    assert [id(run.model.lm_head.weight), id(run.model.model.embed_tokens.weight)] == [
        id(trace.arrivals[at].parameter) for at in (0, -1)
    ]
    assert trace.peak_after < trace.arrivals[-1].nbytes
    assert trace.arrivals[1].peak_before < trace.arrivals[0].now


def test_two_chunks_of_the_heads_gradient_stand_for_all(monkeypatch):
    chunks = []
    backward = ChunkedLogProbFunction.backward
    monkeypatch.setattr(ChunkedLogProbFunction, "backward", lambda *of: chunks.append(None) or backward(*of))
    monkeypatch.setattr(LogProbsInChunks, "rows", 128)

    def found() -> dict:
        run = FakeRun(LLAMA, Workload(200, dtype=torch.bfloat16, loss=CHUNKED))
        names = {id(parameter): name for name, parameter in run.model.named_parameters()}
        return run.trace(run.groups(Trained((11,), ("head",)))).to_dict(names)

    few = found()
    assert len(chunks) == 2
    monkeypatch.setattr(stand_ins, "_chunks", lambda is_liger: contextlib.nullcontext())
    assert found() == few
    assert len(chunks) == 2 + 4, "of 512 words"
