"""Gradient checkpointing by number of layers: which layers, how few, and an "auto" that holds its budget."""

from types import SimpleNamespace

import pytest
import torch
from models import tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.core.blocks import find_blocks
from lisa_dist.core.checkpointing import (
    Checkpointing,
    check_checkpointing,
    checkpoint_layers,
    checkpointed_layers,
    fewest_layers,
    number_of_layers,
    parse_budget,
    parse_checkpointed_layers,
)
from lisa_dist.ds_config import read_ds_config
from lisa_dist.memory.meter import StepMeter
from lisa_dist.memory.run_memory import RunMemory, format_report
from lisa_dist.memory.workload import Workload

ROWS, LENGTH = 2, 64


def test_values_of_the_flag():
    given = {None: None, "none": 0, "All": "all", "auto": "auto", "3": 3, 0: 0, 5: 5}
    assert {value: parse_checkpointed_layers(value) for value in given} == given
    assert number_of_layers("all", 6) == number_of_layers(6, 6) == 6
    for bad in ("some", "-1", "2.5", True):
        with pytest.raises(ValueError, match="give none, all, auto or a number"):
            parse_checkpointed_layers(bad)
    with pytest.raises(ValueError, match="--checkpointed_layers 7: the model has 6 decoder layers"):
        number_of_layers(7, 6)


def test_it_is_seen_whether_checkpointing_was_turned_on_or_off():
    model = tiny_llama(num_layers=1)
    checkpointing = Checkpointing(model)
    seen = [checkpointing.has_changed()]
    for turn in (lambda: None, model.gradient_checkpointing_disable, model.gradient_checkpointing_enable) * 2:
        turn()
        seen.append(checkpointing.has_changed())
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable()
    assert checkpointing.has_changed(), "as it was, but turned on anew"
    assert seen == [True, False, True, True, False, True, True]


def test_a_budget_is_of_what_keeps_to_it():
    assert parse_budget(None, is_kept_to=False) is None
    assert parse_budget("2GiB", is_kept_to=True) == 2 * 2**30
    with pytest.raises(ValueError, match="only --checkpointed_layers auto and --lisa_activated_layers auto keep to it"):
        parse_budget("2GiB", is_kept_to=False)
    with pytest.raises(ValueError, match="--gpu_memory much: not a size"):
        parse_budget("much", is_kept_to=True)


def test_the_fewest_layers_that_fit():
    peaks = [100, 93, 86, 80, 71, 65, 64, 50, 40]
    asked = []

    def peak(count: int) -> int:
        asked.append(count)
        return peaks[count]

    for budget in range(30, 110):
        fitting = [count for count, one in enumerate(peaks) if one <= budget]
        asked.clear()
        assert fewest_layers(peak, 8, budget) == (fitting[0] if fitting else 8)
        assert len(asked) <= 6
    assert fewest_layers(peak, 0, 1) == 0


def test_the_lowest_layers_are_checkpointed_and_their_number_goes_both_ways():
    model = tiny_llama().train()
    blocks = find_blocks(model)
    tokens = token_batches(1, rows=2)[0, 0]
    stored = {}
    for count in (0, 2, 6, 3, 0):
        checkpoint_layers(model, blocks, count)
        assert checkpointed_layers(model, blocks) == count
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [n < count for n in range(6)]
        saved = 0

        def save(tensor):
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model(input_ids=tokens, labels=tokens).loss.backward()
        assert stored.setdefault(count, saved) == saved
    assert stored[6] < stored[3] < stored[2] < stored[0]


def test_layers_that_cannot_be_checkpointed_one_by_one():
    model = tiny_llama()
    blocks = find_blocks(model)
    model.model.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(6))
    with pytest.raises(ValueError, match="--checkpointed_layers 2: the layers of LlamaForCausalLM cannot be"):
        checkpoint_layers(model, blocks, 2)


def train_by_auto(
    ballast: int, lost: int | None = None, layers: bool = False, interval: int = 100, can_plan: bool = True
) -> dict:
    """Steps with a budget that the plan fits without checkpointing, while `ballast` bytes lie about.

    `lost`: bytes that the budget is found to be less on rank 1, once a step has run. `layers`: their number is what was
    planned, and none is checkpointed; but for `can_plan` the plan of the measured step fails on rank 1.
    """
    import gc

    from lisa_dist.core.live_bytes import live_tensor_bytes

    gc.collect()
    model = tiny_llama()
    before = live_tensor_bytes() - sum(parameter.nbytes for parameter in model.parameters())
    config = lisa_dist.LisaConfig(lisa_interval_steps=interval, lisa_activated_layers=4 if layers else 2)
    engine, lisa = lisa_dist.initialize(model, "zero2", config, optim="adamw_torch_fused")
    workload = Workload(LENGTH, ROWS, torch.float32, loss="own")

    def memory(checkpointed, budget: int) -> RunMemory:
        ds_config = read_ds_config("zero2")
        options = {"optim": "adamw_torch_fused", "config": model.config, "longest": workload}
        options["layers_are_planned"] = layers
        if lost is not None:
            options["measure_budget"] = lambda: budget - lost * dist.get_rank()
        return RunMemory(lisa, ds_config, checkpointed=checkpointed, budget=budget, **options)

    said = memory("auto", 2**40).set_checkpointing()
    without = int(said.split("at most ")[1].split()[0].replace(".", ""))  # tenths of a MiB
    budget = (without + 3) * 2**20 // 10 + before
    held = torch.zeros(ballast, dtype=torch.uint8)
    run = memory(0 if layers else "auto", budget)
    if not can_plan and dist.get_rank() == 1:
        run._plan_measured_step = lambda measured: (None, None, "the model's own code")
    said, peaks, active = [run.set_checkpointing()], [], []
    for step, (tokens,) in enumerate(
        token_batches(10 if layers else 5, rows=ROWS * dist.get_world_size(), length=LENGTH)
    ):
        rows = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        lisa.on_step_begin()
        run.begin_step(step)
        active.append(lisa.active_layers)
        meter = StepMeter(lisa).__enter__() if step > 1 else None
        run.note_micro_batch(workload)
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        del loss
        engine.step()
        said.append(run.end_step(step))
        if meter is not None:
            meter.__exit__(None, None, None)
            peaks.append(meter.parts.peak)
    count = checkpointed_layers(model, lisa.blocks)
    report = run.report()
    engine.destroy()
    assert held.numel() == ballast
    return {"said": said, "count": count, "peaks": peaks, "budget": budget, "report": report, "active": active}


