"""Answers of GRPO by vLLM: what its engine is sent, and whether it has the run's weights at every answer."""

import time

import deepspeed
import pytest
import torch
from cases import full
from datasets import Dataset
from models import save_tiny_llama, tiny_llama
from ranks import free_port, run_ranks
from safetensors.torch import load_file
from trainers import cpu_arguments
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation
from vllm_stand_in import Engine, Server, answers, digest, in_the_place_of_vllm

from lisa_dist.config import LisaConfig
from lisa_dist.core.blocks import find_blocks, model_without_weights
from lisa_dist.errors import UserError
from lisa_dist.memory.plan import load_model_config
from lisa_dist.train.rollouts import changed_units, units_of
from lisa_dist.train.trainer import LisaMixin

ROWS = Dataset.from_list([{"prompt": f"{n} + 1? "} for n in range(64)])
SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_correction": False}
LENGTH = 4  # tokens of an answer
NUM_TENSORS = 6 * 9 + 3  # of the tiny Llama: of its layers, its embedding, norm and head


class LisaGRPO(LisaMixin, GRPOTrainer):
    pass


class Answering(LisaGRPO):
    """Answers as the server would, by its own weights."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            given = [answers(model, prompt, 2, LENGTH)[place % 2] for place, prompt in enumerate(prompt_ids)]
        return given, None


class SendAtEnd(TrainerCallback):
    """What is sent after the last step is the model that is saved."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_end(self, *args, **kwargs):
        self.trainer.rollouts.sync_weights()


def rewards(completions, **columns):
    return [float(sum(map(ord, one)) % 7) for one in completions]


def seen_by(trainer, seen):
    """Note the digest of a trainer's whole weights wherever it asks its engine."""
    ask, model = trainer.vllm_generation.generate, trainer.model

    def note(*args, **kwargs):
        with deepspeed.zero.GatheredParameters([*model.parameters()]):
            seen.append(digest(model))
        return ask(*args, **kwargs)

    trainer.vllm_generation.generate = note


def train(folder, stage, changes, retries=5):
    """On a rank: losses and rewards, and the digest of the whole weights at every question."""
    of_lisa = {"lisa_activated_layers": 1, "lisa_interval_steps": 2, "lisa_sampler": "reshuffle"}
    of_lisa |= {name: changes[name] for name in changes if name.startswith("lisa_")}
    given = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "num_generations": 2}
    given |= {"max_completion_length": LENGTH, "bf16": False}
    given |= {name: changes[name] for name in changes if name not in of_lisa and name not in ("resume", "evaluate")}
    with in_the_place_of_vllm(retries):
        trainer = (LisaGRPO if given.get("use_vllm") else Answering)(
            model=str(folder / "model"),
            args=cpu_arguments(str(folder / "out"), GRPOConfig, **given),
            reward_funcs=rewards,
            train_dataset=ROWS,
            eval_dataset=ROWS.select(range(2)),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            lisa_config=LisaConfig.plain(**of_lisa),
            deepspeed=stage,
        )
        seen = []
        if given.get("use_vllm"):
            seen_by(trainer, seen)
            trainer.add_callback(SendAtEnd(trainer))
        trainer.train(changes.get("resume"))
        trainer.save_model(str(folder / "trained"))
        if changes.get("evaluate"):
            trainer.evaluate()
    logged = [(one["loss"], one["reward"]) for one in trainer.state.log_history if "reward" in one]
    return logged, seen, Engine.made.seen if given.get("vllm_mode") == "colocate" else None


@pytest.fixture
def folder(tmp_path):
    save_tiny_llama(tmp_path / "model")
    return tmp_path


@pytest.fixture
def serve(folder):
    servers = []

    def start(**given):
        servers.append(Server(folder / "model", **given))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def of(server, **more):
    url = f"http://127.0.0.1:{server.port}"
    return SERVER | {"vllm_server_base_url": url, "vllm_group_port": free_port(), "vllm_server_timeout": 20.0} | more


def equal(server, folder):
    saved = load_file(folder / "trained" / "model.safetensors")
    parameters = dict(server.model.named_parameters())
    return parameters.keys() <= saved.keys() and all(torch.equal(parameters[name], saved[name]) for name in parameters)


@pytest.mark.parametrize(("stage", "ranks"), [full("zero1", 1), ("zero2", 2), full("zero3", 2)])
def test_a_server_has_the_weights_of_the_run_at_every_answer(folder, serve, stage, ranks):
    server = serve()
    logged, seen, _ = run_ranks(train, ranks, folder, stage, of(server))[0]
    assert server.seen == seen
    assert len(set(seen)) == len(seen) == 6
    assert len(server.updates[0]) == NUM_TENSORS
    assert [len(names) for names in server.updates[1:]] == [12] * 6  # embedding, a layer, norm and head
    assert equal(server, folder)
    assert run_ranks(train, ranks, folder, stage, {})[0][0] == logged  # answered by the trainer's own weights


