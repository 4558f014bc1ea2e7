"""The adaptive sampler: what it learns of layers, against gradients taken apart, and what it makes of it."""

import json
import math

import pytest
import torch
from cells import full
from engines import full_weights, train_step
from models import tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.core.importance import LayerImportance
from lisa_dist.core.sampling import inclusion_probabilities

INTERVAL, BETA2 = 3, 0.999


def test_nothing_seen_is_uniform():
    importance = LayerImportance(4)
    assert importance.weights() == [0.25] * 4
    importance.observe({0: math.nan, 2: math.inf})
    assert importance.weights() == [0.25] * 4
    importance.observe({1: 0.0})
    assert importance.weights() == [0.25] * 4


def test_averages_are_exponential_over_visits():
    importance = LayerImportance(3)
    importance.observe({0: 4.0, 1: 1.0})
    importance.observe({0: 8.0})
    assert importance.averages == [0.5 * 4 + 0.5 * 8, 1.0, None]


def test_weights_are_a_softmax_with_a_floor():
    importance = LayerImportance(4)
    importance.observe({0: 1.0, 1: 2.0, 2: 3.0, 3: 2.0})
    powers = [math.exp(score / 2) for score in (1, 2, 3, 2)]
    expected = [0.05 + 0.8 * power / sum(powers) for power in powers]
    assert importance.weights() == pytest.approx(expected)
    assert sum(importance.weights()) == pytest.approx(1)


def test_units_do_not_matter():
    one, other = (LayerImportance(3) for _ in range(2))
    one.observe({0: 1.0, 1: 2.0, 2: 5.0})
    other.observe({0: 1e-6, 1: 2e-6, 2: 5e-6})
    assert one.weights() == pytest.approx(other.weights())


def test_a_layer_never_seen_counts_as_the_highest_seen():
    importance = LayerImportance(4)
    importance.observe({0: 1.0, 1: 3.0})
    weights = importance.weights()
    assert weights[2] == weights[3] == weights[1] > weights[0]


def squared_norms(engine, tokens: torch.Tensor) -> list[float]:
    """Of each layer, of the gradient of the whole batch at the weights of now, clipped to 1 over what trains."""
    trains = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    model = tiny_llama()
    model.load_state_dict(full_weights(engine))
    model(input_ids=tokens, labels=tokens).loss.backward()
    squares = {name: parameter.grad.double().pow(2).sum().item() for name, parameter in model.named_parameters()}
    shrink = min(1.0, 1.0 / (math.sqrt(sum(squares[name] for name in trains)) + 1e-6))
    of_layers = [f"model.layers.{layer}." for layer in range(6)]
    return [shrink**2 * sum(squares[name] for name in trains if name.startswith(layer)) for layer in of_layers]


def look_at_periods(ds_config: str, optim: str, settings: dict, periods: int) -> tuple[list, list, list]:
    """What the controller has learned of layers, the same from gradients taken apart, and the lines of the log."""
    config = lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL, lisa_sampler="adaptive", lisa_debug=True, **settings)
    engine, lisa = lisa_dist.initialize(tiny_llama(), ds_config, config, lr=1e-3, optim=optim)
    averages: list[float | None] = [None] * 6
    second, steps, returned = [0.0] * 6, [0] * 6, set()
    for step, micro_batches in enumerate(token_batches(periods * INTERVAL + 1, rows=4)):
        before = lisa.active_layers
        lisa.on_step_begin()
        if step % INTERVAL == 0 and step > 0:
            for layer in before:
                seen = math.sqrt(second[layer] / (1 - BETA2 ** steps[layer]))
                averages[layer] = seen if averages[layer] is None else (averages[layer] + seen) / 2
            staying = set(range(6)) if lisa.config.lisa_state == "keep" else set(before) & set(lisa.active_layers)
            for layer in set(range(6)) - staying:
                second[layer], steps[layer] = 0.0, 0
            returned |= (set(lisa.active_layers) - set(before)) & {layer for layer in range(6) if steps[layer]}
        if step == periods * INTERVAL:
            break
        for layer, square in enumerate(squared_norms(engine, micro_batches[0])):
            if layer in lisa.active_layers:
                second[layer], steps[layer] = BETA2 * second[layer] + (1 - BETA2) * square, steps[layer] + 1
        train_step(engine, lisa, micro_batches)
    found = lisa.selection.importance.averages
    theirs = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, found)
    assert theirs == [found] * dist.get_world_size(), "ranks have learned other numbers"
    lines = [vars(record) for record in lisa.records]
    weights = lisa.selection.weights_now
    engine.destroy()
    assert returned or lisa.config.lisa_state != "keep", "the test needs a layer that comes back with its moments"
    return found, averages, [lines, weights, len(lisa.active_layers)]


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(
    ("ds_config", "optim", "settings", "tolerance"),
    [
        ("zero2", "adamw_torch", {"lisa_state": "keep", "lisa_activated_layers": 3, "lisa_offload": "layers"}, 1e-3),
        full("zero3", "adamw_torch", {}, 1e-3),
        full("zero2_offload", "adamw_torch", {}, 1e-3),
        ("zero3", "lisa_adamw", {"lisa_state_bits": "layers=8"}, 0.03),
        ("zero2", "adamw_8bit", {}, 0.1),
    ],
)
def test_importance_is_the_norm_of_gradients(ds_config, optim, settings, tolerance):
    """The root mean square over a layer's steps, from AdamW's second moment, whatever stage and form it is in."""
    run = ds_config, optim, settings, 4 if "lisa_state" in settings else 2
    for found, expected, (lines, weights, num_active) in run_ranks(look_at_periods, 2, *run):
        assert [value is None for value in found] == [value is None for value in expected]
        seen = [layer for layer in range(6) if found[layer] is not None]
        assert len(seen) > 2, "the test needs more than one period's layers"
        assert [found[layer] for layer in seen] == pytest.approx([expected[layer] for layer in seen], rel=tolerance)
        assert lines[0]["probabilities"] == pytest.approx([num_active / 6] * 6)
        assert lines[1]["probabilities"] != pytest.approx([num_active / 6] * 6)
        assert sum(lines[1]["probabilities"]) == pytest.approx(num_active)
        assert inclusion_probabilities(weights, num_active) != pytest.approx(lines[1]["probabilities"])


