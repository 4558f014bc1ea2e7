"""Of layers that are alike few run in a traced step, and the trace is that of a step in which all do."""

import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from cells import full
from transformers import FalconConfig, Gemma3TextConfig, LlamaConfig, MixtralConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from lisa_dist.loss.chunked import LogProbsInSlabs
from lisa_dist.memory import trace as traces
from lisa_dist.memory.repeats import Event, LayersDifferError, Place, Skipping, unroll
from lisa_dist.memory.stretches import Stretch, stretches_of
from lisa_dist.memory.trace import FakeRun, FakeRuns
from lisa_dist.memory.workload import CHUNKED, LIGER, LOGITS, OWN, RATIO, SCORE, Trained, Workload

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=12)
LONG = LlamaConfig(**SIZES, num_hidden_layers=20)
# Every sixth layer attends to all tokens.
GEMMA_SIZES = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
GEMMA = Gemma3TextConfig(**GEMMA_SIZES, num_hidden_layers=32)
LAYER_TYPES = ["sliding_attention"] * 3 + ["full_attention"]
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
        patched.setattr(traces, "stretches_of", lambda *_: [])
        return traced(*of)


@pytest.fixture(autouse=True)
def _no_trace_files(monkeypatch):
    """Every trace is made: test_trace_files.py has those that are kept."""
    monkeypatch.setenv("LISA_DIST_CACHE", "")


@pytest.mark.parametrize(("checkpointed", "loss"), [(0, LOGITS), (6, CHUNKED), full(12, OWN)])
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


@pytest.mark.parametrize(
    ("config", "number", "other"),
    [
        (LONG, (8, (0, 1)), (13, (0, 1))),  # so many layers checkpointed, and which train
        (LLAMA, (0, (0, 1, 2, 3, 4)), (0, (0, 1, 2, 3, 4, 5))),
        (LONG, (12, (19,)), (7, (19,))),
        full(Gemma3TextConfig(**GEMMA_SIZES, num_hidden_layers=64, layer_types=LAYER_TYPES * 16), (20, ()), (40, ())),
    ],
)
@pytest.mark.parametrize("loss", [LOGITS, full(CHUNKED)])
def test_a_step_of_the_same_pattern_is_not_run_again(monkeypatch, config, number, other, loss):
    run = FakeRun(config, Workload(24, checkpointed_layers=number[0], loss=loss))
    run.trace(run.groups(Trained(number[1], ALL)))
    with monkeypatch.context() as patched:
        patched.setattr(FakeRun, "_run_step", None)
        moved = run.checkpointing(other[0])
        trace = moved.trace(moved.groups(Trained(other[1], ALL)))
    names = {id(parameter): name for name, parameter in run._run.named_parameters()}
    arrivals = [(names[id(one.parameter)], one.peak_before, one.now) for one in trace.arrivals]
    found = trace.activations, trace.logits, arrivals, trace.peak_after, trace.now
    workload = Workload(24, checkpointed_layers=other[0], loss=loss)
    assert found == of_all_layers(monkeypatch, config, workload, Trained(other[1], ALL))[0]


def test_a_step_with_frozen_layers_in_fewer_bits_is_another(monkeypatch):
    run, workload = FakeRuns(LONG).of(Workload(2)), Workload(2, frozen_bits=8)  # short: matrices weigh more
    whole = run.trace(run.groups(Trained((0, 1), ALL)))
    held = run.with_workload(workload)
    trace = held.trace(held.groups(Trained((0, 1), ALL)))
    peaks = [one.peak_before for one in trace.arrivals]
    assert peaks != [one.peak_before for one in whole.arrivals]
    alone, _ = of_all_layers(monkeypatch, LONG, workload, Trained((0, 1), ALL))
    assert peaks == [peak_before for _, peak_before, _ in alone[2]]


@pytest.mark.parametrize(
    ("number", "other"),
    [
        ((6, (0, 1), ALL), (6, (0, 1), ("embed",))),
        ((6, (0, 1), ALL), (6, (0, 2), ALL)),
        ((6, (0, 1), ALL), (6, (0,), ALL)),
        ((6, (0, 1), ALL), (9, (0, 1), ALL)),  # three layers are no stretch
        ((6, (0, 1), ALL), (0, (0, 1), ALL)),
    ],
)
def test_a_step_of_another_pattern_is_run(monkeypatch, number, other):
    run = FakeRun(LLAMA, Workload(24, checkpointed_layers=number[0]))
    run.trace(run.groups(Trained(*number[1:])))
    calls = []
    step = FakeRun._run_step
    monkeypatch.setattr(FakeRun, "_run_step", lambda *of: calls.append(None) or step(*of))
    moved = run.checkpointing(other[0])
    moved.trace(moved.groups(Trained(*other[1:])))
    assert calls


