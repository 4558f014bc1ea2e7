"""The controller's contract: when it switches, what it refuses, what it logs, its state."""

import itertools
import json
from unittest import mock

import deepspeed
import pytest
import torch
from cases import full
from engines import my_rows
from models import tiny_gpt2, tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.checkpoint.resume import load_checkpoint
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.core import controller
from lisa_dist.core.controller import LisaController
from lisa_dist.core.engine_checks import prepare_ds_config
from lisa_dist.core.sampling import ActiveSet, Period, sample_period
from lisa_dist.errors import UserError
from lisa_dist.zero import stages
from lisa_dist.zero.stage3 import forget_module_order

pytestmark = pytest.mark.usefixtures("cpu_ops")


BATCHES = [tokens for (tokens,) in token_batches(18, rows=4)]


def micro_step(engine, tokens) -> None:
    rows = my_rows(tokens)
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()


def train(engine, lisa, steps: int) -> None:
    for tokens in BATCHES[engine.global_steps : engine.global_steps + steps]:
        lisa.on_step_begin()
        micro_step(engine, tokens)


def start(ds_config="zero2", accumulation=1, output_dir=None, model=None, **settings):
    return lisa_dist.initialize(
        model or tiny_llama(),
        ds_config,
        lisa_dist.LisaConfig(**{"lisa_interval_steps": 2} | settings),
        lr=1e-3,
        gradient_accumulation_steps=accumulation,
        output_dir=output_dir,
    )


TIED = "one tied matrix; give both the same"


