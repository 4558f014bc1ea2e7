"""scaling.py, step_model.py of benchmarks/cost: what the model must say whatever its numbers, and what ranks send."""

import itertools
import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.cost import scaling, step_model
from lisa_dist.core.blocks import find_blocks
from lisa_dist.core.checkpointing import checkpoint_layers

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("cpu_ops")]

COUNTS = (8, 16, 64, 512)


def gpus(*words: str):
    return scaling.gpus_of(scaling.make_parser().parse_args(words))


def traffic() -> dict:
    """Something of every kind."""
    return {kind: scaling.Sent(10, 10**9) for kind in scaling.KINDS}


def step(count: int, *words: str) -> dict:
    work = step_model.Work(4e11, 10**9)
    return scaling.step_on_gpus(gpus(*words), work, traffic(), count, 2048)


def test_one_gpu_says_nothing():
    alone = step(1)
    assert alone["communication"] == 0
    assert alone["seconds"] == alone["compute"] + alone["optimizer"]
    assert step(2)["communication"] > 0


def test_one_rank_is_what_was_measured():
    gloo = scaling.Gloo(2, dict.fromkeys(scaling.KINDS, 1e-3), dict.fromkeys(scaling.KINDS, 1e9))
    alone = scaling.SingleRank(0.1, 0.02, 0.3)
    assert scaling.step_here(gloo, alone, traffic(), 1, 8) == pytest.approx(0.1 + 8 * 0.02 + 0.3)
    # Two ranks have a core each, and half the optimizer's elements; eight have a quarter of a core.
    assert scaling.step_here(gloo, alone, {}, 2, 4) == pytest.approx(0.1 + 4 * 0.02 + 0.3 / 2)
    assert scaling.step_here(gloo, alone, {}, 8, 1) == pytest.approx(4 * (0.1 + 0.02 + 0.3 / 8))


def test_collectives_of_two_ranks_give_back_what_they_took():
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


def test_an_all_reduce_is_two_rings():
    ring = gpus("--call_us", "0")
    one, two = (ring.seconds(kind, scaling.Sent(3, 10**8), 24) for kind in ("reduce_scatter_tensor", "all_reduce"))
    assert two == pytest.approx(2 * one)
    # 24 GPUs: 23 hops, 2 of them between the 3 nodes; 23/24 of 2 bytes at what 8 NICs of 50 GB/s carry.
    expected = 3 * (21 * 3.4e-6 + 2 * 9.6e-6) + 2e8 * 23 / 24 / 400e9
    assert one == pytest.approx(expected)


@pytest.mark.parametrize(("flag", "count"), [("--intra_gbs", 8), ("--inter_gbs", 64), ("--inter_gbs", 512)])
def test_more_bandwidth_is_less_communication(flag, count):
    values = ("5", "10", "20", "40")
    found = [step(count, flag, value) for value in values]
    for key in ("communication", "seconds"):
        assert all(slow[key] > fast[key] for slow, fast in itertools.pairwise(found))
    assert len({one["compute"] for one in found}) == 1


@pytest.mark.parametrize("arm", ["FULL", "LISA"])
@pytest.mark.parametrize("ds_config", ["zero2", "zero3"])
def test_more_gpus_never_take_more_memory(arm, ds_config):
    config = scaling.load_model_config("llama2-7b")
    config.num_hidden_layers = 3
    memory = scaling.Memory(config, getattr(scaling, arm), 64)
    peaks = [memory.peak(ds_config, count) for count in (2, 4, *COUNTS)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]


@pytest.mark.parametrize("arm", ["FULL", "LISA"])
def test_operations_with_checkpointing_are_those_that_torch_counts(arm):
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
    assert counter.get_total_flops() == pytest.approx(length * work.operations + more, rel=0.03)
    assert work.active == sum(one.numel() for one in model.parameters() if one.requires_grad)


def test_a_line_through_two_depths():
    def counted(depth: int) -> dict:
        return {"all_gather_into_tensor": scaling.Sent(3 + 2 * depth, 100 + 7 * depth)}

    found = scaling.drawn_out(counted(4), counted(6), (4, 6), 80, 1000)
    assert found["all_gather_into_tensor"] == (3 + 2 * 80, 1000 * (100 + 7 * 80))


