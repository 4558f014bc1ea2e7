"""LISA in the Hugging Face Trainer: the same losses as the reference, under its schedule and accumulation."""

import contextlib
import functools
import io
import json
import math
import os
import signal
import time
from pathlib import Path

import deepspeed
import pytest
import torch
from cases import full, stages
from models import tiny_gpt2, tiny_llama, tiny_mixtral, token_batches
from ranks import run_ranks
from reference import train_reference
from safetensors import safe_open
from torch import distributed as dist
from trainers import BeforeStep, InOrder, Shuffled, cpu_arguments, lisa_trainer, rows_of
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import lisa_dist
from lisa_dist import LisaMixin
from lisa_dist.checkpoint import save
from lisa_dist.checkpoint.folders import STATE_NAME
from lisa_dist.core.activation_checkpointing import checkpointed_layers
from lisa_dist.distributed.run_lock import LOCK_NAME, one_run_in
from lisa_dist.distributed.watchdog import Watchdog
from lisa_dist.ds_config import find_ds_config
from lisa_dist.errors import UserError
from lisa_dist.files import describe_file, write_json
from lisa_dist.train import trainer as trainer_module
from lisa_dist.train.deepspeed_arguments import begin_deepspeed
from lisa_dist.zero.parameters import whole_weights

STEPS, ACCUMULATION, INTERVAL, LR, DECAY, ROWS = 8, 2, 3, 1e-3, 0.1, 2

pytestmark = pytest.mark.usefixtures("cpu_ops")


class AsksWhatDecays(InOrder):
    def get_decay_parameter_names(self, model):
        self.was_asked_what_decays = True
        return super().get_decay_parameter_names(model)


def rows_for(world_size: int) -> list[dict]:
    return rows_of(token_batches(STEPS * ACCUMULATION * world_size, rows=ROWS).flatten(0, 1))


def build_trainer(output_dir: str, ds_config: str = "zero2", changes: dict | None = None, **own) -> LisaMixin:
    """A run of STEPS steps, on rows of its own for each rank."""
    default = {
        "deepspeed": find_ds_config(ds_config),
        "max_steps": STEPS,
        "gradient_accumulation_steps": ACCUMULATION,
        "per_device_train_batch_size": ROWS,
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "weight_decay": DECAY,
        "adam_beta2": 0.95,
        "lisa_interval_steps": INTERVAL,
        "lisa_debug": True,
    }
    rows = own.pop("rows", None) or rows_for(dist.get_world_size())
    return lisa_trainer(output_dir, rows, default | (changes or {}), **own)


def train(output_dir: str, ds_config: str, changes: dict, checkpointed=None, given: str | dict | None = None) -> dict:
    own = {"checkpointed_layers": checkpointed, "deepspeed": given}
    trainer = build_trainer(output_dir, ds_config, changes, kind=AsksWhatDecays, **own)
    trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    if "zero3" not in ds_config:
        assert not any(module._forward_hooks | module._forward_pre_hooks for module in trainer.model.modules())
    assert trainer.was_asked_what_decays
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    parameters = list(trainer.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled="zero3" in ds_config):
        total = float(sum(parameter.detach().double().sum() for parameter in parameters))
    return {
        "losses": [entry["loss"] for entry in logs],
        "learning_rates": [entry["learning_rate"] for entry in logs],
        "metrics": [{name: value for name, value in entry.items() if name.startswith("lisa/")} for entry in logs],
        "layers": [record.layers for record in trainer.lisa.records],
        "header": trainer.describe(),
        "sum_of_weights": total,
    }


@pytest.mark.parametrize(
    "given", [full("zero3"), full(None), {"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}], ids=str
)
def test_a_config_may_be_given_to_the_trainer(given, tmp_path):
    """Or none, for zero2; the arguments are as for any Trainer then, and what trains is the same."""
    ds_config = {"zero3": "zero3", "None": "zero2"}.get(str(given), "zero1")
    (by_arguments, *_), (by_trainer, *_) = (
        run_ranks(train, 2, str(tmp_path / name), ds_config, changes, None, config)
        for name, changes, config in (("arguments", {}, None), ("trainer", {"deepspeed": None}, given))
    )
    assert by_trainer["losses"] == by_arguments["losses"]
    assert by_trainer["sum_of_weights"] == by_arguments["sum_of_weights"]
    assert f"stage {ds_config[-1]}" in by_trainer["header"]


@pytest.mark.parametrize("ds_config", ["zero2", "zero3"])
def test_a_schedule_may_read_the_defaults_of_the_optimizer(tmp_path, ds_config):
    """Which those of DeepSpeed lack."""
    changes = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}}
    rates = run_ranks(train, 1, str(tmp_path), ds_config, changes)[0]["learning_rates"]
    expected = [rates[0] * (1 - step / len(rates)) ** 2 for step in range(len(rates))]
    assert rates == pytest.approx(expected, rel=0.02, abs=1e-7)


