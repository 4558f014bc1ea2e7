"""Weights of layers from a probe: what it makes of losses, what it tries, and that it leaves no trace in a run."""

import json
from pathlib import Path

import pytest
import torch
from cells import full
from engines import full_weights, my_rows, train_step
from models import tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.core.probe import Stretch, scores, stretches

STEPS, LR = 5, 1e-3


@pytest.mark.parametrize(
    ("num_layers", "num_active", "expected"),
    [
        (1, 1, [((0, 1), (0, 1))]),
        (5, 2, [((0, 1), (0, 1)), ((1, 2), (1, 2)), ((2, 3), (2, 3)), ((3, 4), (3, 4)), ((4, 5), (4, 5))]),
        (16, 1, [((2 * number, 2 * number + 2), (2 * number, 2 * number + 1)) for number in range(8)]),
        (80, 4, [((10 * number, 10 * number + 10), (10 * number + 3, 10 * number + 7)) for number in range(8)]),
    ],
)
def test_stretches_cover_the_layers_and_try_the_middle(num_layers, num_active, expected):
    assert stretches(num_layers, num_active) == [Stretch(range(*layers), range(*tried)) for layers, tried in expected]


@pytest.mark.parametrize("num_active", [1, 2, 25])
@pytest.mark.parametrize("num_layers", [2, 7, 9, 30, 61])
def test_every_stretch_tries_as_many_layers_and_all_are_in_one(num_layers, num_active):
    found = stretches(num_layers, num_active)
    assert [layer for stretch in found for layer in stretch.layers] == list(range(num_layers))
    assert len({len(stretch.tried) for stretch in found}) == 1
    assert all(0 < len(stretch.tried) <= num_active for stretch in found)
    assert all(set(stretch.tried) <= set(stretch.layers) for stretch in found)


def test_scores_are_standardized_and_what_batches_share_is_no_noise():
    found = scores([[3.0, 5.0, 9.0], [2.0, 4.0, 8.0], [1.0, 3.0, 7.0]])
    assert found == pytest.approx([-1.0, 0.0, 1.0])


def test_scores_shrink_by_the_share_of_noise():
    """Means are 1 and 2, their variance 1/2; each mean of two batches has a variance of 1/8 of its own.

    Around their mean over stretches batches vary by 1/8, which is half of 1/4, a batch's own variance.
    """
    losses = [[2.25, 1.75], [0.75, 1.25]]
    assert scores(losses) == pytest.approx([-(0.5**0.5) * (1 - 0.125 / 0.5), 0.5**0.5 * (1 - 0.125 / 0.5)])


def test_the_share_of_noise_is_that_of_many_draws():
    """Stretches far apart whose batches have noise of variance 4: of 16 batches e is 0.25."""
    generator = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(2000):
        means = 10 * torch.randn(4, 1, generator=generator, dtype=torch.float64)
        shared = torch.randn(1, 16, generator=generator, dtype=torch.float64)
        losses = means + shared + 2 * torch.randn(4, 16, generator=generator, dtype=torch.float64)
        variance = losses.mean(dim=1).var().item()
        kept.append(variance * (1 - torch.tensor(scores(losses.tolist()), dtype=torch.float64).var().sqrt().item()))
    assert sum(kept) / len(kept) == pytest.approx(0.25, rel=0.05)


def test_noise_alone_has_no_score():
    generator = torch.Generator().manual_seed(0)
    assert max(map(abs, scores(torch.randn(8, 4, generator=generator).tolist()))) < 0.5
    assert scores([[2.0, 3.0], [3.0, 2.0]]) == [0.0, 0.0]
    assert scores([[1.0, 2.0]]) == [0.0]


def build(ds_config: str, settings: dict, options: dict, dtype: torch.dtype):
    """An engine and a controller whose sampler goes by weights."""
    config = lisa_dist.LisaConfig(lisa_interval_steps=2, lisa_sampler="balanced", lisa_debug=True, **settings)
    return lisa_dist.initialize(tiny_llama().to(dtype), ds_config, config, **{"lr": LR} | options)


def probe(engine, lisa) -> list[float]:
    """Some steps on two batches, then the losses of these: random tokens have nothing to teach about others."""
    batches = [micro_batches[0] for micro_batches in token_batches(9, rows=4)[-2:]]

    def train(step: int) -> None:
        for group in engine.optimizer.param_groups:
            group["lr"] = LR * (step + 1)
        rows = my_rows(batches[step % 2])
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()

    def held_out() -> list[float]:
        with torch.no_grad():
            return [engine(input_ids=my_rows(rows), labels=my_rows(rows)).loss.item() for rows in batches]

    return lisa_dist.probe_layers(lisa, train, held_out)