@pytest.fixture(scope="module")
def pair():
    """Two ranks."""
    with scaling.RankGroup(2, scaling.Ranks) as group:
        yield group


def count(pair, arm, ds_config: str, depth: int) -> dict:
    """What a step of a small model sends."""
    pair.call("begin", arm, scaling.narrowed("llama2-70b", 64, depth), scaling.scaled_config(ds_config, 64**2))
    return pair.call("do", "traffic", 8)[0]


def test_lisa_sends_the_active_share_on_stage_2(pair):
    sent = {arm.name: count(pair, arm, "zero2", 5) for arm in scaling.ARMS}
    config = scaling.narrowed("llama2-70b", 64, 5)
    active = {arm.name: step_model.active_elements(config, arm) for arm in scaling.ARMS}
    assert active["lisa"] < active["full"]
    for kind in ("all_reduce", "all_gather_into_tensor"):
        elements = {name: of_arm[kind].elements for name, of_arm in sent.items()}
        assert elements == pytest.approx(active, rel=1e-4), "and padding"
    instant = gpus("--call_us", "0", "--inter_hop_us", "0")
    seconds = {name: step_model.seconds_of(instant, one, 8) for name, one in sent.items()}
    assert seconds["lisa"] < seconds["full"]


def test_a_checkpointed_layer_that_sleeps_is_gathered_as_often_as_one_that_trains(pair):
    """Under plain DeepSpeed it is gathered once more, after the first module of its backward pass."""
    gathered = {}
    for arm in (*scaling.ARMS, scaling.Arm("static", "static")):
        sent = count(pair, scaling.replace(arm, checkpointed="all"), "zero3", 6)
        gathered[arm.name] = sent["all_gather_into_tensor"].elements
    assert gathered["lisa"] == gathered["full"] < gathered["static"]


def test_what_is_counted_lies_on_the_line(pair):
    """Stage 3 with checkpointing, whose weights are let go and gathered again: a third depth as two others say."""
    arm = scaling.Arm("lisa", "lisa", checkpointed="all")
    depths = scaling.depths_of(scaling.load_model_config("llama2-70b"))
    first, second, third = (count(pair, arm, "zero3", depth) for depth in (*depths, 9))
    told = scaling.drawn_out(first, second, depths, 9, 1)
    for kind, sent in third.items():
        assert list(told[kind]) == pytest.approx(list(sent))
    whole = step_model.active_elements(scaling.narrowed("llama2-70b", 64, 9), scaling.FULL)
    assert third["all_gather_into_tensor"].elements > 1.5 * whole, "nothing is gathered again: no such test"


def test_the_script(tmp_path, monkeypatch, capsys):
    results = tmp_path / "scaling.json"
    words = ["--shrink", "64", "--num_layers", "3", "--small_length", "8", "--steps", "2", "--strong_rows", "4"]
    words += ["--ranks", "1", "2", "--configs", "zero2", "--large", "llama2-7b", "--gpus", "1", "8", "--length", "64"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words, "--results", str(results)])
    scaling.main()
    figures = json.loads(results.read_text())["figures"]
    points = figures["here"]["points"]
    assert len(points) == 2 * 2 * 2
    assert all(point["predicted"] > 0 for point in points)
    large = figures["large"]["points"]
    assert all((point["communication"] == 0) == (point["gpus"] == 1) for point in large)
    of_full, of_lisa = ([one for one in large if one["arm"] == arm] for arm in ("full", "lisa"))
    for full, lisa in zip(of_full, of_lisa, strict=True):
        assert all(lisa[key] <= full[key] for key in ("compute", "communication", "optimizer", "peak_bytes"))
    assert "by the model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strong_rows", "6"], "--strong_rows 6: not divisible by --ranks 4"),
        (["--strong_rows", "1", "--ranks", "1"], "--strong_rows 1: at least 2"),
        (["--mfu", "0"], "--mfu 0: must be more than 0"),
        (["--inter_gbs", "-1"], "--inter_gbs -1: must be more than 0"),
        (["--gpu_memory", "much"], "--gpu_memory much"),
        (["--large", "nosuch"], "--large nosuch: no such folder"),
        (["--num_layers", "1"], "--num_layers 1: too few for what is compared; take 2 or more"),
    ],
)
def test_flags_that_cannot_be(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    monkeypatch.setattr(scaling, "RankGroup", None)  # said before anything is measured
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