@pytest.mark.parametrize(
    ("build", "settings", "said"),
    [
        (tiny_llama, {"lisa_activated_layers": 7}, "--lisa_activated_layers 7: the model has 6 decoder layers"),
        (tiny_gpt2, {"lisa_always_on": "head,rest", "lisa_frozen": "embed"}, TIED),
        (tiny_gpt2, {"lisa_always_on": "embed,rest"}, TIED),
        (tiny_gpt2, {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.5,head=0.1"}, TIED),
        (tiny_gpt2, {"lisa_state_bits": "embed=factored,head=8"}, TIED),
        (tiny_gpt2, {"lisa_lr_scale": "embed=0.5,head=1"}, TIED),
        (tiny_gpt2, {"lisa_offload": "embed"}, "one tied matrix; give both or neither"),
        (
            tiny_llama,
            {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.9,head=0.2"},
            "add up to 1.1 (embed=0.9, head=0.2)",
        ),
        (tiny_llama, {"lisa_layers_attribute": "model.nothing"}, "--lisa_layers_attribute model.nothing"),
        (tiny_llama, {"lisa_sampler": "weighted", "lisa_weights_file": "absent.json"}, "absent.json: cannot be read"),
    ],
)
def test_settings_that_do_not_fit_the_model(build, settings, said):
    with pytest.raises(ValueError, match="--lisa_") as error:
        LisaController(build(), lisa_dist.LisaConfig.plain(**settings))
    assert said in str(error.value)


def test_only_the_active_blocks_require_gradients():
    model = tiny_llama()
    lisa = LisaController(model, lisa_dist.LisaConfig(lisa_always_on="head,rest", lisa_frozen="embed"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"lm_head.weight", "model.norm.weight"}
    for layer in lisa.active_layers:
        expected |= {name for name, _ in model.named_parameters() if name.startswith(f"model.layers.{layer}.")}
    assert trained == expected
    assert len(lisa.active_layers) == 2


def switch_at_accumulation_boundaries() -> list[int]:
    engine, lisa = start(accumulation=3)
    switched_at = []
    for tokens in BATCHES:
        if lisa.on_step_begin():
            switched_at.append(engine.micro_steps)
        assert not lisa.on_step_begin(), "a second call in the same step does nothing"
        micro_step(engine, tokens)
    engine.destroy()
    return switched_at


def test_it_switches_at_accumulation_boundaries_only():
    assert run_ranks(switch_at_accumulation_boundaries, 2) == [[6, 12], [6, 12]]


def miss_a_switch(how: str) -> str:
    engine, lisa = start(accumulation=2)
    for tokens in BATCHES[:4]:
        lisa.on_step_begin()
        micro_step(engine, tokens)
    if how == "step":  # of a model as from_pretrained gives it, which nobody has put in training mode
        engine.eval()
    with pytest.raises(RuntimeError) as error:
        if how.startswith("call at "):
            engine.global_steps = int(how.removeprefix("call at "))
            lisa.on_step_begin()
        for tokens in BATCHES[4:6]:
            micro_step(engine, tokens)
    engine.destroy()
    return str(error.value)


@pytest.mark.parametrize(("how", "step"), [("forward", 2), ("step", 2), ("call at 3", 3), ("call at 4", 4)])
def test_a_missed_switch_is_an_error(how, step):
    message = run_ranks(miss_a_switch, 2, how)[0]
    assert message.startswith(f"step {step} is in period {step // 2}")
    assert "call on_step_begin() before every step" in message


def evaluate_at_a_boundary() -> None:
    """An evaluation between the last step of a period and the switch is no training."""
    engine, lisa = start()
    train(engine, lisa, 2)
    engine.eval()
    engine(input_ids=BATCHES[0], labels=BATCHES[0])
    engine.train()
    with torch.no_grad():
        engine(input_ids=BATCHES[0], labels=BATCHES[0])
    assert lisa.on_step_begin()
    engine.destroy()


def test_evaluation_at_a_boundary_is_allowed():
    run_ranks(evaluate_at_a_boundary, 2)


def disagree(what: str) -> str:
    rank = dist.get_rank()
    with pytest.raises(RuntimeError) as error:
        if what == "seed":
            start(lisa_seed=rank)
        elif what == "interval":
            LisaController(tiny_llama(), lisa_dist.LisaConfig(lisa_interval_steps=2 + rank))
        elif what == "period":
            model = tiny_llama()
            lisa = LisaController(model, lisa_dist.LisaConfig.plain())
            engine, _ = engine_for(model, lisa, "zero3")
            lisa.period = rank
            lisa.attach(engine)
        else:
            engine, lisa = start()
            train(engine, lisa, 2)
            received = ActiveSet((0, 1) if rank == 1 else (2, 3))  # a rank that has received something else
            with mock.patch.object(controller, "broadcast_active_set", return_value=received):
                lisa.on_step_begin()
    return str(error.value)


def engine_for(model, lisa, ds_config="zero2"):
    from lisa_dist.optim.build import build_optimizer

    filled = lisa_dist.load_ds_config(ds_config, model=model)
    optimizer = build_optimizer(lisa.param_groups(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=filled)
    return engine, optimizer


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("seed", "ranks [1] have other --lisa_* settings"),
        ("interval", "ranks [1] have other --lisa_* settings"),
        ("period", "ranks [1] are in another period"),
        ("switch", "ranks [1] hold other layers"),
    ],
)
def test_ranks_that_disagree_are_named_on_every_rank(what, said):
    for message in run_ranks(disagree, 2, what):
        assert said in message


def attach_wrongly(what: str) -> str:
    model = tiny_llama()
    lisa = LisaController(model, lisa_dist.LisaConfig.plain())
    params, ds_config = lisa.param_groups(), lisa_dist.load_ds_config("zero2", model=model)
    if what == "stage 0":
        ds_config = {"train_micro_batch_size_per_gpu": 1}
    elif what == "bf16 optimizer":
        model.bfloat16()
        ds_config = lisa_dist.load_ds_config("zero1", model=model) | {"data_types": {"grad_accum_dtype": "fp32"}}
    elif what == "other groups":
        params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    elif what == "reentrant":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(params), config=ds_config)
    if what == "private name":
        del engine.optimizer._grad_acc_hooks
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked by the caller
        lisa.attach(engine)
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("stage 0", "set zero_optimization.stage to 1"),
        ("bf16 optimizer", "grad_accum_dtype = fp32"),
        ("other groups", "build the optimizer from the controller's param_groups()"),
        ("reentrant", "the model's gradient checkpointing is reentrant"),
        ("private name", "lacks _grad_acc_hooks, which LISA needs"),
    ],
)
def test_an_engine_that_cannot_work_is_refused(what, said):
    assert said in run_ranks(attach_wrongly, 2, what)[0]


