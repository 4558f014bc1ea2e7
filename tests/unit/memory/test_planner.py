"""Which layers, loss, DeepSpeed config and settings fit, and what is refused."""

import re
from dataclasses import replace

import pytest
import torch
from models import tiny_llama
from transformers import LlamaConfig, xLSTMConfig

import lisa_dist
from lisa_dist.commands.plan import main
from lisa_dist.core.selection import sampled_blocks
from lisa_dist.ds_config import read_ds_config
from lisa_dist.errors import UserError
from lisa_dist.memory.plan import PlanArguments, command_for, load_model_config
from lisa_dist.memory.planner import (
    Planner,
    first_that_fits,
    make_plans,
    possible_fallbacks,
    what_fits,
    with_most_layers,
)
from lisa_dist.memory.trace import FakeRun, FakeRuns
from lisa_dist.memory.workload import Trained, Workload, widest_periods
from lisa_dist.presets import OPTIMIZERS
from lisa_dist.text import parse_bytes

SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture
def tiny_config(tmp_path) -> str:
    tiny_llama().config.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def test_the_worst_period_is_planned():
    config = lisa_dist.LisaConfig(lisa_always_on="rest", lisa_activated_layers=2)
    run = FakeRun(load_model_config("llama3.1-8b"), Workload(128))
    periods = widest_periods(config, run.blocks, sampled_blocks(config, run.blocks))
    assert periods == [
        Trained((0, 1), ("rest",)),
        Trained((), ("rest",), ("embed",)),  # as large as two layers and more
        Trained((), ("rest",), ("head",)),
    ]


@pytest.mark.full
def test_layers_are_checkpointed_only_where_that_is_needed():
    config = tiny_llama(num_layers=4).config

    def plan(**changes):
        arguments = PlanArguments("m", deepspeed="zero2", seq_length=256, reserve="0", **changes)
        return make_plans(config, arguments, lisa_dist.LisaConfig.plain())[0]

    by_count = [plan(checkpointed_layers=str(count)) for count in range(5)]
    peaks = [one.gpu.needed for one in by_count]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) > 3
    assert plan(gpu_memory=str(peaks[0])) == by_count[0] == plan(checkpointed_layers="none")
    assert plan(gpu_memory=str(peaks[0] - 1)) == by_count[1]
    assert plan(gpu_memory=str(peaks[2] - 1)) == by_count[peaks.index(next(one for one in peaks if one < peaks[2]))]
    assert plan(gpu_memory=str(peaks[4] - 1)) == by_count[4] == plan(checkpointed_layers="all")


def test_logits_are_kept_where_they_fit_without_a_checkpointed_layer_for_them():
    """A vocabulary of which the logits weigh more than all else."""
    sizes = {"hidden_size": 8, "intermediate_size": 2048, "num_attention_heads": 2, "num_hidden_layers": 6}
    config = LlamaConfig(vocab_size=2**18, **sizes)

    def choose(**changes):
        settings = {"deepspeed": "zero2", "seq_length": 256, "reserve": "0"} | changes
        planner = Planner(config, PlanArguments("m", **settings), lisa_dist.LisaConfig.plain())
        plan, why = planner.choose_loss("zero2")
        return plan.gpu.needed, plan.workload.checkpointed_layers, plan.workload.loss, why

    logits, chunked = (choose(loss=loss, checkpointed_layers="0")[0] for loss in ("logits", "chunked"))
    fewer = choose(loss="chunked", checkpointed_layers="all")[0]
    assert fewer < chunked < logits
    for count in ("0", "auto"):
        *chosen, why = choose(gpu_memory=str(logits), checkpointed_layers=count)
        assert chosen == [logits, 0, "logits"]
        assert re.fullmatch(r"auto: ([\d.]+ MiB) planned with logits, of \1", why)
    *chosen, why = choose(gpu_memory=str(logits - 1), checkpointed_layers="0")
    assert chosen == [chunked, 0, "chunked"]
    assert re.fullmatch(r"auto: [\d.]+ MiB planned with logits, and there are [\d.]+ MiB", why)
    *chosen, why = choose(gpu_memory=str(logits - 1))
    assert chosen == [chunked, 0, "chunked"], "one layer less would store enough for them"
    assert why == "auto: with logits more layers would be checkpointed"
    assert choose(gpu_memory="1MiB")[2] == "chunked", "which lacks less"


