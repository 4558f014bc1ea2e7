"""benchmarks/scaling.py, step_model.py: what the model of steps must say whatever its numbers, and what ranks say."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from lisa_dist.core.blocks import find_blocks
from lisa_dist.core.checkpointing import checkpoint_layers

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("cpu_ops")]

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
COUNTS = (8, 16, 64, 512)


@pytest.fixture(scope="module")
def scaling():
    """The script as a module, with its folder first on the path; gone again afterwards."""
    before = dict(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("scaling")
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)
        if path.stem in before:
            sys.modules[path.stem] = before[path.stem]


def step_model():
    """The module of that name beside the script."""
    return sys.modules["step_model"]


def flags(scaling, *words: str):
    return scaling.parser().parse_args(words)


def gpus(scaling, *words: str):
    return scaling.gpus_of(flags(scaling, *words))


def traffic(scaling) -> dict:
    """Something of every kind in every phase."""
    return {phase: {kind: scaling.Sent(10, 10**9) for kind in scaling.KINDS} for phase in scaling.PHASES}


def step(scaling, count: int, *words: str, accumulated: int = 1) -> dict:
    work = step_model().Work(1e11, 3e11, 10**9)
    return scaling.step_on_gpus(gpus(scaling, *words), work, traffic(scaling), count, 2048, accumulated)


def test_one_gpu_says_nothing(scaling):
    alone = step(scaling, 1)
    assert alone["communication"] == 0
    assert alone["seconds"] == alone["with_overlap"] == alone["compute"] + alone["optimizer"]
    assert step(scaling, 2)["communication"] > 0


def test_one_rank_is_what_was_measured(scaling):
    gloo = scaling.Gloo(2, dict.fromkeys(scaling.KINDS, 1e-3), dict.fromkeys(scaling.KINDS, 1e9))
    alone = scaling.SingleRank(0.1, 0.02, 0.3)
    assert scaling.step_here(gloo, alone, traffic(scaling), 1, 8) == pytest.approx(0.1 + 8 * 0.02 + 0.3)
    # Two ranks have a core each, and half the optimizer's elements; eight have a quarter of a core.
    silent = {phase: {} for phase in scaling.PHASES}
    assert scaling.step_here(gloo, alone, silent, 2, 4) == pytest.approx(0.1 + 4 * 0.02 + 0.3 / 2)
    assert scaling.step_here(gloo, alone, silent, 8, 1) == pytest.approx(4 * (0.1 + 0.02 + 0.3 / 8))


def test_collectives_of_two_ranks_give_back_what_they_took(scaling):
    hop, bandwidth = 2e-4, 3e9
    of_kinds = {}
    for kind, around in {"all_reduce": 2, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 1}.items():
        sizes = (scaling.SMALL, scaling.LARGE)
        of_kinds[kind] = {size: around * (hop + 4 * size / 2 / bandwidth) for size in sizes}
    gloo = scaling.Gloo.of(2, of_kinds)
    for kind in scaling.KINDS:
        assert gloo.latency[kind] == pytest.approx(hop)
        assert gloo.bandwidth[kind] == pytest.approx(bandwidth)
        assert gloo.seconds(kind, scaling.Sent(1, scaling.LARGE), 2) == pytest.approx(of_kinds[kind][scaling.LARGE])
    # Eight ranks on two cores: 7 hops instead of 1, 7/8 on the wire instead of 1/2, all of it four times slower.
    expected = 4 * (7 * hop + 4 * scaling.LARGE * 7 / 8 / bandwidth)
    assert gloo.seconds("all_gather_into_tensor", scaling.Sent(1, scaling.LARGE), 8) == pytest.approx(expected)


def test_an_all_reduce_is_two_rings(scaling):
    ring = gpus(scaling, "--call_us", "0")
    one, two = (ring.seconds(kind, scaling.Sent(3, 10**8), 24) for kind in ("reduce_scatter_tensor", "all_reduce"))
    assert two == pytest.approx(2 * one)
    # 24 GPUs: 23 hops, 2 of them between the 3 nodes; 23/24 of 2 bytes at what 8 NICs of 50 GB/s carry.
    expected = 3 * (21 * 3.4e-6 + 2 * 9.6e-6) + 2e8 * 23 / 24 / 400e9
    assert one == pytest.approx(expected)


@pytest.mark.parametrize(("flag", "count"), [("--intra_gbs", 8), ("--inter_gbs", 64), ("--inter_gbs", 512)])
def test_more_bandwidth_is_less_communication(flag, count, scaling):
    values = ("5", "10", "20", "40")
    found = [step(scaling, count, flag, value) for value in values]
    for key in ("communication", "seconds"):
        assert all(slow[key] > fast[key] for slow, fast in itertools.pairwise(found))
    assert len({one["compute"] for one in found}) == 1


def test_overlap_hides_no_more_than_there_is(scaling):
    for count in COUNTS:
        for rate in ("1", "50"):
            found = step(scaling, count, "--inter_gbs", rate)
            assert max(found["compute"], found["communication"]) < found["with_overlap"] < found["seconds"]


def test_micro_batches_share_what_follows_the_step(scaling):
    one, four = (step(scaling, 64, accumulated=accumulated) for accumulated in (1, 4))
    assert four["compute"] == pytest.approx(4 * one["compute"])
    after = sum(gpus(scaling).seconds(kind, sent, 64) for kind, sent in traffic(scaling)["step"].items())
    assert four["communication"] - after == pytest.approx(4 * (one["communication"] - after))
    assert four["optimizer"] == one["optimizer"]


@pytest.mark.parametrize("arm", ["FULL", "LISA"])
@pytest.mark.parametrize("ds_config", ["zero2", "zero3"])
def test_more_gpus_never_take_more_memory(arm, ds_config, scaling):
    config = scaling.load_model_config("llama2-7b")
    config.num_hidden_layers = 3
    memory = scaling.Memory(config, getattr(scaling, arm), scaling.Workload(64, 1, torch.bfloat16, 3))
    peaks = [memory.plan(ds_config, count).peak for count in (2, 4, *COUNTS)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]


@pytest.mark.parametrize("arm", ["FULL", "LISA"])
def test_operations_with_checkpointing_are_those_that_torch_counts(arm, scaling):
    arm, length, layers = getattr(scaling, arm), 512, 4  # tokens of which attention is a good part
    config = scaling.shrunk_config("llama3.1-8b", 32, layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    blocks = find_blocks(model)
    if arm is scaling.LISA:
        for layer in blocks.layers[1:3]:
            layer.requires_grad_(False)
    checkpoint_layers(model, blocks, layers)
    model.train()
    tokens = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    # Eager attention has all scores and not the half of them that is causal: forward, again, and twice in the backward.
    more = layers * 4 * 4 * length * config.num_attention_heads * config.head_dim / 2 * length
    work = scaling.work_of(config, arm, length)
    assert counter.get_total_flops() == pytest.approx(length * (work.forward + work.backward) + more, rel=0.03)
    assert work.active == sum(one.numel() for one in model.parameters() if one.requires_grad)


def test_a_line_through_two_depths(scaling):
    def counted(depth: int) -> dict:
        of_kind = {"all_gather_into_tensor": scaling.Sent(3 + 2 * depth, 100 + 7 * depth)}
        return dict.fromkeys(scaling.PHASES, of_kind)

    found = scaling.drawn_out(counted(4), counted(6), (4, 6), 80, 1000)
    assert found["forward"]["all_gather_into_tensor"] == (3 + 2 * 80, 1000 * (100 + 7 * 80))


@pytest.fixture(scope="module")
def pair(scaling):
    """Two ranks."""
    with scaling.RankGroup(2, scaling.Ranks) as group:
        yield group


def count(scaling, pair, arm, ds_config: str, depth: int) -> dict:
    """What a step of a small model sends."""
    pair.call("begin", arm, scaling.narrowed("llama2-70b", 64, depth), scaling.scaled_config(ds_config, 64**2))
    return pair.call("do", "traffic", 8)[0]


def test_lisa_sends_the_active_share_on_stage_2(scaling, pair):
    sent = {arm.name: count(scaling, pair, arm, "zero2", 5) for arm in scaling.ARMS}
    config = scaling.narrowed("llama2-70b", 64, 5)
    active = {arm.name: step_model().active_elements(config, arm) for arm in scaling.ARMS}
    assert active["lisa"] < active["full"]
    for phase, kind in (("backward", "all_reduce"), ("step", "all_gather_into_tensor")):
        of_phase = {name: of_arm[phase][kind].elements for name, of_arm in sent.items()}
        assert of_phase == pytest.approx(active, rel=1e-4), "and padding"
    instant = gpus(scaling, "--call_us", "0", "--inter_hop_us", "0")
    seconds = {name: sum(step_model().seconds_of_phases(instant, one, 8).values()) for name, one in sent.items()}
    assert seconds["lisa"] < seconds["full"]


def test_a_checkpointed_layer_that_sleeps_is_gathered_as_often_as_one_that_trains(scaling, pair):
    """Under plain DeepSpeed it is gathered once more, after the first module of its backward pass."""
    gathered = {}
    for arm in (*scaling.ARMS, scaling.Arm("static", "static")):
        of_phases = count(scaling, pair, scaling.replace(arm, checkpointed="all"), "zero3", 6)
        gathered[arm.name] = sum(of_kind["all_gather_into_tensor"].elements for of_kind in of_phases.values())
    assert gathered["lisa"] == gathered["full"] < gathered["static"]


@pytest.mark.full
def test_what_is_counted_lies_on_the_line(scaling, pair):
    """Stage 3 with checkpointing, whose weights are let go and gathered again: a third depth as two others say."""
    arm = scaling.Arm("lisa", "lisa", checkpointed="all")
    depths = scaling.depths_of(scaling.load_model_config("llama2-70b"))
    first, second, third = (count(scaling, pair, arm, "zero3", depth) for depth in (*depths, 9))
    told = scaling.drawn_out(first, second, depths, 9, 1)
    for phase, of_kind in third.items():
        for kind, sent in of_kind.items():
            assert list(told[phase][kind]) == pytest.approx(list(sent))
    whole = step_model().active_elements(scaling.narrowed("llama2-70b", 64, 9), scaling.FULL)
    assert third["backward"]["all_gather_into_tensor"].elements > whole / 2, "nothing is gathered again: no such test"


@pytest.mark.full
def test_the_script(scaling, tmp_path, monkeypatch, capsys):
    results = tmp_path / "scaling.json"
    words = ["--shrink", "64", "--num_layers", "3", "--small_length", "8", "--steps", "2", "--strong_rows", "4"]
    words += ["--ranks", "1", "2", "--configs", "zero2", "--large", "llama2-7b", "--gpus", "1", "8", "--length", "64"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words, "--results", str(results)])
    scaling.main()
    figures = json.loads(results.read_text())["figures"]
    points = figures["here"]["points"]
    assert len(points) == 2 * 2 * 2
    for point in points:
        memory = point["memory"]
        assert 1 / 5 < point["predicted"] / point["seconds"] < 5
        assert memory["planned_states"] == pytest.approx(memory["states"], rel=0.02)
        assert memory["planned_peak"] == pytest.approx(memory["peak"], rel=0.05)
    large = figures["large"]["points"]
    assert all((point["communication"] == 0) == (point["gpus"] == 1) for point in large)
    of_full, of_lisa = ([one for one in large if one["arm"] == arm] for arm in ("full", "lisa"))
    for full, lisa in zip(of_full, of_lisa, strict=True):
        assert all(lisa[key] <= full[key] for key in ("compute", "communication", "optimizer", "peak_bytes"))
    assert "communication takes more than compute from" in capsys.readouterr().out
    assert results.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strong_rows", "6"], "--strong_rows 6: not divisible by --ranks 4"),
        (["--strong_rows", "1", "--ranks", "1"], "--strong_rows 1: at least 2"),
        (["--ranks", "0"], "--ranks: 0 is not 1 or more"),
        (["--steps", "0"], "--steps: 0 is not 1 or more"),
        (["--gpus_per_node", "0"], "--gpus_per_node: 0 is not 1 or more"),
        (["--mfu", "0"], "--mfu 0: must be more than 0"),
        (["--inter_gbs", "-1"], "--inter_gbs -1: must be more than 0"),
        (["--gpu_memory", "much"], "--gpu_memory much"),
        (["--large", "nosuch"], "--large nosuch: no such folder"),
        (["--num_layers", "1"], "--num_layers 1: too few for what is compared; take 2 or more"),
    ],
)
def test_flags_that_cannot_be(words, message, scaling, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    monkeypatch.setattr(scaling, "RankGroup", None)  # said before anything is measured
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