@pytest.mark.parametrize("version", ["0.18.2", "0.19.7", "0.20.0", "1.0"])
def test_a_deepspeed_outside_the_range_is_refused_at_start(monkeypatch, version):
    monkeypatch.setattr(stages.metadata, "version", lambda name: version)
    with pytest.raises(ValueError, match=f"DeepSpeed {version} is installed") as error:
        LisaController(tiny_llama(), lisa_dist.LisaConfig.plain())
    assert "pip install 'deepspeed>=0.19.8,<0.20'" in str(error.value)


def train_with_log(output_dir: str) -> list[int]:
    engine, lisa = start("zero3", output_dir=output_dir)
    train(engine, lisa, 7)
    lisa.close()
    engine.destroy()
    return lisa.visit_counts


def test_the_log_has_a_line_for_each_period(tmp_path):
    visits = run_ranks(train_with_log, 2, str(tmp_path / "out"))[0]
    lines = [json.loads(line) for line in (tmp_path / "out" / "lisa_log.jsonl").read_text().splitlines()]
    assert [line["period"] for line in lines] == [0, 1, 2, 3]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert list(lines[0]) == [
        "period", "step", "layers", "blocks", "seconds", "state_bytes_per_rank", "bytes_released", "live_bytes",
        "host_bytes", "probabilities",
    ]  # fmt: skip
    assert len({line["state_bytes_per_rank"] for line in lines}) == 1
    assert lines[0]["state_bytes_per_rank"] > 0
    assert lines[0]["bytes_released"] == 0
    assert 0 < lines[1]["bytes_released"] < lines[0]["state_bytes_per_rank"]  # embed, head and rest stay
    assert all(line["live_bytes"] > line["state_bytes_per_rank"] for line in lines)
    assert visits == [sum(layer in line["layers"] for line in lines) for layer in range(6)]


def test_a_ds_config_that_cannot_work_is_refused_before_there_is_an_engine():
    with pytest.raises(ValueError, match=r"the DeepSpeed config has zero_optimization\.stage = 0"):
        prepare_ds_config({"zero_optimization": {"stage": 0}}, lisa_dist.LisaConfig.plain(), "adamw_torch", "fp32")


def train_with_sampled_blocks() -> tuple[dict[str, int], list[list[str]]]:
    engine, lisa = start(lisa_always_on="rest", lisa_block_probability="embed=0.5,head=0.5")
    train(engine, lisa, 9)
    lisa.close()
    return lisa.block_visit_counts, [record.blocks for record in lisa.records]


def test_periods_of_sampled_blocks_are_counted():
    counts, blocks = run_ranks(train_with_sampled_blocks, 1)[0]
    assert counts == {name: sum(name in of_period for of_period in blocks) for name in ("embed", "head")}
    assert 0 < sum(counts.values()) < 2 * len(blocks)


def partitions_before_and_after(gamma: int) -> bool:
    """Whether the partitions of a period are those of the one before."""
    engine, lisa = start(lisa_activated_layers=gamma)
    seen = []
    for tokens in BATCHES[:3]:
        lisa.on_step_begin()
        seen.append([group["params"][0] for group in lisa.partitions.optimizer.param_groups])
        micro_step(engine, tokens)
    return all(one is other for one, other in zip(seen[0], seen[-1], strict=True))


def test_a_switch_to_the_same_layers_builds_nothing_anew():
    assert run_ranks(partitions_before_and_after, 1, 6)[0]
    assert not run_ranks(partitions_before_and_after, 1, 2)[0]


def debug_finds_drift(steps: int) -> str:
    engine, lisa = start(lisa_debug=True)
    train(engine, lisa, steps)
    frozen = next(layer for layer in range(6) if layer not in lisa.active_layers)
    with torch.no_grad():
        next(iter(lisa.blocks.layers[frozen].parameters.values())).view(-1)[3].add_(1e-3)
    with pytest.raises(RuntimeError, match="have changed") as error:
        lisa.on_step_begin() if steps == 2 else lisa.close()
    engine.destroy()
    return f"{frozen}: {error.value}"