def compare(ds_config: str, settings: dict, options: dict, dtype: torch.dtype, file: Path) -> dict:
    """A run that was probed, and one that is given the weights that the probe has found."""
    engine, lisa = build(ds_config, {"lisa_probe_steps": STEPS} | settings, options, dtype)
    before, rates = originals(engine, lisa), [group["lr"] for group in engine.optimizer.param_groups]
    counters = lisa.partitions.counters()
    found = probe(engine, lisa)
    assert lisa.partitions.counters() == counters
    weights = lisa.selection.weights
    assert weights is not None
    assert weights == lisa.state_dict()["probed"]
    outcome = {"found": found, "weights": weights, "active": [lisa.active_layers]}
    for name, value in originals(engine, lisa).items():
        assert torch.equal(value, before[name]), f"the probe has changed {name}"
    assert [group["lr"] for group in engine.optimizer.param_groups] == rates
    assert (engine.global_steps, engine.micro_steps, lisa.period, sum(lisa.visit_counts)) == (0, 0, 0, 2)
    runs = []
    for name in ("probed", "given"):
        if name == "given":
            if dist.get_rank() == 0:
                file.write_text(json.dumps(weights), encoding="utf-8")
            dist.barrier()
            engine, lisa = build(
                ds_config, settings | {"lisa_probe_steps": 0, "lisa_weights_file": str(file)}, options, dtype
            )
        losses = [train_step(engine, lisa, micro_batches) for micro_batches in token_batches(5, rows=4)]
        runs.append((losses, originals(engine, lisa), lisa.visit_counts, [vars(one)["layers"] for one in lisa.records]))
        lisa.close()
        engine.destroy()
    (losses, values, *visits), (others, other_values, *other_visits) = runs
    outcome |= {"losses": (losses, others), "visits": (visits, other_visits)}
    outcome["differing"] = [name for name, value in values.items() if not torch.equal(value, other_values[name])]
    return outcome


def originals(engine, lisa) -> dict[str, torch.Tensor]:
    """The weights, also where the device holds them in fewer bits."""
    if lisa.frozen_layers is None:
        return full_weights(engine)
    return {name: value.clone() for name, value in engine.module.state_dict().items()}


SMALL = {"lisa_state_bits": "embed=factored,head=factored,layers=8", "lisa_master": "bf16_sr"}


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(
    ("ds_config", "world_size", "settings", "options", "dtype"),
    [
        ("zero2", 2, {}, {}, torch.float32),
        ("zero3", 2, {"lisa_wake_warmup_steps": 1}, {}, torch.bfloat16),
        ("zero1", 1, SMALL | {"lisa_probe_steps": 10}, {"optim": "lisa_adamw"}, torch.bfloat16),
        full("zero2", 2, {"lisa_frozen_bits": 8}, {"optim": "lisa_adamw"}, torch.bfloat16),
        full("zero2_offload", 2, {}, {}, torch.float32),
        full("zero3_offload", 2, {}, {}, torch.bfloat16),
        full("zero2", 2, {"lisa_always_on": "head,rest", "lisa_block_probability": "embed=0.5"}, {}, torch.float32),
    ],
)
def test_a_probed_run_is_one_that_is_given_its_weights(ds_config, world_size, settings, options, dtype, tmp_path):
    outcomes = run_ranks(compare, world_size, ds_config, settings, options, dtype, tmp_path / "weights.json")
    for outcome in outcomes:
        assert len(set(outcome["weights"])) > 1
        assert sum(outcome["weights"]) == pytest.approx(1)
        assert outcome["differing"] == []
        assert outcome["losses"][0] == outcome["losses"][1]
        assert outcome["visits"][0] == outcome["visits"][1]
        assert outcome["weights"] == outcomes[0]["weights"]


