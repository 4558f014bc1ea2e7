"""Weights of the layers: what is read of files, and what the adaptive sampler learns, against gradients taken apart."""

import math

import pytest
import torch
from cases import full
from engines import full_weights, train_step
from models import tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.core.layer_weights import LayerImportance, load_layer_weights
from lisa_dist.core.sampling import inclusion_probabilities

INTERVAL, BETA2 = 3, 0.999


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
        (b'{"0": 1}', "must hold a JSON list of numbers"),
        (b'[1, "2", 3]', "must hold a JSON list of numbers"),
        (b"[1, 2]", "holds 2 weights, but the model has 3"),
        (b"[1, -2, 3]", "the weight of layer 1 is -2"),
        (b"[1, NaN, 3]", "the weight of layer 1 is nan"),
        (b"[1, 1" + b"0" * 400 + b", 3]", "the weight of layer 1 is inf; weights are finite and not negative"),
        (b"[0, 0, 0]", "only 0 weights are positive, but --lisa_activated_layers 2"),
        (b"[0, 1, 0]", "only 1 weights are positive"),
    ],
)
def test_a_bad_weights_file_is_named(tmp_path, content, said):
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="--lisa_weights_file") as error:
        load_layer_weights(str(path), 3, 2)
    assert str(path) in str(error.value)
    assert said in str(error.value)


NORMS = "block,full.weight_norm,lora.weight_norm\nembed,1,2\nlayers.0,2,4\nlayers.1,4,2\nlayers.2,1,0\nhead,1,9\n"


@pytest.mark.parametrize(
    ("name", "content", "columns", "weights"),
    [
        ("run#1/weights.json", "[1, 0.5, 3]", "", [1.0, 0.5, 3.0]),
        ("norms.csv", NORMS, "#lora.weight_norm/full.weight_norm", [2.0, 0.5, 0.0]),
        ("norms.csv", NORMS, "#full.weight_norm", [2.0, 4.0, 1.0]),
    ],
)
def test_weights_are_read_of_a_list_or_of_columns_of_a_table(tmp_path, name, content, columns, weights):
    """A folder may have a number sign in its name."""
    (tmp_path / "run#1").mkdir()
    (tmp_path / name).write_text(content)
    assert load_layer_weights(f"{tmp_path / name}{columns}", 3, 2) == weights


@pytest.mark.parametrize(
    ("content", "columns", "said"),
    [
        ("", "#a", "holds no norms of layers; it is the norms.csv that lisa-dist norms writes"),
        ("\xff\xfe\x00", "", "is no text in UTF-8"),
        ("block,a\n", "#a", "holds no norms of layers"),
        ("layer,a\nlayers.0,1\n", "#a", "holds no norms of layers"),
        (NORMS, "", "behind the #, as norms.csv#A/B; it has full.weight_norm, lora.weight_norm"),
        (NORMS, "#lora", "it has full.weight_norm, lora.weight_norm"),
        (NORMS, "#full.weight_norm/lora.weight_norm/full.weight_norm", "it has full.weight_norm"),
        (NORMS, "#full.weight_norm/lora.weight_norm", "lora.weight_norm of a layer is 0"),
        (NORMS.replace("4,2", "4,x"), "#lora.weight_norm", "'x' is no number of a layer"),
        (NORMS.replace("4,2", "4"), "#lora.weight_norm", "is no number of a layer"),
        (NORMS.replace("layers.2,1,0\n", ""), "#full.weight_norm", "holds 2 weights, but the model has 3"),
        (NORMS.replace("layers.1,4,2\n", ""), "#full.weight_norm", "has no row layers.1, but has later ones"),
    ],
)
def test_a_bad_table_of_norms_is_named(tmp_path, content, columns, said):
    path = tmp_path / "norms.csv"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="--lisa_weights_file") as error:
        load_layer_weights(f"{path}{columns}", 3, 2)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("observed", "powers"),
    [
        ([], [1] * 4),
        ([{0: math.nan, 2: math.inf}], [1] * 4),
        ([{1: 0.0}], [1] * 4),
        ([{0: 1.0, 1: 2.0, 2: 3.0, 3: 2.0}], [math.exp(score / 2) for score in (1, 2, 3, 2)]),
        ([{0: 1e-6, 1: 2e-6, 2: 3e-6, 3: 2e-6}], [math.exp(score / 2) for score in (1, 2, 3, 2)]),
        # A layer that was never seen counts as the highest that was.
        ([{0: 1.0, 1: 3.0}], [math.exp(score / 2) for score in (1, 3, 3, 3)]),
        # Averages are exponential over visits.
        ([{0: 4.0, 1: 1.0}, {0: 8.0}], [math.exp(score / 3.5) for score in (0.5 * 4 + 0.5 * 8, 1, 6)]),
        # No power is below a millionth of the highest.
        ([dict.fromkeys(range(32), 1.0) | {5: 1e9}], [1.0 if layer == 5 else 1e-6 for layer in range(32)]),
    ],
)
def test_weights_are_a_softmax_of_averages_with_a_floor(observed, powers):
    importance = LayerImportance(len(powers))
    for seen in observed:
        importance.observe(seen)
    expected = [0.2 / len(powers) + 0.8 * power / sum(powers) for power in powers]
    assert importance.weights() == pytest.approx(expected, rel=1e-6)
    assert sum(inclusion_probabilities(importance.weights(), 3)) == pytest.approx(3)


def squared_norms(engine, tokens: torch.Tensor) -> list[float]:
    """Each layer's, of the gradient of the whole batch at the weights of now, clipped to 1 over what trains."""
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
