"""`--torch_compile`: two graphs for any number of switches, the same losses, and an error for what cannot work."""

import copy
import itertools
import json
import re
from functools import partial

import pytest
import torch
from cases import full
from models import save_tiny_llama, tiny_gpt2, tiny_llama, token_batches
from ranks import run_ranks
from runs import flags_for, run_alone
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from trainers import lisa_trainer, rows_of

import lisa_dist
from lisa_dist import LisaConfig
from lisa_dist.core import controller
from lisa_dist.core.activation_checkpointing import let_backward_end
from lisa_dist.core.live_bytes import live_storages
from lisa_dist.ds_config import find_ds_config
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.check_run import check_config
from lisa_dist.train.compiled_layers import compile_layers

LENGTHS = (24, 9, 12, 20)  # none of them a size of the model, which torch would take for the same number
SWITCHES, LAYERS = 12, 5

pytestmark = pytest.mark.usefixtures("cpu_ops")


def batches(steps: int) -> list[torch.Tensor]:
    """Token ids of shape (rows, length), where lengths differ."""
    tokens = token_batches(steps, rows=2, length=max(LENGTHS)).flatten(0, 1)
    return [batch[:, : LENGTHS[step % len(LENGTHS)]] for step, batch in enumerate(tokens)]


def train(output_dir: str, backend: str | None, changes: dict, resume_from: str | None = None) -> dict:
    """Losses, weights and the number of graphs of a run, by default with a switch before every step but the first."""
    torch._dynamo.reset()
    counters.clear()
    changes = {"max_steps": SWITCHES + 1, "lisa_interval_steps": 1} | changes
    seed = 0 if resume_from is None else 99  # what is resumed must not depend on how the model began
    build = partial(tiny_llama, seed, LAYERS)
    if changes.pop("dropout", False):
        build = partial(tiny_gpt2, seed, LAYERS, dropout=0.1)
    checkpointed = changes.pop("checkpointed", "none")
    compiles = {
        "torch_compile": backend is not None,
        "torch_compile_backend": backend,
        "per_device_train_batch_size": 2,
    }
    own = {"eval_dataset": rows_of(batches(1)), "checkpointed_layers": checkpointed}
    trainer = lisa_trainer(output_dir, rows_of(batches(changes["max_steps"])), compiles | changes, build=build, **own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", output_dir)
        # Of every period, which is every step here, it walks all objects of the process.
        patch.setattr(controller, "live_tensor_bytes", lambda device: 0)
        trainer.train(resume_from_checkpoint=resume_from)
    graphs = counters["stats"]["unique_graphs"]
    trainer.evaluate()
    assert counters["stats"]["unique_graphs"] == graphs, "an evaluation runs the layers as they are"
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": [parameter.detach().clone() for parameter in trainer.model.parameters()],
        "layers": {tuple(record.layers) for record in trainer.lisa.records},
        "graphs": graphs,
    }


def check_same(one: dict, other: dict) -> None:
    assert one["losses"] == other["losses"]
    assert all(map(torch.equal, one["weights"], other["weights"]))


@pytest.mark.parametrize(
    ("backend", "changes", "graphs"),
    [
        ("eager", {}, 2),
        # Checkpointed or not, of each.
        full("aot_eager", {"deepspeed": find_ds_config("zero1"), "bf16": True, "checkpointed": 2}, 4),
        full("inductor", {"torch_compile_mode": "default"}, 2),
    ],
)
def test_switches_take_two_graphs_and_leave_the_losses(tmp_path, backend, changes, graphs):
    compiled = run_ranks(train, 1, str(tmp_path / "compiled"), backend, changes)[0]
    changes = {name: value for name, value in changes.items() if name != "torch_compile_mode"}  # which turns it on
    plain = run_ranks(train, 1, str(tmp_path / "plain"), None, changes)[0]
    assert (compiled["graphs"], plain["graphs"]) == (graphs, 0)
    assert len(compiled["layers"]) > 6
    if backend == "inductor":
        assert compiled["losses"][:3] == pytest.approx(plain["losses"][:3], abs=1e-5)
        # Fresh moments at each step make an update of the gradient's sign, which enlarges what rounding differs by.
        assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    else:
        check_same(compiled, plain)