def test_layers_that_get_other_inputs_are_run_again(monkeypatch):
    """A model may give a layer what its number says, and nothing of that layer shows it."""
    run = FakeRun(LONG, Workload(24, checkpointed_layers=10))

    def without_positions(layer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple:
        return args, kwargs | {"position_ids": None}

    for layer in list(run.model.model.layers)[10:]:
        layer.register_forward_pre_hook(without_positions, with_kwargs=True)
    run.trace(run.groups(Trained((), ALL)))
    ran, step = [], FakeRun._run_step
    monkeypatch.setattr(FakeRun, "_run_step", lambda *of: ran.append(of[-1]) or step(*of))
    moved = run.checkpointing(12)
    moved.trace(moved.groups(Trained((), ALL)))
    assert [len(stretches) for stretches in ran] == [2, 0], "of the first stretch layers get different inputs: all run"


@pytest.mark.parametrize(
    ("workload", "lora_rank"),
    [
        (Workload(24, dtype=torch.bfloat16, frozen_bits=8, loss=LOGITS), 0),
        (Workload(24, loss=LIGER), 0),
        (Workload(24, loss=LOGITS), 4),
    ],
)
def test_other_ways_of_running_share_steps_too(monkeypatch, workload, lora_rank):
    trained = None if lora_rank else Trained((0, 1), ALL)
    run = FakeRun(LONG, replace(workload, checkpointed_layers=8), lora_rank)
    run.trace(run.groups(trained))
    with monkeypatch.context() as patched:
        patched.setattr(FakeRun, "_run_step", None)
        moved = run.checkpointing(13)
        trace = moved.trace(moved.groups(trained))
    names = {id(parameter): name for name, parameter in run._run.named_parameters()}
    arrivals = [(names[id(one.parameter)], one.peak_before, one.now) for one in trace.arrivals]
    found = trace.activations, trace.logits, arrivals, trace.peak_after, trace.now
    assert found == of_all_layers(monkeypatch, LONG, replace(workload, checkpointed_layers=13), trained, lora_rank)[0]


def test_a_step_of_rows_of_an_embedding_is_another(monkeypatch):
    run = FakeRun(LLAMA, Workload(24))
    whole = run.trace(run.groups(Trained((0, 1), ALL)))
    by_rows = run.trace(run.groups(Trained((0, 1), ALL), reduces_rows=True))
    assert whole.now != by_rows.now or whole.arrivals[-1].now != by_rows.arrivals[-1].now


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
    configs = {size: LlamaConfig(**SIZES | {"intermediate_size": size}) for size in sizes}
    for config in configs.values():
        config._attn_implementation = "eager"
    return [LlamaDecoderLayer(configs[size], number) for number, size in enumerate(sizes)]


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


@pytest.mark.parametrize("change", ["trained", "setting", "tuple", "function", "buffer", "shared", "checkpointed"])
def test_one_layer_of_another_kind_ends_a_stretch(change):
    layers, trained = kinds(*[8] * 7), set()
    assert [one.repeats for one in stretches_of(layers, trained)] == [7]
    if change == "trained":
        trained = {id(layers[3].mlp.up_proj.weight)}
    elif change == "setting":
        layers[3].self_attn.scaling = 0.5
    elif change == "tuple":
        for number, layer in enumerate(layers):
            layer.window = (8, number == 3)
    elif change == "function":
        for number, layer in enumerate(layers):
            layer.activation = traced if number == 3 else kinds
    elif change == "buffer":
        layers[3].register_buffer("table", torch.zeros(3))
    elif change == "shared":
        layers[3].mlp = layers[2].mlp
    else:
        layers[3].gradient_checkpointing = True
    assert stretches_of(layers, trained) == []


def test_a_setting_that_differs_for_one_layer_ends_a_stretch():
    """A layer may look to it by its number, and nothing of the layer shows it."""
    config = LlamaConfig()
    config.rotates = [True] * 7
    assert [one.repeats for one in stretches_of(kinds(*[8] * 7), (), config)] == [7]
    config.rotates[3] = False
    assert stretches_of(kinds(*[8] * 7), (), config) == []


def test_layers_that_hand_on_more_than_hidden_states_all_run(monkeypatch):
    config = FalconConfig(vocab_size=512, hidden_size=64, num_attention_heads=4, num_hidden_layers=8)
    (few, runs), (all_of_them, _) = (
        traced(config, Workload(16), None),
        of_all_layers(monkeypatch, config, Workload(16), None),
    )
    assert few == all_of_them
    assert runs > 8, "begun with few, and again with all"


class Model(torch.nn.Module):
    """Six layers of Llama, which a model may use in several ways."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.layers, self.use = torch.nn.ModuleList(kinds(*[8] * 6)), use

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        masks = [torch.zeros(2, 2), torch.zeros(2, 2)]
        embeddings = torch.ones(1, 2, 16), torch.ones(1, 2, 16)
        for number, layer in enumerate(self.layers):
            if self.use == "leave out" and number == 2:
                continue
            more = {"position_embeddings": embeddings, "attention_mask": masks[0]}
            if self.use == "other masks":
                more["attention_mask"] = masks[number % 2]
            elif self.use == "a mask each":
                more["attention_mask"] = torch.zeros(2, 2)
            elif self.use == "a cache":
                more["cache"] = object()
            elif self.use == "numbers":
                more["layer_number"] = number
            for _ in range(1 + (self.use == "twice")):
                hidden = layer(hidden, **more)
            hidden = hidden + 1 if self.use == "between" else hidden
        return hidden


@pytest.mark.parametrize(
    ("use", "raises"),
    [
        ("plain", None),
        ("leave out", "a sample has not run|something runs between"),
        ("other masks", "different inputs"),
        ("a mask each", "different inputs"),
        ("a cache", "different inputs"),
        ("numbers", "different inputs"),
        ("twice", "twice"),
        ("between", "something runs between"),
    ],
)
def test_how_a_model_uses_its_layers(use, raises):
    model, marks, tracker = Model(use), [], traces.AllocationTracker()
    (stretch,) = stretches_of(model.layers, trained=())
    skipping = Skipping(model.layers, [stretch], marks.append, lambda: tracker.bytes)
    with (
        tracker,
        skipping.entered(),
        pytest.raises(LayersDifferError, match=raises) if raises else contextlib.nullcontext(),
    ):
        model(torch.zeros(1, 2, 64)).sum().backward()
        skipping.end_forward()
    assert not any("forward" in vars(layer) for layer in model.layers)
    if not raises:
        places = [(place.is_end, place.backward) for place in marks]
        assert places == [(False, False), (True, False), (True, True), (False, True)]
        assert stretch.stays.total() > 0


@pytest.mark.parametrize("change", ["grown", "unknown", "unfinished"])
def test_a_backward_pass_that_is_not_the_forward_passs_is_told(change):
    layers = kinds(*[8] * 6)
    stretch = Stretch(0, 1, 6, Counter(activations=100))
    end, begin = (Place(stretch, is_end, backward=True) for is_end in (True, False))
    weight = layers[3 if change == "unknown" else 2].mlp.up_proj.weight
    events = [Event(end, 300, 200), Event(weight, 250, 100), Event(begin, 160, 90 if change == "grown" else 100)]
    says = {"grown": "frees something else", "unknown": "another layer", "unfinished": "frees something else"}[change]
    with pytest.raises(LayersDifferError, match=says):
        unroll(events[: 2 if change == "unfinished" else 3], layers)


@pytest.mark.parametrize(
    "workload",
    [
        Workload(24, frozen_bits=8),
        Workload(24, by_module=True),
        Workload(24, loss=SCORE),
        Workload(24, loss=RATIO),
        Workload(24, loss=LIGER),
    ],
)
def test_other_workloads(monkeypatch, workload):
    of = (LLAMA, workload, Trained((0, 9), ("rest",)))
    assert traced(*of)[0] == of_all_layers(monkeypatch, *of)[0]


def test_a_router_whose_outputs_are_recorded_runs_in_all_layers(monkeypatch):
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=8, num_local_experts=2)
    of = (config, Workload(8, dtype=torch.bfloat16, loss=OWN), None)
    (few, _), (all_of_them, _) = traced(*of), of_all_layers(monkeypatch, *of)
    assert few == all_of_them
    config.output_router_logits = True
    (few, _), (all_of_them, _) = traced(*of), of_all_layers(monkeypatch, *of)
    assert few == all_of_them


def test_one_model_serves_several_numbers_of_checkpointed_layers():
    runs = FakeRuns(LLAMA)
    groups = runs.of(Workload(24)).groups(Trained((0, 1), ALL))
    of_counts = [runs.of(Workload(24, checkpointed_layers=count)).trace(groups).activations for count in (0, 12, 0, 6)]
    assert of_counts[0] == of_counts[2] > of_counts[3] > of_counts[1]


def test_a_trace_of_a_models_own_loss_does_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "lisa_dist.loss.chunked")
    assert traced(LLAMA, Workload(24, loss=OWN), Trained((0, 1), ALL))[1] < 12


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