def test_a_loss_that_a_model_cannot_have():
    config = xLSTMConfig(vocab_size=128, hidden_size=64, num_heads=2, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"--loss logits: xLSTMForCausalLM takes no logits_to_keep.*; give --loss chu"):
        Planner(config, PlanArguments("m", loss="logits"), lisa_dist.LisaConfig.plain()).choose_loss("zero2")
    with pytest.raises(ValueError, match="--loss dft: unknown; choose one of auto, logits, chunked, liger"):
        PlanArguments("m", loss="dft")


def test_as_many_layers_train_as_fit(tiny_config):
    config, asked = load_model_config(tiny_config), lisa_dist.LisaConfig(lisa_activated_layers="auto")

    def peak(layers: int) -> int:
        arguments = PlanArguments(tiny_config, deepspeed="zero2", checkpointed_layers="all", loss="chunked")
        planner = Planner(config, arguments, lisa_dist.LisaConfig(lisa_activated_layers=layers))
        return planner.plan("zero2", 6, "chunked").gpu.needed

    def chosen(budget: int) -> int:
        arguments = PlanArguments(tiny_config, gpu_memory=f"{budget}B", reserve="0", loss="chunked")
        return with_most_layers(config, arguments, asked, "zero2")[0].lisa_activated_layers

    assert [chosen(peak(layers)) for layers in (1, 3, 6)] == [1, 3, 6]
    assert chosen(peak(3) - 1) == 2
    assert chosen(1 << 40) == 6
    with pytest.raises(
        ValueError, match=r"--lisa_activated_layers auto: not one layer fits [\d.]+ MiB: with one"
    ) as error:
        chosen(peak(1) - 1)
    closest = str(error.value).partition("The closest: ")[2].split("; ")
    assert len(closest) == 3
    assert any(one.startswith("--optim lisa_adamw --lisa_state_bits embed=factored,head=factored,") for one in closest)
    sizes = [parse_bytes("", one.rstrip(".").rpartition(" takes ")[2]) for one in closest]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("settings", "leaving"),
    [
        ({}, 10),
        ({"lisa_master": "fp32"}, 12),
        ({"lisa_state_bits": "layers=8"}, 4),
        ({"lisa_offload": "layers", "lisa_master": "fp32"}, 0),
    ],
    ids=str,
)
def test_states_that_leave_for_the_host_are_planned(settings, leaving):
    """`leaving` bytes an element, beside those that have come: more than a step of two tokens takes."""
    config = LlamaConfig(**SIZES, vocab_size=16, max_position_embeddings=64)
    arguments = PlanArguments("model", seq_length=2, checkpointed_layers="all", loss="chunked", optim="lisa_adamw")
    lisa = {"lisa_activated_layers": 2, "lisa_master": "bf16_sr", **settings}
    without, kept = (
        Planner(config, arguments, lisa_dist.LisaConfig(**lisa, lisa_state=state)).plan("zero2", 4, "chunked").gpu
        for state in ("reset", "keep")
    )
    assert (kept.peak, without.needed) == (without.peak, without.peak)
    layers = 2 * (4 * 64**2 + 3 * 64 * 176 + 2 * 64)
    assert kept.needed == pytest.approx(max(kept.peak, kept.static + leaving * layers), rel=0.01)
    assert (kept.needed > kept.peak) == (leaving > 0)