def by_plain_torch() -> list[float]:
    """Each layer of six, trained for some steps with embed, head and rest by torch's AdamW: the mean of two losses."""
    batches = [micro_batches[0] for micro_batches in token_batches(9, rows=4)[-2:]]
    found = []
    for layer in range(6):
        model = tiny_llama()
        for number, one in enumerate(model.model.layers):
            one.requires_grad_(number == layer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = LR * (step + 1)
            model(input_ids=batches[step % 2], labels=batches[step % 2]).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found.append(sum(model(input_ids=rows, labels=rows).loss.item() for rows in batches) / 2)
    return found


def probed_alone(ds_config: str) -> tuple[list[float], list[float]]:
    settings = {"lisa_importance_floor": 0.1, "lisa_importance_temperature": 0.5, "lisa_depth_bias": 1.0}
    engine, lisa = build(ds_config, settings | {"lisa_probe_steps": STEPS}, {}, torch.float32)
    found = probe(engine, lisa)
    engine.destroy()
    return found, lisa.selection.weights


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("ds_config", ["zero2", full("zero3")])
def test_the_losses_of_a_probe_are_plain_adamw_s(ds_config):
    expected = by_plain_torch()
    for found, weights in run_ranks(probed_alone, 2, ds_config):
        assert found == pytest.approx(expected, abs=1e-5)
        by_depth = [weight / (layer + 1) for layer, weight in enumerate(weights)]
        by_loss = sorted(range(6), key=expected.__getitem__)
        assert sorted(range(6), key=by_depth.__getitem__, reverse=True) == by_loss
        assert min(by_depth) > 0.1 / 36


def error_of(call, *arguments) -> str:
    with pytest.raises(ValueError, match="probe") as error:
        call(*arguments)
    return str(error.value)


def refuse_to_probe() -> list[str]:
    engine, lisa = build("zero2", {}, {}, torch.float32)
    said = [error_of(probe, engine, lisa)]
    engine.destroy()
    engine, lisa = build("zero2", {"lisa_probe_steps": STEPS}, {}, torch.float32)
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    engine.lr_scheduler = scheduler = torch.optim.lr_scheduler.ConstantLR(lisa.partitions.optimizer)
    for losses in ([1.0], [1.0, float("nan")]):
        said.append(error_of(lisa_dist.probe_layers, lisa, lambda step: None, lambda losses=losses: losses))
    with pytest.raises(ZeroDivisionError):
        lisa_dist.probe_layers(lisa, lambda step: 1 // 0, list)
    assert engine.lr_scheduler is scheduler
    engine.lr_scheduler = None
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    (micro_batches,) = token_batches(1, rows=4)
    said.append(error_of(train_step, engine, lisa, micro_batches))
    lisa.sample_by([1.0] * 6)
    train_step(engine, lisa, micro_batches)
    said.append(error_of(probe, engine, lisa))
    engine.destroy()
    return said


@pytest.mark.usefixtures("cpu_ops")
def test_what_a_probe_cannot_go_by_is_refused():
    no_steps, too_few, not_finite, forgotten, too_late = run_ranks(refuse_to_probe, 1)[0]
    assert no_steps == "probe_layers: the settings have no lisa_probe_steps; give a number of steps, such as 10."
    assert too_few.startswith(f"--lisa_probe_steps {STEPS}: stretches are compared by two held-out batches or")
    assert "after steps of layers 0 to 0 the held-out loss is nan; lower the learning rate" in not_finite
    assert "calls lisa_dist.probe_layers before its first step; call it" in forgotten
    assert too_late == "probe_layers: 1 steps are over; layers are probed before the first."


def saved(period: int, **settings) -> dict:
    """The state of a run whose period begins at a multiple of 20 steps, or five steps later."""
    lisa = lisa_dist.LisaController(tiny_llama(), lisa_dist.LisaConfig(lisa_sampler="balanced", **settings))
    if lisa.config.lisa_probe_steps:
        lisa.selection.sample_by([0.1, 0.1, 0.1, 0.2, 0.2, 0.3])
    return lisa.state_dict() | {"step": 20 * period if period else 5}


def resumed(state: dict, **settings) -> lisa_dist.LisaController:
    lisa = lisa_dist.LisaController(tiny_llama(), lisa_dist.LisaConfig(**{"lisa_sampler": "balanced"} | settings))
    lisa.load_state_dict(json.loads(json.dumps(state)))
    return lisa


def test_a_resumed_run_has_the_weights_of_its_probe():
    """Whatever the steps that it is given now; a depth bias is the settings' own."""
    state = saved(0, lisa_probe_steps=5)
    assert resumed(state, lisa_probe_steps=5).selection.weights == state["probed"]
    assert resumed(state, lisa_probe_steps=3).selection.weights == state["probed"]
    at_a_switch = saved(1, lisa_probe_steps=5)
    lisa = resumed(at_a_switch, lisa_probe_steps=5, lisa_depth_bias=1.0)
    expected = [weight * layer / 6 for layer, weight in enumerate(state["probed"], 1)]
    assert lisa.selection.weights == pytest.approx(expected)
    assert resumed(at_a_switch).selection.weights is None


@pytest.mark.parametrize(
    ("state", "settings", "said"),
    [
        ({}, {"lisa_probe_steps": 5}, "--lisa_probe_steps 5: the run saved at step 5 was not probed, and layers"),
        ({"lisa_probe_steps": 5}, {}, r"other settings than --lisa_probe_steps 0 \(it had 5\): they can"),
        (
            {},
            {"lisa_unit": "module", "lisa_budget": "8%", "lisa_sampler": "uniform"},
            "saved at step 5 sampled by layer",
        ),
    ],
)
def test_a_run_that_cannot_be_resumed_so_says_why(state, settings, said):
    with pytest.raises(ValueError, match=said):
        resumed(saved(0, **state), **settings)