@pytest.mark.parametrize("steps", [2, 1], ids=["at a switch", "at the end"])
def test_debug_mode_sees_a_frozen_weight_move(steps):
    frozen, message = run_ranks(debug_finds_drift, 2, steps)[0].split(": ", 1)
    assert f"model.layers.{frozen}." in message


def sample_otherwise_on_rank_1() -> list:
    engine, lisa = start("zero2", lisa_interval_steps=1)
    if dist.get_rank() == 1:
        lisa.selection.sample = lambda period: ActiveSet((0, 1) if rank_0_sample(period) != (0, 1) else (2, 3))
    train(engine, lisa, 3)
    lisa.close()
    engine.destroy()
    return [tuple(record.layers) for record in lisa.records]


def rank_0_sample(period: int) -> tuple[int, ...]:
    return sample_period("uniform", Period(6, 2, 0, period)).layers


def test_rank_0_samples_for_all():
    assert run_ranks(sample_otherwise_on_rank_1, 2) == [[rank_0_sample(period) for period in range(3)]] * 2


def restore_state() -> None:
    engine, lisa = start("zero2", lisa_seed=7)
    first = lisa.active_layers
    train(engine, lisa, 5)
    state = json.loads(json.dumps(lisa.state_dict()))
    assert state["period"] == 2
    assert set(lisa.active_layers) != set(first), "the test needs other layers than period 0's"
    engine.destroy()
    # Before the engine exists, and with an engine that already is partitioned for another set; with layers that the
    # sampler would not sample for the period too.
    other_layers = [layer for layer in range(6) if layer not in lisa.active_layers][:2]
    for attached, layers in ((False, state["active_layers"]), (True, state["active_layers"]), (False, other_layers)):
        model = tiny_llama(seed=9)
        other = LisaController(model, lisa_dist.LisaConfig(lisa_interval_steps=2, lisa_seed=7))
        if not attached:
            other.load_state_dict(state | {"active_layers": layers})
        engine, _ = engine_for(model, other)
        if not attached:
            engine.global_steps = state["step"]
        other.attach(engine)
        if attached:
            other.load_state_dict(state)
        assert other.active_layers == tuple(layers)
        assert other.visit_counts == lisa.visit_counts
        held = {name for key in other.partition_states() for name in key}
        assert held == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        engine.destroy()


def test_state_comes_back_before_and_after_attach():
    run_ranks(restore_state, 2)


def train_one_model_twice(folder: str) -> None:
    """As a cell of a notebook that is run again: nobody destroys its engine."""
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    for ds_config in ("zero2", "zero1"):  # each run ends with a period
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(UserError, match="reentrant"):
            start(ds_config, model=model)
        model.gradient_checkpointing_disable()
        engine, lisa = start(ds_config, model=model)
        train(engine, lisa, 4)
        with pytest.raises(UserError, match="this LlamaForCausalLM is in a DeepSpeed engine of another trainer"):
            LisaController(model, lisa.config)
        lisa.close()
        save_checkpoint(lisa, f"{folder}/checkpoint-4")
        assert {name for name, one in model.named_parameters() if not one.requires_grad} == {"lm_head.weight"}
        assert not any(map(vars, model.parameters())), "attributes of parameters"
        assert not any(module._forward_hooks | module._forward_pre_hooks for module in model.modules())
    model.train()
    model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad), "hooks on gradients"


def test_a_model_can_be_trained_again(tmp_path):
    run_ranks(train_one_model_twice, 1, str(tmp_path))


def roll_back(folder: str) -> tuple[list[int], list[int]]:
    """As a loop does whose loss has blown up; the steps of the lines that are in memory."""
    engine, lisa = start(output_dir=folder)
    train(engine, lisa, 3)
    save_checkpoint(lisa, f"{folder}/checkpoint-3")
    for _ in range(2):
        train(engine, lisa, 4)
        load_checkpoint(lisa, f"{folder}/checkpoint-3")
    train(engine, lisa, 4)
    lisa.close()
    engine.destroy()
    return [one.step for one in lisa.records], [line["step"] for line in lisa.movement.lines]


