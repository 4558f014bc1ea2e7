"""The scripts of benchmarks/cost that compare methods: what they compare is what they say, and they run."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import ranks, results, runs
from benchmarks.common.methods import EMBED_FROZEN, FULL, LISA, LORA_16, SIDE_BY_SIDE, STATIC, Method, shrunk_methods

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[3]
TINY = ["--shrink", "64", "--num_layers", "3"]


@pytest.fixture
def benchmark(monkeypatch):
    """A script with the words that it is called with."""

    def load(name: str, *words: str):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/cost/{name}.py", *words])
        return importlib.import_module(f"benchmarks.cost.{name}")

    return load


@pytest.mark.parametrize("name", ["full", "lora", "static", "static, embed frozen"])
def test_operations_of_a_step_are_those_that_torch_counts(name):
    config = runs.shrunk_config("llama3.1-8b", 32, 6)
    settings = {"lora": {"r": 4}, "static": {}, "full": {}}.get(name, EMBED_FROZEN)
    method, length = Method(name, name.split(",")[0], settings), 1024  # of which attention is a good part
    model = runs.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    blocks, layers = runs.find_blocks(model), (2, 4)
    if name == "lora":
        model = runs.adapted(model, method)
    elif name != "full":
        model.requires_grad_(False)
        for block in (*map(blocks.outer, method.config.always_on), *(blocks.layers[one] for one in layers)):
            block.requires_grad_(True)
    tokens = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    # Eager attention has all scores and not the half of them that is causal, and a layer's own are the same size.
    one_more = 4 * length * config.num_attention_heads * config.head_dim / 2 * length
    lowest = 2 if name == "static, embed frozen" else 0
    passes = sum(1 + 2 * (number >= lowest) for number in range(6))
    wanted = runs.flops_of_step(config, method, length, length, layers) + one_more * passes
    assert counter.get_total_flops() == pytest.approx(wanted, rel=0.03)  # nobody wants gradients of the lowest input
    assert one_more * passes > 0.1 * wanted


def test_operations_of_outer_blocks():
    config, rest = runs.shrunk_config("llama3.1-8b", 32, 6), {"lisa_frozen": "embed,head", "lisa_always_on": "rest"}
    neither, head, embed = (
        runs.flops_of_step(config, Method("lisa", "lisa", settings), 8, 8, (4,))
        for settings in (rest, {"lisa_always_on": "head,rest"}, {"lisa_always_on": "embed,rest"})
    )
    assert head - neither == 2 * 8 * config.hidden_size * config.vocab_size
    assert embed > neither


def test_ranks_of_lora_are_divided_as_widths_are():
    ranks = [[method.settings.get("r") for method in shrunk_methods(SIDE_BY_SIDE, shrink)] for shrink in (1, 16, 32)]
    assert ranks == [[None, r16, r128, None, None, None] for r16, r128 in ((16, 128), (1, 8), (1, 4))]


def test_results_say_what_made_them_and_not_where(tmp_path, monkeypatch, capsys):
    words = ["/home/me/repo/benchmarks/cost/speed.py", "--model=/home/me/small", "--results", "/home/me/x.json"]
    monkeypatch.setattr(sys, "argv", words)
    results.write_results(tmp_path / "deep" / "x.json", {"a": 1})
    written = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert written["command"] == "python -m benchmarks.cost.speed --model=small --results x.json"
    assert written["figures"] == {"a": 1}
    assert written["memory_bytes"] > 2**30
    assert written["processor"]
    assert written["seconds"] >= 0
    assert written["versions"]["torch"] == torch.__version__
    assert {"python", "deepspeed", "peft", "bitsandbytes", "lisa_dist"} <= set(written["versions"])
    assert "written to" in capsys.readouterr().out


def test_methods_take_turns_in_orders_that_differ(benchmark):
    speed, called = benchmark("speed"), []

    class Group:
        def __init__(self, name):
            self.name = name

        def call(self, *_):
            called.append(self.name)
            return [{"step": 1.0}, {"step": 2.0}]

    names = ["full", "static", "lisa"]
    taken = speed.take_turns({name: Group(name) for name in names}, names, 8, 5)
    assert {name: [one["step"] for one in steps] for name, steps in taken.items()} == dict.fromkeys(names, [2.0] * 5)
    rounds = [called[begin : begin + 3] for begin in range(0, len(called), 3)]
    assert all(sorted(one) == sorted(names) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 2


def test_memory_sees_what_a_callback_keeps_and_moves(benchmark, tmp_path, capsys, monkeypatch):
    """What is claimed comes out of a tiny run: as little as static, and nothing drifts but under the callback."""
    results = tmp_path / "memory.json"
    words = ["--shrink", "64", "--num_layers", "4", "--length", "16", "--switches", "2", "4", "--configs", "zero2"]
    module = benchmark("memory", "--results", str(results), *words)
    monkeypatch.setattr(module, "SIDE_BY_SIDE", tuple(one for one in SIDE_BY_SIDE if one.kind != "lora"))
    monkeypatch.setattr(module, "POLICIES", (module.DRAWN,))
    module.main()
    figures = json.loads(results.read_text())["figures"]
    for name, found in figures["zero2"].items():
        assert found["planned"] == (None if name == "callback" else pytest.approx(found["peak"], rel=0.03)), name
    drawn = figures["zero2"][module.DRAWN.name]
    assert drawn["peak_with_switch"] is None
    assert drawn["peak"] < figures["zero2"]["lisa"]["peak"]
    for methods_of_stage in figures.values():  # the new layers have no moments yet, and their gradients come later
        assert 0 < methods_of_stage["lisa"]["peak_with_switch"] <= methods_of_stage["lisa"]["peak"]
    of_methods = figures["zero2"]
    assert of_methods["static"]["active_layers"] == of_methods["lisa"]["first_layers"]
    held = {name: {when: parts["total"] for when, parts in found["live"].items()} for name, found in of_methods.items()}
    assert held["lisa"]["4"] == held["lisa"]["0"]
    assert held["lisa"]["4"] <= 1.01 * held["static"]["4"]
    assert held["callback"]["4"] == held["full"]["4"] > 1.2 * held["lisa"]["4"]
    drifted = {name: found["drift"]["changed"] for name, found in of_methods.items() if found["drift"]}
    assert drifted["static"] == drifted["lisa"] == 0 < drifted["callback"]
    assert "MiB of a rank" in capsys.readouterr().out


def test_speed_has_every_method(benchmark, tmp_path, capsys):
    results = tmp_path / "speed.json"
    words = [*TINY, "--configs", "zero2", "--length", "64", "--repeats", "2", "--results", str(results)]
    benchmark("speed", *words).main()
    figures = json.loads(results.read_text())["figures"]
    plain, _, more = figures.values()  # and the two at twice the width
    assert list(plain) == ["full", "lora r16", "lora r128", "static", "callback", "lisa"]
    for found in (*plain.values(), *more.values()):
        assert len(found["steps"]) == 2
        assert all(step[phase] > 0 for step in found["steps"] for phase in ("forward", "backward", "optimizer"))
    assert plain["static"]["flops"] == plain["lisa"]["flops"] < plain["full"]["flops"]
    assert len(plain["lisa"]["after_a_switch"]) == 2
    assert 0 < more["lisa, checkpointed auto"]["checkpointed_layers"] < 3
    assert "FLOPs of full's" in capsys.readouterr().out


def test_switch_counts_what_follows_it(benchmark, tmp_path, capsys, monkeypatch):
    results = tmp_path / "switch.json"
    words = ["--shrink", "64", "--num_layers", "8", "--length", "8", "--switches", "2", "--results", str(results)]
    module = benchmark("switch", *words)
    monkeypatch.setattr(module, "cases_of", lambda shrink: [module.Case("zero3", shrink)])
    module.main()
    (found,) = json.loads(results.read_text())["figures"].values()
    times = {which: found[f"{which}_seconds"] for which in ("switch", "first_step", "second_step", "step")}
    for which, seconds in times.items():
        assert len(seconds) == 2, which
        assert min(seconds) > 0, which
    assert all(first > switch for first, switch in zip(times["first_step"], times["switch"], strict=True)), "it has it"
    assert found["cost_seconds"] == module.cost({f"{which}_seconds": seconds for which, seconds in times.items()})
    assert "switch s" in capsys.readouterr().out


def test_the_cost_of_a_switch(benchmark):
    switch = benchmark("switch")
    times = {"switch_seconds": [1.0], "first_step_seconds": [5.0], "second_step_seconds": [3.5], "step_seconds": [3.0]}
    assert switch.cost(times) == 5 + 3.5 - 2 * 3
    assert switch.share(times, 20) == 2.5 / (2.5 + 20 * 3)
    assert switch.share(times, 1) == 2 / (2 + 3), "whose next step is a first one too"
    assert switch.cost(times | {"first_step_seconds": [3.0]}) == 1.0, "no less than the switch itself"
    noisy = {"first_step_seconds": [5.0, 9.0, 5.0], "second_step_seconds": [3.5, 3.5, 9.0], "step_seconds": [3.0] * 3}
    assert switch.cost(times | noisy) == 6.5, "the median of what each period takes"


def test_communication_has_every_method(benchmark, tmp_path, monkeypatch):
    results = tmp_path / "communication.json"
    module = benchmark("communication", *TINY, "--length", "8", "--results", str(results))
    monkeypatch.setattr(module, "ds_configs", lambda num_elements: {"zero1": "zero1"})
    module.main()
    of_methods = json.loads(results.read_text())["figures"]["counted"]["zero1"]
    step = {name: found["moments"]["step"] for name, found in of_methods.items()}
    assert step["lisa"]["wire"] < step["callback"]["wire"] < step["full"]["wire"]
    assert of_methods["lisa"]["active_share"] == of_methods["static"]["active_share"] < 1


def test_the_gpu_set_in_rehearsal(benchmark, tmp_path, capsys, monkeypatch):
    """Every method that ran was planned to 1%, LoRA too; what has no time left says so."""
    results = tmp_path / "gpu.json"
    module = benchmark("gpu", "--rehearse", "--length", "64", "--results", str(results))
    run = (LISA, STATIC, LORA_16, module.of_recipe("llama3_8b_24gb"), module.LIGER)
    order = [*((module.LLAMA_8B, method) for method in run), None, (module.OF_12_LAYERS, run[0])]
    monkeypatch.setattr(module, "ORDER", order)
    monkeypatch.setattr(module, "SWITCHES", 1)
    monkeypatch.setattr(module, "correctness", lambda rehearses: {"checks": {}})
    module.main()
    written = json.loads(results.read_text())
    assert {"torch", "deepspeed", "lisa_dist"} <= written["versions"].keys()
    figures = written["figures"]["arms"]
    of_methods = figures["llama3.1-8b, all layers"]
    assert of_methods.pop("lisa, Liger") == {"not_run": "Liger's kernels need a GPU"}
    assert list(of_methods) == [method.name for method in run[:-1]]
    for name, found in (*of_methods.items(), *figures["llama2-7b, 12 layers"].items()):
        assert found["planned"] == pytest.approx(found["peak"], rel=0.01), name
        assert len(found["switches"]) == name.startswith(("lisa", "llama3_8b_24gb"))
    assert of_methods["static"]["active_layers"] == of_methods["lisa"]["active_layers"]
    assert len(of_methods["llama3_8b_24gb"]["active_layers"]) == 6, "as its file says"
    assert {one["name"] for one in written["figures"]["kernels"]["kernels"]} == set(module.KERNELS)
    assert "tokens/s" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks/cost/gpu.py", "--rehearse", "--minutes", "0"])
    module.main()
    assert "time was up" in capsys.readouterr().out


def test_what_a_gpu_cannot_hold_is_told_apart_and_all_is_written_as_it_ends(benchmark, monkeypatch, tmp_path):
    module, seen = benchmark("gpu"), []

    def measure(method, *_):
        seen.append(json.loads(results.read_text())["figures"]["arms"]["llama2-7b, 12 layers"] if seen else None)
        raise module.RankError({"full": "OutOfMemoryError"}.get(method.name, "ValueError"), "rank 0: what it said")

    results = tmp_path / "gpu.json"
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "start", dict)
    monkeypatch.setattr(module, "correctness", lambda rehearses: {})
    monkeypatch.setattr(module, "ORDER", [(module.OF_12_LAYERS, method) for method in (FULL, LISA)])
    arguments = argparse.Namespace(rehearse=True, minutes=1, results=results)
    found = module.run_all(arguments, None)["arms"]["llama2-7b, 12 layers"]
    assert {name: one["not_run"] for name, one in found.items()} == {
        "full": "out of memory",
        "lisa": "rank 0: what it said",
    }
    assert {name: one["not_run"] for name, one in seen[1].items()} == {"full": "out of memory", "lisa": "not reached"}
    assert json.loads(results.read_text())["figures"]["arms"]["llama2-7b, 12 layers"] == found


def test_peaks_of_cards_are_known_by_their_names(benchmark):
    wanted = {"H100 80GB HBM3": 989, "H100 NVL": 835, "H100 PCIe": 756, "GB200": 2500, "B200": 2250}
    wanted |= {"GeForce RTX 5090": 209, "T4": None}
    found = {card: benchmark("gpu").peak_flops_of(f"NVIDIA {card}") for card in wanted}
    assert found == {card: tflops and tflops * 1e12 for card, tflops in wanted.items()}


def test_no_method_is_begun_that_may_not_end_in_time(benchmark, monkeypatch):
    gpu, now = benchmark("gpu"), [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    budget = gpu.Budget(100)

    def takes(seconds: float) -> dict:
        now[0] += seconds
        return {}

    assert budget.run(lambda: takes(50), is_typical=False) == {"seconds": 50}
    assert budget.run(lambda: takes(20)) == {"seconds": 20}
    assert budget.run(lambda: takes(12)) == {"seconds": 12}
    assert budget.run(lambda: takes(1)) == {"not_run": "time was up: 18 s are left, and a method takes 20 s"}


class Hangs:
    """A rank that never answers."""

    def work(self) -> None:
        threading.Event().wait()


def test_a_method_that_hangs_is_ended(benchmark, monkeypatch):
    gpu = benchmark("gpu")
    monkeypatch.setattr(gpu, "METHOD_SECONDS", 0.5)
    groups = []

    def hang() -> dict:
        with ranks.RankGroup(1, Hangs) as group:
            groups.append(group)
            return group.call("work")[0]

    ranks.RankGroup(1, Hangs).close()  # the server has started, whose imports take longer
    found = gpu.Budget(100).run(hang)
    assert found["not_run"].startswith("ended after")
    assert not any(process.is_alive() for group in groups for process in group._processes)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("memory", ["--shrink", "0"], "--shrink: 0 is not 1 or more"),
        ("memory", ["--switches", "50", "10"], "--switches 50 10: each must be more than the one before"),
        ("memory", ["--model", "nosuch"], "--model nosuch: no such folder"),
        ("memory", ["--num_layers", "1"], "--num_layers 1: too few for what is compared; take 4 or more"),
        ("speed", ["--shrink", "3"], "--shrink 3: static and LISA are compared at half of it too"),
        ("gpu", ["--rehearse", "--peak_tflops", "0"], "--peak_tflops 0: must be more than 0"),
        ("gpu", [], "there is no GPU; --rehearse runs the same on a CPU"),
    ],
)
def test_flags_that_cannot_be(name, words, message, benchmark, capsys, monkeypatch):
    module = benchmark(name, *words)
    monkeypatch.setattr(module, "RankGroup", None)  # said before anything is measured
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_with_other_names_for_its_widths(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 64}))
    with pytest.raises(ValueError, match="the config of a gpt2 has no intermediate_size, num_key_value_heads"):
        runs.shrunk_config(str(tmp_path / "config.json"), 2)


class SecondFails:
    """What rank 1 cannot do, while rank 0 waits for it."""

    def work(self) -> None:
        if torch.distributed.get_rank() == 1:
            raise LookupError("not on this rank")
        torch.distributed.barrier()


def test_of_ranks_the_one_that_failed_is_named():
    group = ranks.RankGroup(2, SecondFails)
    with pytest.raises(ranks.RankError, match=r"rank 1: (.|\n)*not on this rank") as failed:
        group.call("work")
    assert failed.value.kind == "LookupError"


# A server that has imported modules where there is a GPU, and a rank that is forked from it and takes the GPU.
FORKED = """
import importlib, os, sys
import torch
from simulated_gpu import cuda
torch.version.cuda, torch._C._cuda_getCurrentRawStream = "12.8", lambda device: 0
cuda.answer()
for name in sys.argv[1:]:
    importlib.import_module(name)
if os.fork() == 0:
    torch.cuda.current_device()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize(("more", "status"), [([], 0), (["bitsandbytes"], 1)], ids=["as it is", "with bitsandbytes"])
def test_ranks_are_forked_from_a_server_that_has_not_begun_cuda(more, status):
    folders = os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])
    finished = subprocess.run(
        [sys.executable, "-c", FORKED, *ranks.PRELOADED, *more],
        env=os.environ | {"PYTHONPATH": folders, "CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == status, finished.stderr
    assert ("Cannot re-initialize CUDA in forked subprocess" in finished.stderr) == bool(status)