@pytest.mark.parametrize("gpus", [1, 3])
def test_what_a_gpu_has_beside_tensors_is_planned(gpus):
    """The reduction stream's memory, which no other stream can use; pinned blocks are of powers of two."""
    config = LlamaConfig(**SIZES, vocab_size=512)
    asked = {"gpus": gpus, "seq_length": 64, "checkpointed_layers": "all", "loss": "chunked"}
    arguments, lisa = PlanArguments("model", **asked), lisa_dist.LisaConfig(lisa_activated_layers=2)

    def planned(ds_config, **on_cpu):
        return Planner(config, arguments, lisa, **on_cpu).plan(ds_config, 4, "chunked")

    buckets, in_buckets = 2 * 2 * 64**2, 2 * (2 * (4 * 64**2 + 2 * 64) + 64)  # bytes; attention and norms
    plan, alone = planned("zero2"), read_ds_config("zero2")
    assert (0 < plan.gpu.pool <= buckets + in_buckets) if gpus > 1 else plan.gpu.pool == 0  # one rank reduces nothing
    assert plan.gpu.needed == plan.gpu.peak + plan.gpu.pool
    alone["zero_optimization"]["overlap_comm"] = False
    for other in (planned("zero2", on_cpu=True), planned("zero3"), planned("zero2_offload"), planned(alone)):
        assert other.gpu.pool == 0
    host, on_cpu = planned("zero2_offload").host, planned("zero2_offload", on_cpu=True).host
    rounding = host.pop("rounding of pinned memory")
    assert host == on_cpu
    assert 0 < rounding < sum(host.values())
    offload = read_ds_config("zero2_offload")  # where one rank reduces as several do
    offload["zero_optimization"]["reduce_bucket_size"] = 1 << 22
    with_two = planned(offload).gpu.peak_backward
    offload["zero_optimization"]["overlap_comm"] = False
    assert with_two - planned(offload).gpu.peak_backward == 2 << 22
    assert arguments.reserve == ("4.80GiB" if gpus == 1 else "5.80GiB")
    assert replace(arguments, gpu_memory="24GiB", reserve="auto").budget == (45 << 29 if gpus == 1 else 43 << 29)
    assert replace(arguments, reserve="0").budget == 80 << 30


def test_all_parameters_are_planned_after_some_were_traced():
    """Plans of several methods share a model's fake runs, and a trace says of each parameter whether it trains."""
    config = LlamaConfig(**SIZES)
    runs = FakeRuns(config)

    def peak(method: str, runs: FakeRuns | None) -> int:
        arguments = PlanArguments("model", method=method, seq_length=8)
        return (
            Planner(config, arguments, lisa_dist.LisaConfig.plain(), runs=runs).plan("zero2", 0, "chunked").gpu.needed
        )

    alone = {method: peak(method, None) for method in ("lisa", "full", "lora")}
    assert {method: peak(method, runs) for method in ("lisa", "full", "lora")} == alone


def test_cheaper_states_become_more_layers():
    """On 24 GB with everything checkpointed; the command has the number."""
    config, asked = load_model_config("llama3.1-8b"), {"lisa_activated_layers": "auto"}
    small = {"lisa_state_bits": "embed=factored,head=factored,layers=8", "lisa_master": "bf16_sr"}
    least = {"checkpointed_layers": "all", "loss": "chunked"}
    arguments = PlanArguments("llama3.1-8b", gpu_memory="24GiB", optim="lisa_adamw", deepspeed="zero2", **least)
    (plan,) = make_plans(config, arguments, lisa_dist.LisaConfig.plain(**asked | small))
    layers = plan.lisa_config.lisa_activated_layers
    assert 2 < layers < 32
    assert f"--lisa_activated_layers {layers} " in command_for(plan, arguments)
    assert not any(plan.lacks(arguments))
    with pytest.raises(ValueError, match=r"not one layer fits 22\.50 GiB"):
        make_plans(config, arguments, lisa_dist.LisaConfig.plain(**asked))


@pytest.mark.parametrize("name", ["adapters", "none"])
def test_no_candidate_is_tried_twice(tiny_config, name):
    arguments, lines = PlanArguments(tiny_config, gpus=2, gpu_memory="2GiB", host_memory="1MiB"), []
    config, preset = lisa_dist.LisaConfig(lisa_preset=name), OPTIMIZERS[name]
    with pytest.raises(ValueError, match="nothing fits"):
        first_that_fits(load_model_config(tiny_config), arguments, config, preset, tell=lines.append)
    tried = [
        (asked.optim, settings, fallback.offloads)
        for fallback, asked, settings in possible_fallbacks(arguments, config, preset)
    ]
    assert all(tried.count(one) == 1 for one in tried)
    assert len(lines) == len(set(lines))
    assert sum("zero3:" in line or "zero3_" in line for line in lines) >= 2, lines