@pytest.mark.full
def test_a_run_that_is_resumed_within_a_period_is_the_run(tmp_path):
    changes = {"dropout": True, "max_steps": 5, "lisa_interval_steps": 3, "save_strategy": "steps", "save_steps": 4}
    whole = run_ranks(train, 1, str(tmp_path), "aot_eager", changes)[0]
    resumed = run_ranks(train, 1, str(tmp_path), "aot_eager", changes, str(tmp_path / "checkpoint-4"))[0]
    check_same(resumed, whole)
    assert (resumed["graphs"], whole["graphs"]) == (2, 2)


def train_in_a_loop(backend: str | None) -> tuple[list[float], int]:
    """A loop of one's own, whose layers the user compiles; the losses and the number of graphs."""
    torch._dynamo.reset()
    model, count = tiny_llama(num_layers=LAYERS), CompileCounterWithBackend(backend)
    model.config.use_cache = False
    engine, lisa = lisa_dist.initialize(model, "zero2", LisaConfig(lisa_interval_steps=1), lr=1e-3, micro_batch_size=2)
    if backend is not None:
        for layer in model.model.layers:
            layer.compile(backend=count, dynamic=True)
    losses = []
    for batch in batches(SWITCHES + 1):
        lisa.on_step_begin()
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, count.frame_count


@pytest.mark.full
def test_a_loop_of_ones_own_compiles_its_layers(tmp_path):
    assert run_ranks(train_in_a_loop, 1, "eager") == [(run_ranks(train_in_a_loop, 1, None)[0][0], 2)]


def steps_of_the_gpu_benchmark(cache: str) -> tuple[int, float]:
    """The method with compiled layers of benchmarks/cost/gpu.py: graphs of two periods, the peak as a share of plan."""
    from benchmarks.common import runs
    from benchmarks.cost.gpu import COMPILED

    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "compile_layers", lambda layers, _, mode: compile_layers(layers, "aot_eager", mode))
        run = runs.Run(COMPILED, runs.shrunk_config("llama2-7b", 64, 4), interval=2)
        run.steps(3, 32)
    return counters["stats"]["unique_graphs"], run.peak_bytes(32) / run.planned_bytes(32)


@pytest.mark.full
def test_the_arm_of_the_gpu_benchmark(tmp_path):
    ((graphs, of_plan),) = run_ranks(steps_of_the_gpu_benchmark, 1, str(tmp_path))
    assert graphs == 2
    assert of_plan < 1.01


def held_for_the_backward_pass(backend: str | None, checkpointed: bool) -> int:
    """Bytes that are there after a forward pass through layers of which the lowest one trains."""
    torch._dynamo.reset()
    model = tiny_llama()
    model.model.layers[1:].requires_grad_(False)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if backend is not None:
        compile_layers(model.model.layers, backend, None)
    for _ in range(2):  # the first one compiles
        before = sum(storage.nbytes() for storage in live_storages())
        output = model.model(input_ids=batches(1)[0], use_cache=False).last_hidden_state
        held = sum(storage.nbytes() for storage in live_storages()) - before
        output.sum().backward()
        model.zero_grad()
        del output
    return held


@pytest.mark.full
def test_compiled_layers_hold_no_more_than_others():
    """So a plan, which is of layers that are not compiled, is an upper bound."""
    plain, compiled = (
        [run_ranks(held_for_the_backward_pass, 1, backend, checkpointed)[0] for checkpointed in (False, True)]
        for backend in (None, "aot_eager")
    )
    assert compiled[0] < plain[0]
    assert compiled[1] <= plain[1]
    assert compiled[1] < compiled[0] / 3, "a checkpointed layer stores its input alone"