@pytest.mark.full
def test_after_fifty_switches_it_still_has(folder, serve):
    server = serve()
    _, seen, _ = run_ranks(train, 1, folder, "zero2", of(server, lisa_interval_steps=1, max_steps=51))[0]
    assert server.seen == seen
    assert len(set(seen)) == 51
    assert equal(server, folder)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (
            "zero2",
            {
                "lisa_unit": "module",
                "lisa_activated_layers": 2,
                "lisa_sampler": "uniform",
                "lisa_budget": "10%",
                "lisa_always_on": "embed,head",
                "lisa_frozen": "rest",
            },
        ),
        full("zero2", {"lisa_adapters": 4}),
        ("zero3", {"lisa_adapters": 4}),
        ("zero2", {"lisa_frozen_bits": "8", "bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}),
        full("zero2", {"lisa_always_on": "rest"}),
        full(
            "zero2",
            {"lisa_adapters": 4, "lisa_frozen_bits": "8", "bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_form_is_sent_whole(folder, serve, stage, changes):
    """vLLM would be left with half of a fused matrix, with codes, or without adapters."""
    server = serve()
    run_ranks(train, 2 if stage == "zero3" else 1, folder, stage, of(server, **changes))
    assert equal(server, folder)


def test_one_that_began_anew_while_the_run_took_a_step_is_met_first(folder, serve):
    """It is told of no weights before: vLLM would have the trainer wait for it for ever."""
    first, back = serve(), []
    first.dies_after, first.when_dead = 2, lambda: back.append(serve(port=first.port))
    given = of(first, max_steps=4, per_device_train_batch_size=4)
    _, seen, _ = run_ranks(train, 1, folder, "zero2", given)[0]
    (second,) = back
    assert first.seen + second.seen == seen
    assert len(second.updates[0]) == NUM_TENSORS
    assert not second.unprepared


@pytest.mark.parametrize(("away", "retries"), [(0.0, 5), (2.0, 0)], ids=["unnoticed", "noticed"])
def test_a_server_that_comes_back_is_sent_everything_and_asked_again(folder, serve, away, retries):
    """Its weights are those of the folder again: also where a request that is repeated meets it by itself."""
    first = serve()
    given = of(first, max_steps=5)
    back = []
    first.dies_at = 2
    first.when_dead = lambda: (time.sleep(away), back.append(serve(port=first.port)))
    _, seen, _ = run_ranks(train, 2, folder, "zero3", given, retries)[0]
    (second,) = back
    unasked = 0 if away else 1  # it was asked before it had the run's weights
    assert first.seen + second.seen[unasked:] == seen
    assert len(seen) == 5
    assert len(second.updates[0]) == NUM_TENSORS
    assert len(second.updates[1]) < NUM_TENSORS
    assert equal(second, folder)


@pytest.mark.parametrize(
    ("name", "whole", "sent", "after_a_switch"),
    [("llama3.1-8b", 16.061, 2.974, 3.846), ("llama2-70b", 137.953, 4.471, 7.894)],
)
def test_gigabytes_that_are_sent_of_large_models(name, whole, sent, after_a_switch):
    blocks = find_blocks(model_without_weights(load_model_config(name)))

    def size(units):
        return round(sum(2 * value.numel() for unit in units for value in unit.values()) / 1e9, 3)  # in 16 bits

    always, layers = {"embed", "head", "rest"}, {"layers.3", "layers.9"}
    assert size(units_of(blocks).values()) == whole
    assert size(changed_units(blocks, always | layers)) == sent
    assert size(changed_units(blocks, always | layers | {"layers.0", "layers.1"})) == after_a_switch


def refusal(folder, stage, changes, retries):
    try:
        train(folder, stage, changes, retries)
    except UserError as error:
        return str(error)


def test_a_server_that_stays_away_ends_the_run_on_all_ranks(folder, serve):
    server = serve()
    server.dies_at = 1
    said = run_ranks(refusal, 2, folder, "zero2", of(server, vllm_server_timeout=1.0), 0)
    assert said[0] == said[1]
    assert said[0].startswith("--use_vllm: the server is gone, or does not take weights (")
    assert said[0].endswith("; start it as before, and go on by --resume_from_checkpoint auto.")


def test_a_server_of_another_model_is_refused(folder, serve):
    tiny_llama(num_layers=4).save_pretrained(folder / "other")
    said = run_ranks(refusal, 2, folder, "zero2", of(serve(served=str(folder / "other"))), 0)
    other = f"--use_vllm: the server has another model, {folder}/other (its vocab_size is 128, the run's"
    assert said[0] == said[1]
    assert said[0].startswith(other), said
    assert said[0].endswith("); start it with that of the run.")


def test_the_best_model_is_sent_whole(folder, serve):
    server = serve()
    best = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "reward", "greater_is_better": False}
    run_ranks(train, 1, folder, "zero2", of(server, max_steps=4, evaluate=True, **best))
    assert len(server.updates[-1]) == NUM_TENSORS
    assert equal(server, folder)


def test_a_resumed_run_sends_everything_first(folder, serve):
    server = serve()
    saves = {"save_strategy": "steps", "save_steps": 3}
    run_ranks(train, 1, folder, "zero2", of(server, max_steps=3, **saves))
    _, seen, _ = run_ranks(train, 1, folder, "zero2", of(server, resume="auto", **saves))[0]
    assert [len(names) for names in server.updates] == [NUM_TENSORS, 12, 12, 12, NUM_TENSORS, 12, 12, 12]
    assert server.seen[3:] == seen


@pytest.mark.parametrize("sleeps", [False, True])
def test_an_engine_in_the_process_has_the_weights_too(folder, sleeps):
    """One that sleeps has given its weights up, and is sent all of them."""
    colocated = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_correction": False}
    _, seen, engine = run_ranks(train, 2, folder, "zero3", colocated | {"vllm_enable_sleep_mode": sleeps})[0]
    assert [one for one, _ in engine] == seen
    assert [count for _, count in engine] == ([NUM_TENSORS] * 6 if sleeps else [NUM_TENSORS] + [12] * 5)
