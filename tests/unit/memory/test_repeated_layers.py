"""Few of the layers that are alike run in a traced step, and the trace is that of a step in which all do."""

from dataclasses import replace

import pytest
import torch
from cases import full
from transformers import FalconConfig, Gemma3TextConfig, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lisa_dist.memory import repeated_layers
from lisa_dist.memory.repeated_layers import find_stand_ins, kinds_of, trained_kinds
from lisa_dist.memory.trace import FakeRun, FakeRuns
from lisa_dist.memory.workload import CHUNKED, LIGER, LOGITS, OWN, RATIO, SCORE, Lora, Trained, Workload

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=12)
LONG = LlamaConfig(**SIZES, num_hidden_layers=20)
# Every sixth layer attends to all tokens.
GEMMA_SIZES = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
GEMMA = Gemma3TextConfig(**GEMMA_SIZES, num_hidden_layers=32)
LAYER_TYPES = ["sliding_attention"] * 3 + ["full_attention"]
EXPERTS = SIZES | {"num_key_value_heads": 2, "num_hidden_layers": 10}
DENSE_FIRST = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FALCON = FalconConfig(vocab_size=512, hidden_size=64, num_attention_heads=4, num_hidden_layers=8)
ALL = ("embed", "head", "rest")


@pytest.fixture(autouse=True)
def _no_trace_files(monkeypatch):
    """Every trace is made: test_trace_files.py has those that are kept."""
    monkeypatch.setenv("LISA_DIST_CACHE", "")


def found_by(run: FakeRun, trained: Trained | None, reduces_rows: bool = False) -> dict:
    """What a trace says, with parameters by name."""
    names = {id(parameter): name for name, parameter in run._run.named_parameters()}
    return run.trace(run.groups(trained, reduces_rows=reduces_rows)).to_dict(names)


def traced(config: PretrainedConfig, workload: Workload, trained: Trained | None, lora_rank: int = 0) -> tuple:
    """The same of a new run, and how many decoder layers have run forward."""
    run, calls = FakeRun(config, workload, Lora(lora_rank) if lora_rank else None), []
    for layer in run.model.get_submodule(run.blocks.layers_path):
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(None))  # also where it is computed again
    return found_by(run, trained), len(calls)


def of_all_layers(monkeypatch, *of: object) -> tuple:
    with monkeypatch.context() as patched:
        patched.setattr(repeated_layers, "FEWEST_REPEATS", 1000)
        return traced(*of)


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
    ("config", "runs"),
    [
        (GEMMA, 2 * 26),  # four of five patterns of six layers, and two more; all run twice
        full(MixtralConfig(**EXPERTS, num_local_experts=2), 2 * 4),
        (Qwen3MoeConfig(**EXPERTS, **DENSE_FIRST, mlp_only_layers=[0, 1]), 2 * 6),
        (FALCON, 2 * 4),  # layers hand on more than hidden states
    ],
)
def test_layers_repeat_in_a_pattern_or_after_others(monkeypatch, config, runs):
    of = (config, Workload(24, 2, loss=OWN, checkpointed_layers=config.num_hidden_layers), None)
    few, all_of_them = traced(*of), of_all_layers(monkeypatch, *of)
    assert few == (all_of_them[0], runs)


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
    found_by(run, Trained(number[1], ALL))
    with monkeypatch.context() as patched:
        patched.setattr(FakeRun, "_run_step", None)
        found = found_by(run.with_workload(replace(run.workload, checkpointed_layers=other[0])), Trained(other[1], ALL))
    workload = Workload(24, checkpointed_layers=other[0], loss=loss)
    assert found == of_all_layers(monkeypatch, config, workload, Trained(other[1], ALL))[0]


@pytest.mark.parametrize(
    ("number", "other"),
    [
        ((6, (0, 1), ALL), (6, (0, 1), ("embed",))),
        ((6, (0, 1), ALL), (6, (0, 2), ALL)),
        ((6, (0, 1), ALL), (6, (0,), ALL)),
        ((6, (0, 1), ALL), (9, (0, 1), ALL)),  # three layers are no run of repeats
        ((6, (0, 1), ALL), (0, (0, 1), ALL)),
    ],
)
def test_a_step_of_another_pattern_is_run(monkeypatch, number, other):
    run = FakeRun(LLAMA, Workload(24, checkpointed_layers=number[0]))
    found_by(run, Trained(*number[1:]))
    calls, step = [], FakeRun._run_step
    monkeypatch.setattr(FakeRun, "_run_step", lambda *of: calls.append(None) or step(*of))
    found_by(run.with_workload(replace(run.workload, checkpointed_layers=other[0])), Trained(*other[1:]))
    assert calls


def test_a_step_with_frozen_layers_in_fewer_bits_is_another(monkeypatch):
    run, workload = FakeRuns(LONG).of(Workload(2)), Workload(2, frozen_bits=8)  # short: matrices weigh more
    whole, held = (found_by(one, Trained((0, 1), ALL)) for one in (run, run.with_workload(workload)))
    assert whole["arrivals"] != held["arrivals"]
    assert held == of_all_layers(monkeypatch, LONG, workload, Trained((0, 1), ALL))[0]