def learn_apart(rank: int) -> str:
    config = lisa_dist.LisaConfig(lisa_interval_steps=1, lisa_sampler="adaptive")
    engine, lisa = lisa_dist.initialize(tiny_llama(), "zero2", config, lr=1e-3)
    try:
        for step, micro_batches in enumerate(token_batches(3, rows=4)):
            train_step(engine, lisa, micro_batches)
            if step == 0 and dist.get_rank() == rank:
                lisa.selection.importance.averages[5] = 1e3
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return "not seen"


@pytest.mark.usefixtures("cpu_ops")
def test_ranks_that_have_learned_other_weights_are_named():
    for said in run_ranks(learn_apart, 2, 1):
        assert "ranks [1] hold other layers, partitions or sampling weights than rank 0" in said


def favour_a_layer() -> list[int]:
    """Of 40 periods, where one layer's gradient is made thirty times as large, the visits."""
    model = tiny_llama()
    for parameter in model.model.layers[4].parameters():
        parameter.register_hook(lambda gradient: gradient * 30)
    config = lisa_dist.LisaConfig(lisa_interval_steps=1, lisa_sampler="adaptive", lisa_activated_layers=1)
    engine, lisa = lisa_dist.initialize(model, "zero2", config, lr=1e-5, max_grad_norm=0.0)
    for micro_batches in token_batches(40, rows=2):
        train_step(engine, lisa, micro_batches)
    engine.destroy()
    return lisa.visit_counts


@pytest.mark.usefixtures("cpu_ops")
def test_layers_with_large_gradients_are_drawn_more_often_and_all_are_seen():
    visits = run_ranks(favour_a_layer, 1)[0]
    assert visits[4] > 20
    assert min(visits) >= 1


def skip_a_period() -> tuple[list, list]:
    """Averages after a period whose one step was skipped, and after the next; and the layers of both."""
    config = lisa_dist.LisaConfig(lisa_sampler="adaptive", lisa_nonfinite="skip", lisa_interval_steps=1)
    engine, lisa = lisa_dist.initialize(tiny_llama(), "zero2", config, lr=1e-3)
    averages, sets = [], []
    for step, (tokens,) in enumerate(token_batches(2, rows=2)):
        lisa.on_step_begin()
        sets.append(lisa.active_layers)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss * (math.nan if step == 0 else 1.0))
        engine.step()
        lisa.on_step_begin()
        averages.append(list(lisa.selection.importance.averages))
    engine.destroy()
    return averages, sets


@pytest.mark.usefixtures("cpu_ops")
def test_a_layer_whose_steps_were_all_skipped_has_shown_nothing():
    (skipped, then), (_, active) = run_ranks(skip_a_period, 1)[0]
    assert skipped == [None] * 6
    assert {layer for layer, value in enumerate(then) if value is not None} == set(active)


def test_the_state_is_json():
    importance = LayerImportance(3)
    importance.observe({0: 1.25, 2: 1 / 3})
    other = LayerImportance(3)
    other.load_state_dict(json.loads(json.dumps(importance.state_dict())))
    assert other.weights() == importance.weights()


def test_no_power_of_the_softmax_is_below_a_millionth_of_the_highest():
    importance = LayerImportance(32)
    importance.observe({layer: 1e9 if layer == 5 else 1.0 for layer in range(32)})
    powers = [1.0 if layer == 5 else 1e-6 for layer in range(32)]
    assert importance.weights() == pytest.approx([0.2 / 32 + 0.8 * power / sum(powers) for power in powers], rel=1e-7)
    assert sum(inclusion_probabilities(importance.weights(), 3)) == pytest.approx(3)