@pytest.mark.full
def test_every_way_in_which_a_layer_runs_is_compiled():
    """More of them than torch would compile of one function."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_llama(num_layers=1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    let_backward_end(model)
    (layer,) = model.model.layers
    compile_layers([layer], "eager", None)
    inputs = batches(1)[0]
    padded = torch.ones_like(inputs)
    padded[0, -2:] = 0
    ways = list(itertools.product([True, False], [True, False], [True, False], [None, padded]))
    for active, with_gradient, layer.gradient_checkpointing, mask in ways * 2:
        layer.requires_grad_(active)
        model.model.embed_tokens.requires_grad_(with_gradient)
        model(input_ids=inputs, attention_mask=mask, use_cache=False)
    assert counters["stats"]["unique_graphs"] == len(ways) == 16


def test_layers_can_still_be_copied():
    """As trainers do that need a reference model; the copy runs with its own weights, without compilation."""
    layer = torch.nn.Linear(2, 2)
    compile_layers([layer], "eager", None)
    twin = copy.deepcopy(layer)
    torch.nn.init.zeros_(twin.weight)
    inputs = torch.ones(1, 2)
    assert torch.equal(twin(inputs)[0], twin.bias)
    assert not torch.equal(layer(inputs)[0], layer.bias)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"deepspeed": "zero3"}, "--torch_compile True on ZeRO stage 3: it gathers weights module by module"),
        ({"deepspeed": "zero3", "method": "full"}, "--torch_compile True on ZeRO stage 3: it gathers weights module"),
        ({"use_liger_kernel": True}, "--torch_compile True with --use_liger_kernel True: both fuse"),
        ({"torch_compile_backend": "fast"}, "--torch_compile_backend fast: unknown; choose one of aot_eager,"),
        ({"torch_compile_backend": "cudagraphs"}, "--torch_compile_backend cudagraphs: CUDA graphs hold the addresses"),
        ({"torch_compile_mode": "reduce-overhead"}, "--torch_compile_mode reduce-overhead: CUDA graphs hold the"),
        ({"torch_compile_mode": "max-autotune"}, "use default or max-autotune-no-cudagraphs"),
        ({"torch_compile_mode": "fast"}, "--torch_compile_mode fast: unknown; choose one of default,"),
        (
            {"torch_compile_mode": "default", "torch_compile_backend": "eager"},
            "--torch_compile_mode default: is for inductor, not --torch_compile_backend eager",
        ),
        ({"CXX": "no-such-compiler"}, "--torch_compile True: there is no C++ compiler no-such-compiler"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, changes, said):
    monkeypatch.setenv("CXX", changes.pop("CXX", "g++"))
    flags = flags_for(tmp_path, tmp_path / "out", torch_compile=True, **changes)
    with pytest.raises(ValueError, match="--torch_compile") as error:
        check_config(parse_arguments(flags))
    assert said in str(error.value)


@pytest.mark.parametrize("changes", [{}, {"torch_compile_mode": "max-autotune", "method": "full"}])
def test_what_can_be_compiled_is_not_refused(tmp_path, changes):
    save_tiny_llama(tmp_path / "model")
    check_config(parse_arguments(flags_for(tmp_path, tmp_path / "out", torch_compile=True, **changes)))


# A run from the command line, which says at its end how many graphs it has compiled.
COUNTED = """
from lisa_dist.commands.train import main
from lisa_dist.train.compiled_layers import CompiledLayers
from torch._dynamo.utils import counters

CompiledLayers.on_train_end = lambda *args, **kwargs: print(counters["stats"]["unique_graphs"], "graphs", flush=True)
main()
"""


@pytest.mark.parametrize(("method", "graphs"), [("lora", 1), full("full", 1), full("lisa", 2)])
def test_every_method_compiles_layer_by_layer(tmp_path, method, graphs):
    """Under TRL's trainer; a generation compiles nothing, and the record has the flag as it was given."""
    save_tiny_llama(tmp_path / "model")
    rows = [{"question": f"{n} + 1?" * (1 + n % 3), "answer": str(n + 1)} for n in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "counted.py").write_text(COUNTED)
    changes = {"method": method, "torch_compile": True, "torch_compile_backend": "eager", "sample_prompt": "1 + 1?"}
    changes["per_device_train_batch_size"] = 1  # rows that need no mask
    flags = flags_for(tmp_path, tmp_path / "out", **changes)
    status, said = run_alone(flags, tmp_path / "said.txt", tmp_path / "counted.py")
    assert status == 0, said[-3000:]
    assert re.search("compiled +each decoder layer, by eager", said)
    assert f"{graphs} graphs" in said
    assert json.loads((tmp_path / "out" / "lisa_run.json").read_text())["flags"]["--torch_compile"] is True