@pytest.mark.usefixtures("cpu_ops")
def test_auto_is_corrected_by_what_the_first_steps_take():
    """What the plan cannot know of is measured, and the steps after it are within the budget."""
    right = run_ranks(train_by_auto, 2, 0)
    for outcome in right:
        assert outcome["count"] == 0
        assert max(outcome["peaks"]) <= outcome["budget"]
    wrong = run_ranks(train_by_auto, 2, 1_500_000)
    assert wrong[0]["said"][0].startswith("0 of 6 layers checkpointed, for which at most ")
    assert wrong[0]["said"][2].startswith("step 1 took ")
    assert wrong[0]["said"][1] is None is wrong[0]["said"][3]
    assert 0 < wrong[0]["count"] == wrong[1]["count"] < 6
    for outcome in wrong:
        assert max(outcome["peaks"]) <= outcome["budget"], "the later steps"
        assert outcome["report"]["measured"]["peak"] > outcome["budget"], "the step that was measured"


@pytest.mark.usefixtures("cpu_ops")
def test_auto_takes_the_budget_that_the_step_has_shown():
    """Of the rank that has least: others hold memory of a GPU too."""
    lost = 1_500_000
    for outcome in run_ranks(train_by_auto, 2, 0, lost):
        assert 0 < outcome["count"] < 6
        assert max(outcome["peaks"]) <= outcome["budget"] - lost


@pytest.mark.usefixtures("cpu_ops")
def test_a_planned_number_of_layers_is_corrected_by_what_a_step_takes():
    """From the next period on, on all ranks alike; not where the plan held, or a step cannot be planned."""
    for outcome in (
        *run_ranks(train_by_auto, 2, 0, None, True, 3),
        *run_ranks(train_by_auto, 2, 1_000_000, None, True, 3, False),
    ):
        assert {len(layers) for layers in outcome["active"]} == {4}
        assert outcome["said"] == [None] * 11
    wrong = run_ranks(train_by_auto, 2, 1_000_000, None, True, 3)
    assert wrong[0]["active"] == wrong[1]["active"]
    counts = [len(layers) for layers in wrong[0]["active"]]
    assert counts == [4] * 3 + [counts[3]] * 7
    assert 1 <= counts[3] < 4
    assert f"{counts[3]} of 6 layers train from the next period on, not 4, for which at most" in wrong[0]["said"][2]
    for outcome in wrong:
        assert outcome["report"]["measured"]["peak"] > outcome["budget"], "the step that was measured"
        # A switch's own step makes moments beside what the plan of a step has; the steps after it are within.
        assert max(outcome["peaks"][3:]) <= outcome["budget"]


@pytest.mark.parametrize("layers", [0, 1])
def test_the_last_layer_stays(layers):
    run = object.__new__(RunMemory)
    run._lisa = SimpleNamespace(selection=SimpleNamespace(gamma=layers))
    assert run._lower_layers(plan_error=2**50) == []


def test_a_report_without_a_measured_step():
    assert "no step was measured" in format_report(None)


def test_layers_that_were_switched_off_are_not_reentrant_again():
    """Where the embedding is frozen, the reentrant way has no gradients to give."""
    model = tiny_llama().train()
    model.get_input_embeddings().requires_grad_(False)
    blocks = find_blocks(model)
    for count in (0, 6):
        checkpoint_layers(model, blocks, count)
    tokens = token_batches(1, rows=2)[0, 0]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
    check_checkpointing(model)
    model.gradient_checkpointing_disable()  # which leaves torch's own function
    check_checkpointing(model)
    model.model.layers[2].gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing is reentrant"):
        check_checkpointing(model)


def test_where_no_layer_is_checkpointed_no_other_module_is():
    model = tiny_llama()
    model.tower = type(model.model.layers[0])(model.config, 0)
    blocks = find_blocks(model, "model.layers")
    checkpoint_layers(model, blocks, 2)
    assert model.tower.gradient_checkpointing
    checkpoint_layers(model, blocks, 0)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