def test_rows_of_an_embedding_take_the_place_of_its_gradient_in_the_same_step(monkeypatch):
    run = FakeRun(LLAMA, Workload(24))
    whole = found_by(run, Trained((0, 1), ALL))
    monkeypatch.setattr(FakeRun, "_run_step", None)
    by_rows = found_by(run, Trained((0, 1), ALL), reduces_rows=True)
    assert whole["arrivals"][-1][0] == "model.embed_tokens.weight"
    assert by_rows["arrivals"] == whole["arrivals"][:-1]
    assert 24 * 64 * 2 <= by_rows["peak_after"] < whole["arrivals"][-1][1]


@pytest.mark.parametrize(
    "workload",
    [
        Workload(24, frozen_bits=8),
        Workload(24, by_module=True),
        Workload(24, loss=SCORE),
        Workload(24, loss=RATIO),
        Workload(24, loss=LIGER),
        Workload(24, loss=LOGITS, triton=True),
    ],
)
def test_other_workloads(monkeypatch, workload):
    of = (LLAMA, replace(workload, checkpointed_layers=5), Trained((0, 9), ("rest",)))
    assert traced(*of)[0] == of_all_layers(monkeypatch, *of)[0]


def kinds(*sizes: int) -> list[torch.nn.Module]:
    """Layers of which only those of equal size are alike."""
    configs = {size: LlamaConfig(**SIZES | {"intermediate_size": size}) for size in sizes}
    for config in configs.values():
        config._attn_implementation = "eager"
    return [LlamaDecoderLayer(configs[size], number) for number, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "run"),
    [
        ([8] * 4, "0123"),
        ([8] * 5, "0124"),
        ([16, *[8] * 6, 16], "012367"),
        ([8, 16] * 6, "012345ab"),
        ([8] * 5 + [16] * 5, "01245679"),
        ([8, 16, 8, 16, 16, 8, 16, 8], "01234567"),
    ],
)
def test_the_first_three_and_the_last_of_many_repeats_run(sizes, run):
    others, _ = find_stand_ins(kinds_of(kinds(*sizes), LlamaConfig()))
    assert sorted(set(others)) == [int(number, 16) for number in run]
    assert all(others[other] == other for other in others)


@pytest.mark.parametrize(
    "change", ["trained", "setting", "number", "of each", "tuple", "function", "buffer", "shared", "checkpointed"]
)
def test_one_layer_of_another_kind_ends_a_run(change):
    layers, trained, config = kinds(*[8] * 7), set(), LlamaConfig()
    config.rotates = [True] * 7

    def skipped() -> int:
        return 7 - len(set(find_stand_ins(trained_kinds(kinds_of(layers, config), layers, trained))[0]))

    assert skipped() == 3
    if change == "trained":
        trained = {id(layers[3].mlp.up_proj.weight)}
    elif change == "setting":
        layers[3].self_attn.scaling = 0.5
    elif change == "number":
        layers[3].self_attn.layer_idx = 2
    elif change == "of each":  # a layer may look to it by its number, and nothing of the layer shows it
        config.rotates[3] = False
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
    assert skipped() == 0


def test_a_router_whose_outputs_are_recorded_runs_in_all_layers():
    config = MixtralConfig(**EXPERTS, num_local_experts=2, output_router_logits=True)
    assert traced(config, Workload(8, dtype=torch.bfloat16, loss=OWN), None)[1] == 10


@pytest.mark.parametrize("use", ["more in one", "misses one", "another order", "twice"])
def test_a_model_that_uses_its_layers_in_another_way_runs_all(monkeypatch, use):
    """Nothing of the layers shows it: the model, or a hook, goes by a layer's number."""
    run = FakeRun(LLAMA, Workload(24, loss=OWN))
    layers = list(run.model.model.layers)
    ran, step = [], FakeRun._run_step
    monkeypatch.setattr(FakeRun, "_run_step", lambda *of: ran.append(len(of) == 3) or step(*of))

    def another(layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if use == "misses one" and len(run.model.model.layers) < 12:
            raise KeyError(3)
        return output * 2 * output if use == "more in one" else output

    def otherwise(self: torch.nn.ModuleList, at: slice) -> list[torch.nn.Module]:
        here = list(self)
        order = [0, 2, 1, *range(3, 12)] if use == "another order" else 2 * [*range(12)]
        return [layers[number] for number in order if layers[number] in here]

    layers[2].register_forward_hook(another)
    if use in ("another order", "twice"):
        monkeypatch.setattr(torch.nn.ModuleList, "__getitem__", otherwise)
    run.trace(run.groups(Trained((0, 11), ALL)))
    assert ran == [True, False], "begun with few, and again with all"