def begin_again(output_dir: str) -> None:
    """As a cell of a notebook that is run twice does."""
    args = cpu_arguments(output_dir)
    for _ in range(2):
        begin_deepspeed(["model", args], "zero1")
    assert args.deepspeed == find_ds_config("zero1")
    begin_deepspeed([args], None)
    with pytest.raises(UserError, match="deepspeed: the training arguments have a DeepSpeed config too"):
        begin_deepspeed([args], "zero3")
    with pytest.raises(UserError, match="deepspeed: there are no training arguments that could take it"):
        begin_deepspeed(["model", None], "zero2")


def test_the_same_arguments_serve_a_second_trainer(tmp_path):
    run_ranks(begin_again, 1, str(tmp_path))


class TwoModes(InOrder):
    """Looks at the model without checkpointing in between, as TRL's DPOTrainer does for its reference."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        layers = self.lisa.blocks.layers
        self.seen.append((checkpointed_layers(self.model, self.lisa.blocks), count_hooks(self.model)))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.model.gradient_checkpointing_disable()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        assert checkpointed_layers(self.model, self.lisa.blocks) == len(layers)
        return loss


def count_hooks(model) -> int:
    """Hooks that would send the backward pass on to frozen embeddings."""
    names = [getattr(hook, "__name__", "") for module in model.modules() for hook in module._forward_hooks.values()]
    return names.count("make_inputs_require_grads")


def train_in_two_modes(output_dir: str) -> list[tuple[int, int]]:
    trainer = build_trainer(output_dir, changes={"max_steps": 2}, kind=TwoModes, checkpointed_layers=2)
    trainer.seen = []
    trainer.train()
    return trainer.seen


def test_the_number_of_checkpointed_layers_holds_where_a_trainer_turns_checkpointing_off_and_on(tmp_path):
    assert run_ranks(train_in_two_modes, 1, str(tmp_path)) == [[(2, 0)] * 4]


def cosine(step: int) -> float:
    return LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))


@pytest.mark.parametrize("ds_config", stages("zero2", "zero3", among=("zero2", "zero2_offload", "zero3")))
def test_losses_equal_the_reference(tmp_path, ds_config):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointed = {"zero2": 2, "zero3": "none"}.get(ds_config)
    outcome = run_ranks(train, 2, str(tmp_path), ds_config, checkpointing, checkpointed)[0]

    # A micro-batch of the global batch is one batch of rank 0 and the next one, of rank 1.
    batches = token_batches(STEPS * ACCUMULATION * 2, rows=ROWS).view(STEPS, ACCUMULATION, 2 * ROWS, -1)
    model = tiny_llama()
    layers = list(model.model.layers)
    losses = train_reference(
        model, layers, outcome["layers"], INTERVAL, batches, lr=cosine, weight_decay=DECAY, betas=(0.9, 0.95)
    )
    assert outcome["losses"] == pytest.approx(losses, abs=1e-5)
    assert outcome["learning_rates"] == pytest.approx([cosine(step) for step in range(STEPS)])
    total = float(sum(parameter.detach().double().sum() for parameter in model.parameters()))
    assert outcome["sum_of_weights"] == pytest.approx(total, abs=1e-2), "the last step counts too"
    assert len(set(map(tuple, outcome["layers"]))) > 1
    assert (tmp_path / "lisa_log.jsonl").read_text().count("\n") == math.ceil(STEPS / INTERVAL)

    memory = json.loads((tmp_path / "lisa_memory.json").read_text())
    assert memory["step"] == 1
    assert memory["checkpointed_layers"] == {2: 2, "none": 0, None: 6}[checkpointed]
    assert (memory["rows"], memory["tokens"]) == (ROWS, 16)
    planned, measured = memory["planned"], memory["measured"]
    for part in ("weights", "always_on_states", "active_states", "activations", "logits", "gathered"):
        assert measured[part] == pytest.approx(planned[part], rel=0.03, abs=4096), part
    # Other tests in this process have left tensors, which are in what was there before the step.
    of_the_step = [parts["peak"] - parts["static"] for parts in (planned, measured)]
    assert of_the_step[1] == pytest.approx(of_the_step[0], abs=0.03 * planned["peak"])

    metrics = outcome["metrics"][-1]
    assert metrics["lisa/period"] == 2  # step 6 began it, and the log of step 7 comes after its first step
    assert metrics["lisa/switch_seconds"] > 0
    assert metrics["lisa/state_bytes_per_rank"] > 0
    assert metrics["lisa/live_bytes"] > metrics["lisa/state_bytes_per_rank"]
    visits = [metrics[f"lisa/visits/layer_{layer:02d}"] for layer in range(6)]
    assert sum(visits) == 2 * math.ceil(STEPS / INTERVAL)
    stage = f"stage {ds_config[4]} on 2 rank(s)"
    for word in ("decoder layers", "6 at model.layers, of ", "always trained", "embed 8192", stage):
        assert word in outcome["header"]


def save_a_mixture(output_dir: str) -> None:
    changes = {"max_steps": 3, "gradient_accumulation_steps": 1, "lisa_activated_layers": 1}
    trainer = build_trainer(output_dir, changes=changes, build=tiny_mixtral)
    trainer.train()
    trainer.save_model()


def test_a_model_is_saved_under_the_names_of_the_hub(tmp_path):
    run_ranks(save_a_mixture, 2, str(tmp_path))
    names = safe_open(tmp_path / "model.safetensors", framework="pt").keys()
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in names
    memory = json.loads((tmp_path / "lisa_memory.json").read_text())
    assert memory["measured"]["peak"] > 0
    # Before torch 2.15 products of experts in fp32 cannot be traced; the model is saved all the same.
    assert (memory["planned"] is None) == ("cannot be planned" in (memory["not_planned"] or ""))


REFUSED = [
    (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "use_reentrant=True: reentrant checkpointing",
    ),
    ({"optim": "adafactor"}, "--optim adafactor"),
    (
        {"optim": "adamw_8bit", "deepspeed": find_ds_config("zero2_offload")},
        "--optim adamw_8bit with offload_optimizer",
    ),
    ({"deepspeed": {"zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": "auto"}}, "use stage 1"),
    (
        {"deepspeed": {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 7}},
        "gradient_accumulation_steps=7 vs hf gradient_accumulation_steps=2",
    ),
    ({"optimizers": (torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), None)}, "pass no optimizers"),
    ({"auto_find_batch_size": True}, "--auto_find_batch_size True"),
    ({"optim_args": "amsgrad=True"}, "--optim_args amsgrad=True"),
    ({"save_on_each_node": True}, "--save_on_each_node True"),
    ({"torch_compile": True, "deepspeed": find_ds_config("zero3")}, "--torch_compile True on ZeRO stage 3"),
    ({"resume": "checkpoint-3"}, "--resume_from_checkpoint checkpoint-3: no such folder"),
    ({"resume": True}, "--resume_from_checkpoint true: there is no whole checkpoint in --output_dir"),
]


def refused(output_dir: str, cases: list[dict]) -> list[str]:
    said = []
    for changes in cases:
        resume, optimizers = changes.pop("resume", None), changes.pop("optimizers", (None, None))
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked by the caller
            build_trainer(output_dir, changes=changes, optimizers=optimizers).train(resume_from_checkpoint=resume)
        said.append(str(error.value))
    return said


def test_arguments_that_cannot_work_are_refused(tmp_path):
    found = run_ranks(refused, 2, str(tmp_path), [dict(changes) for changes, _ in REFUSED])[0]
    for text, (_, said) in zip(found, REFUSED, strict=True):
        assert said in text
    assert not (tmp_path / "lisa_log.jsonl").exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("state", "newest", "said"),
    [
        ({"format": 1, "world_size": 1, "lisa": {"config": {}}}, False, "it was saved in a loop of one's own"),
        (None, False, "checkpoint-1/lisa_state.json cannot be read"),
        ({"format": 99}, True, "has format 99, written by lisa_dist 9.0"),
    ],
    ids=["of a loop", "without a state", "newer"],
)
def test_a_checkpoint_that_no_trainer_of_this_release_has_saved_is_refused(tmp_path, state, newest, said):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    files = {}
    for name in ("model.safetensors", "lisa_optimizer-00000-of-00001.safetensors"):
        (folder / name).touch()
        files[name] = describe_file(folder / name)
    if state is not None:
        write_json(folder / STATE_NAME, {"versions": {"lisa_dist": "9.0"}, "saved_at": 0.0, "files": files} | state)
    (text,) = run_ranks(refused, 2, str(tmp_path), [{"resume": True if newest else str(folder)}])[0]
    assert said in text
    assert not (tmp_path / "lisa_log.jsonl").exists()


def predict(output_dir: str, bits: int | None) -> tuple[list[float], float]:
    """Losses of a prediction after a run over frozen layers in 4 bits, by the trainer and by the saved model itself."""
    changes = {"bf16": True, "max_steps": 3, "lisa_frozen_bits": 4}
    trainer = build_trainer(output_dir, changes=changes, eval_dataset=rows_for(1)[:4], eval_frozen_bits=bits)
    trainer.train()
    tokens = 3 * trainer.args.gradient_accumulation_steps * ROWS * rows_for(1)[0]["input_ids"].numel()
    assert trainer.state.total_flos == 6 * tokens * tiny_llama().num_parameters(exclude_embeddings=True)
    trainer.save_model(output_dir)
    of_trainer = [trainer.predict(rows_for(1)[:4]).metrics["test_loss"], trainer.evaluate()["eval_loss"]]
    model = AutoModelForCausalLM.from_pretrained(output_dir, dtype=torch.bfloat16)
    rows = torch.stack([row["input_ids"] for row in rows_for(1)[:4]])
    with torch.no_grad():
        return of_trainer, model(input_ids=rows, labels=rows).loss.item()


@pytest.mark.parametrize(("bits", "exact"), [(16, True), (None, False)])
def test_a_prediction_may_be_of_the_originals_of_frozen_layers(tmp_path, bits, exact):
    (predicted, evaluated), of_model = run_ranks(predict, 1, str(tmp_path), bits)[0]
    assert predicted == evaluated
    assert (predicted == pytest.approx(of_model, abs=2e-4)) is exact


def train_with_evaluations(output_dir: str, ds_config: str, early: bool, changes: dict) -> dict:
    """Losses of a run, what the model is evaluated to at its end, and the same of the best checkpoint by itself."""
    save_async = changes.pop("save_async", False)
    trainer = build_trainer(output_dir, ds_config, changes, eval_dataset=rows_for(1)[:4], save_async=save_async)
    before = trainer.evaluate()["eval_loss"] if early else None
    trainer.train()
    logs = trainer.state.log_history
    if changes.get("load_best_model_at_end"):
        save.save_checkpoint(trainer.lisa, f"{output_dir}/checkpoint-99")
        best, last = (AutoModelForCausalLM.from_pretrained(f"{output_dir}/checkpoint-{one}") for one in (2, 99))
        assert all(map(torch.equal, best.state_dict().values(), last.state_dict().values()))
    return {
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "before": before,
        "evaluated": [entry["eval_loss"] for entry in logs if "eval_loss" in entry],
        "after": trainer.evaluate()["eval_loss"],
        "best": trainer.state.best_model_checkpoint,
    }


@pytest.mark.full
def test_an_evaluation_may_come_before_training(tmp_path):
    """Under ZeRO-3 it needs an engine, which the engine of training takes the place of."""
    early, late = (run_ranks(train_with_evaluations, 2, str(tmp_path), "zero3", one, {})[0] for one in (True, False))
    assert early["losses"] == late["losses"]
    assert early["after"] == late["after"] != early["before"]


@pytest.mark.parametrize(
    ("ds_config", "changes"),
    [
        full("zero2", {}),
        full("zero3", {"lisa_adapters": 4, "lisa_lr_scale": "adapters=1"}),
        ("zero3", {}),
        ("zero2", {"bf16": True, "lisa_frozen_bits": 4, "save_async": True}),
    ],
)
def test_the_best_model_is_loaded_at_the_end(tmp_path, ds_config, changes):
    """Here the first, which had the greatest loss; its layers are inactive at the end."""
    changes |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    changes |= {"load_best_model_at_end": True, "save_total_limit": 2}
    changes |= {"metric_for_best_model": "loss", "greater_is_better": True}
    found = run_ranks(train_with_evaluations, 2, str(tmp_path), ds_config, False, changes)[0]
    assert found["best"].endswith("checkpoint-2")
    assert found["after"] == found["evaluated"][0] > max(found["evaluated"][1:])


def raise_an_error() -> None:
    raise RuntimeError("an error of the user's")


def raise_right_after_a_save(output_dir: str) -> list[str]:
    """The folder as the run leaves it that has raised, on a disk that is slow."""
    changes = {"save_strategy": "steps", "save_steps": 2}
    trainer = build_trainer(output_dir, changes=changes, save_async=True, callbacks=[BeforeStep(3, raise_an_error)])
    with pytest.MonkeyPatch.context() as patch:
        save_file = save.save_file
        patch.setattr(save, "save_file", lambda *given, **named: (time.sleep(0.3), save_file(*given, **named)))
        with pytest.raises(RuntimeError, match="an error of the user's"):
            trainer.train()
        return [path.name for path in Path(output_dir).glob("*checkpoint*")]


def test_a_save_in_the_background_is_whole_before_a_run_that_raises_is_over(tmp_path):
    assert run_ranks(raise_right_after_a_save, 1, str(tmp_path))[0] == ["checkpoint-2"]


def order_of_the_end(output_dir: str) -> list[str]:
    """What a run that raises ends first: the save in the background, or the watchdog."""
    ended = []
    trainer = build_trainer(output_dir, callbacks=[BeforeStep(1, raise_an_error)])
    with pytest.MonkeyPatch.context() as patch:
        leave, end_save = Watchdog.__exit__, trainer_module.end_save
        patch.setattr(Watchdog, "__exit__", lambda *given: (ended.append("watchdog"), leave(*given))[1])
        patch.setattr(trainer_module, "end_save", lambda lisa: (ended.append("save"), end_save(lisa))[1])
        with pytest.raises(RuntimeError, match="an error of the user's"):
            trainer.train()
    return ended


def test_the_watchdog_is_on_while_a_run_that_raises_waits_for_its_save(tmp_path):
    """Or it would wait ten minutes for a rank that is gone."""
    assert run_ranks(order_of_the_end, 1, str(tmp_path))[0] == ["save", "watchdog"]


def signal_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


def train_shuffled(output_dir: str, ds_config: str, changes: dict, resume_from, seed: int = 0, stop_after=0) -> dict:
    """Train with dropout and shuffling; what came of it."""
    rows = rows_for(2) * 2
    if "eval_strategy" in changes:
        rows = rows[: 4 * 2 * ROWS * ACCUMULATION]  # epochs of four steps
    batch_size = 2 * ROWS // dist.get_world_size()
    saves = {
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 3,
        "per_device_train_batch_size": batch_size,
    }
    trainer = build_trainer(
        output_dir,
        ds_config,
        saves | {name: value for name, value in changes.items() if name != "optim"},
        kind=Shuffled,
        build=functools.partial(tiny_gpt2, seed=seed, dropout=0.1),
        rows=rows,
        eval_dataset=rows[:4],
        optim=changes.get("optim"),
        callbacks=[BeforeStep(stop_after, signal_rank_1)],
    )
    trainer.train(resume_from_checkpoint=resume_from)
    said = io.StringIO()
    if trainer.stopped_by is not None:  # as in a script that does not look at it
        with contextlib.redirect_stdout(said):
            trainer.save_model(f"{output_dir}-stopped")
    parameters = dict(trainer.model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        weights = {name: whole_weights(value).clone() for name, value in parameters.items()}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "weights": weights,
        "losses": [entry["loss"] for entry in logs],
        "learning_rates": [entry["learning_rate"] for entry in logs],
        "stopped_by": trainer.stopped_by,
        "said": said.getvalue(),
    }


MODULES = {"lisa_unit": "module", "lisa_budget": "20%"}


@pytest.mark.parametrize(
    ("ds_config", "changes"),
    [
        full("zero3", {}),
        ("zero2", {"bf16": True, "optim": "lisa_adamw", "lisa_master": "bf16_sr"}),
        full(
            "zero2", {"bf16": True, "optim": "lisa_adamw", "lisa_state_bits": "embed=factored", "lisa_frozen_bits": 8}
        ),
        full("zero2", MODULES | {"lisa_sampler": "adaptive", "lisa_state": "keep"}),
        full("zero2", MODULES | {"lisa_state": "keep", "lisa_always_on": "embed,head", "lisa_frozen": "rest"}),
        full("zero2", {"lisa_activated_layers": 4, "lisa_sampler": "balanced"}),
        # After checkpoint-4 was saved, and not again in the resumed run.
        full("zero2", {"bf16": True, "eval_strategy": "epoch"}),
    ],
)
def test_a_resumed_run_is_the_run(tmp_path, ds_config, changes):
    """Data order, dropout, schedule and accumulation included, from other initial weights."""
    whole = run_ranks(train_shuffled, 2, str(tmp_path), ds_config, changes, None)[0]
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    log = (tmp_path / "lisa_log.jsonl").read_text()
    for folder in saved[:2]:
        resumed = run_ranks(train_shuffled, 2, str(tmp_path), ds_config, changes, str(tmp_path / folder), 99)[0]
        for name, value in whole["weights"].items():
            assert torch.equal(value, resumed["weights"][name]), f"{name} from {folder}"
        assert resumed["losses"] == whole["losses"]
        assert resumed["learning_rates"] == whole["learning_rates"]
    periods = [json.loads(line) for line in (tmp_path / "lisa_log.jsonl").read_text().splitlines()]
    assert [(one["period"], one["layers"]) for one in periods] == [
        (one["period"], one["layers"]) for one in map(json.loads, log.splitlines())
    ]


@pytest.mark.full
def test_a_signals_checkpoint_stays_though_another_is_the_best(tmp_path):
    """In a step that would be evaluated too: the run goes on from it as if nothing had happened."""
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1, "metric_for_best_model": "loss"}
    changes |= {"greater_is_better": True, "eval_delay": 2}  # the first one is the best, and it is saved
    whole = run_ranks(train_shuffled, 2, str(tmp_path / "whole"), "zero2", changes, None)[0]
    assert {"checkpoint-2", "checkpoint-8"} <= {path.name for path in (tmp_path / "whole").iterdir()}
    stopped = run_ranks(train_shuffled, 2, str(tmp_path / "out"), "zero2", changes, None, 0, 5)[0]
    assert stopped["stopped_by"] == "SIGUSR1"
    unfinished = f"{tmp_path / 'out'}-stopped is no finished model."
    assert stopped["said"] == f"warning: SIGUSR1 ended the run after 5 of {STEPS} steps: {unfinished}\n"
    assert (tmp_path / "out" / "checkpoint-5").is_dir()
    resumed = run_ranks(train_shuffled, 2, str(tmp_path / "out"), "zero2", changes, True, 99)[0]
    for name, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][name]), name
    told = run_ranks(resume_with_half_the_rows, 1, str(tmp_path / "out"))[0]
    assert f"had a global batch size of {2 * ROWS * ACCUMULATION}, and here it is {ROWS * ACCUMULATION}" in told


def resume_with_half_the_rows(output_dir: str) -> str:
    """On one rank in place of two, with everything else as it was."""
    with pytest.raises(ValueError, match="give --global_batch_size") as error:
        train_shuffled(output_dir, "zero2", {"per_device_train_batch_size": ROWS}, True)
    return str(error.value)


def resume_from_a_crafted_checkpoint(output_dir: str) -> str:
    """Whose random states of rank 1 are no pickle, and whose sums fit."""
    train_shuffled(output_dir, "zero2", {"max_steps": 2}, None)
    folder = Path(output_dir) / "checkpoint-2"
    if dist.get_rank() == 0:
        (folder / "rng_state_1.pth").write_bytes(b"no pickle")
        state = json.loads((folder / STATE_NAME).read_text())
        del state["checksum"]
        state["files"]["rng_state_1.pth"] = describe_file(folder / "rng_state_1.pth")
        write_json(folder / STATE_NAME, state)
    dist.barrier()
    with pytest.raises(UserError, match="is not loaded") as error:
        train_shuffled(output_dir, "zero2", {}, True)
    return str(error.value)


def test_a_pickle_that_is_not_loaded_is_one_line_on_all_ranks(tmp_path):
    mine, others = run_ranks(resume_from_a_crafted_checkpoint, 2, str(tmp_path))
    assert mine == others
    assert mine.startswith(f"{tmp_path}/checkpoint-2/rng_state_1.pth is not loaded (")
    assert not (tmp_path / LOCK_NAME).exists(), "released, after an error too"


def refuse_the_folder(output_dir: str) -> list[str]:
    said = []
    trainer = build_trainer(output_dir)
    unset_hf_deepspeed_config()
    for begin in (trainer.train, lambda: lisa_dist.initialize(tiny_llama(), "zero2", output_dir=output_dir)):
        with pytest.raises(UserError) as error:
            begin()
        said.append(str(error.value))
    uneven = rows_for(2)[dist.get_rank() :]
    trainer = build_trainer(f"{output_dir}-uneven", rows=uneven)
    sizes = f"the number of training examples is {len(rows_for(2)) - 1}, not {len(rows_for(2))}, as on host "
    with pytest.raises(UserError, match=sizes):
        trainer.train()
    return said


def test_a_folder_that_another_run_has_is_refused_on_all_ranks(tmp_path):
    with one_run_in(tmp_path):
        mine, others = run_ranks(refuse_the_folder, 2, str(tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    assert mine == others
    for said in mine:
        assert f", process {os.getpid()}, has it since " in said


def save_on_a_full_disk(output_dir: str) -> str:
    with pytest.raises(ValueError, match="could not be written") as error:
        train_shuffled(output_dir, "zero2", {}, None)
    dist.barrier()
    assert not list(Path(output_dir).glob("*checkpoint*")), "what was begun is removed"
    return str(error.value)


def test_a_full_disk_is_named_by_all_ranks(small_disk):
    """So full that not even the first small file fits."""
    folder, _ = small_disk
    if not os.path.ismount(folder):
        pytest.skip("a file system of its own cannot be mounted here")
    (folder / "filler").write_bytes(bytes(3 * 2**20 - 24 * 1024))
    for said in run_ranks(save_on_a_full_disk, 2, str(folder)):
        assert said.startswith(f"{folder}/checkpoint-2 could not be written (rank ")


def resume_finished_and_changed(output_dir: str) -> None:
    """A finished run takes no step more; other settings at the end of a period keep the schedule."""

    def trainer(gamma: int, seed: int = 0) -> Shuffled:
        changes = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 1}
        changes |= {"lisa_activated_layers": gamma, "lisa_seed": seed}
        return build_trainer(output_dir, changes=changes, kind=Shuffled)

    first = trainer(2)
    first.train()
    again = trainer(2)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.zero_()
    again.train("auto")
    assert again.state.global_step == STEPS
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for gamma in (3, 1):
        changed, said = trainer(gamma, seed=5), io.StringIO()
        with contextlib.redirect_stdout(said):
            changed.train(f"{output_dir}/checkpoint-3")
        line = f"not as its run had it: --lisa_activated_layers {gamma} (it had 2), --lisa_seed 5 (it had 0)\n"
        assert (line in said.getvalue()) == (dist.get_rank() == 0)
        rates = [entry["learning_rate"] for entry in changed.state.log_history if "loss" in entry]
        assert rates == pytest.approx([cosine(step) for step in range(STEPS)])
        assert {group["lr"] for group in changed.lisa.engine.optimizer.param_groups} == {cosine(STEPS)}
        assert len(changed.lisa.active_layers) == gamma


def resume_otherwise(output_dir: str) -> None:
    """Half of the rate takes effect; another seed is refused by every rank."""
    changes = {"gradient_accumulation_steps": 1, "save_steps": 4}
    whole = train_shuffled(output_dir, "zero2", changes, None)
    folder = f"{output_dir}/checkpoint-4"
    half = train_shuffled(output_dir, "zero2", changes | {"learning_rate": LR / 2}, folder)
    assert half["learning_rates"][:4] == whole["learning_rates"][:4]
    assert half["learning_rates"][4:] == pytest.approx([rate / 2 for rate in whole["learning_rates"][4:]])
    assert half["losses"][:5] == whole["losses"][:5]
    assert half["losses"][5:] != whole["losses"][5:]
    with pytest.raises(ValueError, match=r"its run had other data: --seed 7 \(it had 42\)"):
        train_shuffled(output_dir, "zero2", changes | {"seed": 7}, folder)


def test_a_resume_knows_its_run(tmp_path):
    run_ranks(resume_otherwise, 2, str(tmp_path))


def test_a_finished_run_and_other_settings(tmp_path):
    run_ranks(resume_finished_and_changed, 2, str(tmp_path))