def test_frozen_layers_in_fewer_bits_are_planned():
    """The device has codes of 30 of 32 layers, the host the originals of all; stage 3 is left out."""
    config = load_model_config("llama3.1-8b")
    plans = {}
    for bits in (16, 8, 4):
        arguments = PlanArguments("llama3.1-8b", checkpointed_layers="all", gpus=2)
        of_ways = make_plans(config, arguments, lisa_dist.LisaConfig.plain(lisa_frozen_bits=bits))
        plans[bits] = {plan.ds_config: plan for plan in of_ways}
    assert plans[4].keys() == {"zero1", "zero2", "zero2_offload"}
    layer = 218_103_808  # elements of matrices
    weights = {bits: plans[bits]["zero2"].gpu.weights for bits in plans}
    assert weights[16] - weights[8] == pytest.approx(30 * layer * (2 - 1 - 4 / 256), rel=1e-3)
    assert weights[16] - weights[4] == pytest.approx(30 * layer * (2 - 0.5 - 1 / 64 - 4 / 64 / 256), rel=1e-3)
    assert plans[4]["zero2"].host["originals of the layers"] == 32 * layer * 2 // 2, "a rank's share"


@pytest.mark.parametrize(
    ("settings", "stored", "expected"),
    [  # files in bf16 are mapped; of others each rank makes a copy, or one rank of a host
        ({}, torch.bfloat16, 0.0),
        ({}, torch.float32, 4.0),
        ({"lisa_frozen_bits": 4}, torch.bfloat16, 0.87),
        ({"lisa_frozen_bits": 4}, torch.float32, 1.0),
        ({"lisa_frozen_bits": 4, "lisa_offload": "frozen"}, torch.float32, 1.0 + 0.87 * 4.13 / 16),
        ({"lisa_frozen_bits": 4, "lisa_frozen_store": "/tmp"}, torch.bfloat16, 0.0),
        ({"task": "dpo", "lisa_frozen_bits": 4}, torch.float32, 8.0),
    ],
)
def test_host_bytes_of_a_start_are_planned(settings, stored, expected):
    settings, task = dict(settings), settings.get("task", "sft")
    settings.pop("task", None)
    config = load_model_config("llama3.1-8b")
    config.dtype = stored
    arguments = PlanArguments("llama3.1-8b", checkpointed_layers="all", gpus=4, deepspeed="zero2", host_memory="58GiB")
    arguments = replace(arguments, task=task)
    asked = lisa_dist.LisaConfig(lisa_activated_layers=2, **settings)
    plan = Planner(config, arguments, asked).plan("zero2", 32, "logits")
    model = 8_030_261_248 * 2
    assert plan.start == pytest.approx(model * expected / 4, rel=0.01)
    assert (plan.lacks(arguments)[1] > 0) == (expected >= 4.0)


@pytest.mark.parametrize(("model", "stacked"), [("qwen3-30b-a3b", True), ("gpt-oss-20b", True), ("qwen3-8b", False)])
def test_experts_that_are_stacked_are_copies(model, stacked):
    arguments = PlanArguments(model, checkpointed_layers="all", gpus=2, deepspeed="zero2")
    plan = Planner(load_model_config(model), arguments, lisa_dist.LisaConfig.plain()).plan("zero2", 0, "logits")
    assert (plan.start > plan.gpu.weights * 0.9) == stacked


@pytest.mark.parametrize(
    ("model", "settings", "tokens", "bus", "products"),
    [  # a layer of Llama has 218,103,808 elements in matrices, of Qwen3-30B-A3B 18,874,368 and 128 experts of 4,718,592
        ("llama3.1-8b", {}, 4096, 2 * 30 * 218_103_808 * 2 / 25e9, 2 * 4096 * 3 * 32 * 218_103_808 / 82e12),
        ("llama3.1-8b", {"lisa_frozen_bits": 4}, 512, 0.2701, 2 * 512 * 3 * 32 * 218_103_808 / 82e12),
        ("qwen3-30b-a3b", {}, 512, 2 * 46 * 622_854_144 * 2 / 25e9, 2 * 512 * 3 * 48 * 56_623_104 / 82e12),
    ],
)
def test_seconds_of_the_bus_are_planned_beside_those_of_products(model, settings, tokens, bus, products, capsys):
    settings = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    words = (
        "--lisa_offload frozen --lisa_activated_layers 2 --checkpointed_layers all --deepspeed zero2 --gpu_memory 1TB"
    )
    asked = [*words.split(), "--model", model, "--seq_length", str(tokens), *settings]
    main(asked)
    printed = capsys.readouterr().out
    found = dict(re.findall(r"^ *(bus, seconds a micro-batch|behind products) +(.+)$", printed, re.MULTILINE))
    assert found["bus, seconds a micro-batch"] == f"{bus:.1f}"
    assert found["behind products"] == f"{products:.1f}, {'hidden' if bus <= products else 'waited for'}"
    assert "--lisa_offload frozen" in printed.splitlines()[-1]