def test_logs_of_a_run_that_goes_back_to_a_checkpoint_have_each_period_once(tmp_path):
    in_memory = run_ranks(roll_back, 1, str(tmp_path))[0]
    written = [
        [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("lisa_log.jsonl", "lisa_movement.jsonl")
    ]
    assert written == [[0, 2, 4, 6], [2, 4, 6, 7]]
    assert list(in_memory) == written


def keep_identity(ds_config: str) -> None:
    """The optimizer, the inner optimizer and its groups stay the same objects over switches; a schedule runs on."""
    model = tiny_llama()
    lisa = LisaController(model, lisa_dist.LisaConfig(lisa_interval_steps=1))
    engine, inner = engine_for(model, lisa, ds_config)
    lisa.attach(engine)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1 / (1 + step))
    outer, groups = engine.optimizer, list(inner.param_groups)
    for step, tokens in enumerate(BATCHES[:6]):
        lisa.on_step_begin()
        assert engine.optimizer is outer
        assert outer.optimizer is inner
        assert all(now is then for now, then in zip(inner.param_groups, groups, strict=True))
        assert {group["lr"] for group in engine.optimizer.param_groups} == {1e-3 / (1 + step)}
        micro_step(engine, tokens)
        schedule.step()
    engine.destroy()


@pytest.mark.parametrize("ds_config", [full("zero1"), "zero2", "zero3"])
def test_schedulers_stay_bound(ds_config):
    run_ranks(keep_identity, 2, ds_config)


def train_beside(ds_config: str) -> None:
    """A plain engine that was there before anything of LISA's goes on training, and saves, after LISA has come."""
    kind = (stages.STAGE_3 if ds_config == "zero3" else stages.STAGE_1_2).optimizer_class
    if hasattr(kind.initialize_optimizer_states, "__wrapped__"):  # make it a process that has not seen LISA yet
        kind.initialize_optimizer_states = kind.initialize_optimizer_states.__wrapped__
    model = tiny_llama()
    config = lisa_dist.load_ds_config(ds_config, model=model, micro_batch_size=2)
    plain, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    plain.train()
    engine, lisa = start(ds_config)
    for tokens in BATCHES[:3]:
        lisa.on_step_begin()
        micro_step(engine, tokens)
        before = [getattr(one, "ds_tensor", one).detach().clone() for one in model.parameters()]
        micro_step(plain, tokens)
        now = [getattr(one, "ds_tensor", one).detach() for one in model.parameters()]
        assert any((one != other).any() for one, other in zip(before, now, strict=True))
    engine.destroy()
    plain.destroy()


@pytest.mark.parametrize("ds_config", ["zero2", "zero3"])
def test_an_engine_that_was_there_before_goes_on(ds_config):
    run_ranks(train_beside, 2, ds_config)


def orders_of_modules(settings: dict) -> list[tuple[int, bool]]:
    """The lowest active layer at each switch on stage 3, and whether the order of modules is known behind it."""
    engine, lisa = start("zero3", lisa_interval_steps=3, **settings)
    coordinator, found = engine.optimizer.parameter_offload.get_param_coordinator(), []
    for step, tokens in enumerate(BATCHES):
        if lisa.on_step_begin() and step:
            found.append((lisa.active_layers[0], coordinator.is_complete_trace()))
        micro_step(engine, tokens)
        if step and step % 3 == 2:
            assert coordinator.is_complete_trace(), "learnt within the period"
    forget_module_order(engine)
    assert coordinator.is_invalid_trace()
    engine.destroy()
    return found


@pytest.mark.full
def test_stage_3_knows_the_order_of_modules_while_the_backward_pass_ends_at_the_same_block():
    always = run_ranks(orders_of_modules, 2, {})[0]
    assert len(always) == 5
    assert all(known for _, known in always), "down to the embedding in every period"
    frozen = {"lisa_always_on": "rest", "lisa_frozen": "embed,head", "lisa_seed": 1}
    drawn = run_ranks(orders_of_modules, 2, frozen)[0]
    lowest = [layer for layer, _ in drawn]
    assert [known for _, known in drawn[1:]] == [new == old for old, new in itertools.pairwise(lowest)]
    assert {known for _, known in drawn[1:]} == {True, False}, "take another seed"
