"""The scripts of benchmarks/ that compare methods: what they compare is what they say, and they run."""

import importlib
import json
import sys

import pytest
import torch
from test_train import ROOT
from torch.utils.flop_counter import FlopCounterMode

SCRIPTS = ("communication", "gpu", "memory", "quality", "scaling", "speed", "switch")
TINY = ["--shrink", "64", "--num_layers", "3"]


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script as it is run: with its folder first on the path, and gone again afterwards."""
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name: str, *words: str):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *words])
        return importlib.import_module(name)

    yield load
    for name in ("arms", "bench", "rank_group", "kernels", *SCRIPTS):
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_the_question(name, benchmark, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark(name, "--help").main()
    assert ended.value.code == 0
    question = benchmark(name).__doc__.splitlines()[0]
    assert " ".join(question.split()) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", ["full", "lora", "static", "static, embed frozen"])
def test_operations_of_a_step_are_those_that_torch_counts(method, benchmark):
    arms = benchmark("arms")
    config = arms.shrunk_config("llama3.1-8b", 32, 6)
    settings = {"lora": {"r": 4}, "static": {}, "full": {}}.get(method, arms.EMBED_FROZEN)
    arm, length = arms.Arm(method, method.split(",")[0], settings), 8
    model = arms.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    blocks, layers = arms.find_blocks(model), (2, 4)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.0, r=4))
    elif method != "full":
        model.requires_grad_(False)
        for block in (*(blocks.outer(name) for name in arm.config.always_on), *(blocks.layers[one] for one in layers)):
            block.requires_grad_(True)
    tokens = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    # Eager attention has all scores and not the half of them that is causal, and a layer's own are the same size.
    one_more = 4 * length * config.num_attention_heads * config.head_dim / 2 * length
    lowest = 2 if method == "static, embed frozen" else 0
    passes = sum(1 + 2 * (number >= lowest) for number in range(6))
    wanted = arms.flops_of_step(config, arm, length, length, layers) + one_more * passes
    assert counter.get_total_flops() == pytest.approx(wanted, rel=0.03)  # nobody wants gradients of the lowest input


@pytest.mark.slow
def test_memory_sees_what_a_callback_keeps_and_moves(benchmark, tmp_path, capsys):
    """What is claimed comes out of a tiny run: as little as static, and nothing drifts but under the callback."""
    results = tmp_path / "memory.json"
    words = [*TINY, "--configs", "zero3", "--length", "16", "--switches", "2", "4", "--results", str(results)]
    benchmark("memory", *words).main()
    of_arms = json.loads(results.read_text())["figures"]["zero3"]
    held = {name: {when: parts["total"] for when, parts in found["live"].items()} for name, found in of_arms.items()}
    assert held["lisa"]["4"] == held["lisa"]["0"]
    assert held["lisa"]["4"] <= 1.01 * held["static"]["4"]
    assert held["callback"]["4"] == held["full"]["4"] > 1.2 * held["lisa"]["4"]
    drifted = {name: found["drift"]["changed"] for name, found in of_arms.items() if found["drift"]}
    assert drifted["static"] == drifted["lisa"] == 0 < drifted["callback"]
    assert of_arms["lisa"]["planned"] == pytest.approx(of_arms["lisa"]["peak"], rel=0.03)
    assert "of static" in capsys.readouterr().out
    assert results.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
def test_speed_and_switch_have_every_arm(benchmark, tmp_path, capsys):
    results = tmp_path / "speed.json"
    words = [*TINY, "--configs", "zero2", "--length", "16", "--repeats", "2", "--results", str(results)]
    benchmark("speed", *words).main()
    figures = json.loads(results.read_text())["figures"]
    plain, _, more = figures.values()  # and the two at twice the width
    assert list(plain) == ["full", "lora r16", "lora r128", "static", "callback", "lisa"]
    for found in (*plain.values(), *more.values()):
        assert len(found["steps"]) == 2
        for step in found["steps"]:
            phases = sum(step[phase] for phase in ("begin", "forward", "backward", "optimizer"))
            assert step["step"] == pytest.approx(phases)
    assert plain["static"]["flops"] == plain["lisa"]["flops"] < plain["full"]["flops"]
    assert len(plain["lisa"]["after_a_switch"]) == 2
    assert 0 < more["lisa, checkpointed auto"]["checkpointed_layers"] < 3
    assert "FLOPs of full" in capsys.readouterr().out


def test_without_a_gpu_the_gpu_set_says_how_to_rehearse(benchmark, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as ended:
        benchmark("gpu").main()
    assert ended.value.code == 2
    assert "--rehearse" in capsys.readouterr().err