def test_other_methods_are_planned_too(tiny_config):
    states = {}
    for method in ("lisa", "full", "lora"):
        arguments = PlanArguments(tiny_config, deepspeed="zero2", method=method, checkpointed_layers="0", lora_r=4)
        plan = make_plans(load_model_config(tiny_config), arguments, lisa_dist.LisaConfig.plain())[0]
        states[method] = plan.gpu.always_on_states + plan.gpu.active_states
    numel = sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert states["full"] == 12 * numel
    # Two matrices of rank 4 beside each of seven in six layers.
    assert states["lora"] == 12 * 6 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert states["lora"] < states["lisa"] < states["full"]


def test_what_would_fit_the_gpu_with_its_states_is_said(tiny_config, capsys):
    """Where only offload fits; where the GPU is enough there is nothing to say."""
    arguments = PlanArguments(tiny_config, reserve="0", checkpointed_layers="all", seq_length=64)
    plans = {
        plan.ds_config: plan.gpu.needed
        for plan in make_plans(load_model_config(tiny_config), arguments, lisa_dist.LisaConfig.plain())
    }
    as_published = min(peak for way, peak in plans.items() if not way.endswith("_offload"))
    common = ["--model", tiny_config, "--reserve", "0", "--checkpointed_layers", "all", "--seq_length", "64"]
    common += ["--lisa_preset", "none", "--gradient_accumulation_steps", "1"]
    main([*common, "--gpu_memory", f"{as_published}B"])
    assert "With states on the GPU" not in capsys.readouterr().out
    main([*common, "--gpu_memory", f"{as_published - 1}B", "--dataset_name", "rows.jsonl"])
    *_, host, offloads, _, gpu, command = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"With states on the host, for which a step waits; it takes [\d.]+ \w+ of each GPU and [\d.]+ \w+ of a host's "
        "memory:",
        host,
    )
    assert "_offload " in offloads
    assert gpu.startswith("With states on the GPU: ")
    assert re.search(r"; it takes [\d.]+ \w+ of each GPU:$", gpu)
    assert "_offload " not in command
    # The command's own flags are a plan that fits.
    words = command.split()[4:]
    values = dict(zip(words[::2], words[1::2], strict=True))
    of_lisa = {name: value for name, value in values.items() if name.startswith(("--lisa_", "--deepspeed", "--optim"))}
    assert "--lisa_state_bits" in of_lisa
    asked = [word for flag in of_lisa.items() for word in flag]
    main([*common, *asked, "--gpu_memory", f"{as_published - 1}B"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:4] == command.split()[:4]
    assert "_offload " not in last


def test_of_ways_that_send_the_same_the_one_that_recomputes_less_is_recommended(tiny_config):
    arguments = PlanArguments(tiny_config, gpus=2, reserve="0", seq_length=256, gradient_accumulation_steps=2)
    plans = make_plans(load_model_config(tiny_config), arguments, lisa_dist.LisaConfig.plain())
    one, two = plans[0], plans[1]
    assert what_fits(plans, arguments) is one
    less = replace(one, workload=replace(one.workload, checkpointed_layers=3))
    assert what_fits([less, two], arguments) is two


def test_a_task_s_reference_model_and_pairs_are_planned():
    """On stage 3 in parts, with adapters not at all; steps of tasks are measured in tests/system/test_tasks.py."""
    config = LlamaConfig(**SIZES)

    def planned(stage: str = "zero2", **asked):
        arguments = PlanArguments("x", gpus=4, seq_length=64, checkpointed_layers="none", **asked)
        return Planner(config, arguments, lisa_dist.LisaConfig.plain()).cheapest(stage)

    sft, dpo = planned(loss="chunked", micro_batch_size=2), planned(task="dpo")
    assert dpo.workload.micro_batch_size == 2
    assert dpo.gpu.peak - sft.gpu.peak == dpo.gpu.reference == sft.gpu.weights
    assert planned("zero3", task="kto", micro_batch_size=2).gpu.reference == -(-sft.gpu.weights // 4)
    on_host = planned("zero3_offload", task="dpo", optim="adamw_torch_fused")
    assert (on_host.gpu.reference, on_host.host["reference model"]) == (0, -(-sft.gpu.weights // 4))
    assert not planned(task="dpo", method="lora").gpu.reference
    computed = {"task": "dpo", "precompute_ref_log_probs": True}
    assert planned(**computed).gpu.peak == sft.gpu.peak, "the reference model is gone by the first step"
    command = command_for(planned(**computed), PlanArguments("x", gpus=4, **computed))
    assert "--task dpo --precompute_ref_log_probs True" in command
    assert planned(task="grpo").workload.micro_batch_size == 1
    assert planned(task="orpo").gpu.logits
    score = planned(task="reward").gpu
    assert not score.logits
    assert score.weights < sft.gpu.weights - 2 * 64 * 31_000, "there is no head"
    grpo = PlanArguments("x", task="grpo", seq_length=64, gpus=4)
    command = command_for(planned(task="grpo"), replace(grpo, dataset_name="rows.jsonl"))
    assert "--task grpo" in command
    assert "--max_completion_length 32 --reward_funcs rewards.py --num_generations 4" in command
    command = command_for(planned(task="grpo"), grpo)  # on an example of the hub, by a function of TRL's
    assert "--dataset_name trl-lib/tldr" in command
    assert "--reward_funcs think_format_reward" in command
    beside = replace(grpo, gpu_memory="10GiB", reserve="1GiB", vllm_gpu_memory_utilization=0.3)
    assert beside.budget == 6 * 2**30
    assert "--use_vllm True --vllm_gpu_memory_utilization 0.3" in command_for(planned(task="grpo"), beside)
    held = planned(task="grpo", beta=0.04)
    assert held.gpu.peak - planned(task="grpo").gpu.peak == held.gpu.reference == sft.gpu.weights
    assert not planned(task="grpo", beta=0.0).gpu.reference
    assert not planned(task="orpo", beta=0.1).gpu.reference
    assert "--beta 0.04" in command_for(held, replace(grpo, beta=0.04))
    with pytest.raises(
        UserError, match=r"--beta 0\.1 with --task sft: it is for dpo, kto, orpo and grpo; leave it out"
    ):
        PlanArguments("x", beta=0.1)
    with pytest.raises(UserError, match="--micro_batch_size 1 with --task grpo: it compares answers of a step"):
        PlanArguments("x", task="grpo")
    with pytest.raises(UserError, match="--precompute_ref_log_probs with --task orpo: it is for those with a ref"):
        PlanArguments("x", task="orpo", precompute_ref_log_probs=True)


def test_ranks_that_share_rows_and_activations_on_the_host_are_planned():
    config = LlamaConfig(num_hidden_layers=8)  # of 7B's width

    def plan(**changes):
        arguments = PlanArguments("llama", gpus=8, seq_length=32768, checkpointed_layers="all", loss="chunked")
        return Planner(config, replace(arguments, **changes), lisa_dist.LisaConfig.plain()).plan("zero3", 8, "chunked")

    whole, shared, offloaded = plan(), plan(sequence_parallel=8), plan(sequence_parallel=8, activation_offloading=True)
    of_a_layer = 32768 * 4096 * 2  # its input
    assert whole.gpu.activations > 8 * of_a_layer
    assert shared.gpu.activations == pytest.approx(whole.gpu.activations / 8, rel=0.01)
    assert offloaded.host["activations"] + offloaded.gpu.activations == shared.gpu.activations
    in_flight = 4 * of_a_layer / 8  # the fifth is small, of the loss
    assert offloaded.host["activations"] == pytest.approx(shared.gpu.activations - in_flight, rel=0.1)
    with pytest.raises(UserError, match="32 heads, 32 of keys"):
        plan(gpus=24, sequence_parallel=24)
