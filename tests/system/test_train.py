"""A run from the command line: every way of starting, what it writes, and what it refuses."""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from cases import full
from datasets import Dataset
from deepspeed.accelerator import get_accelerator
from peft import PeftModel
from ranks import PATIENCE, run_ranks
from runs import (
    BIN,
    ROOT,
    TRAIN,
    Alone,
    check_run,
    clean_environment,
    flags_for,
    on_two_ranks,
    run_alone,
    run_well,
    start_deepspeed,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lisa_dist.data.dataset import DataArguments
from lisa_dist.distributed.run_lock import LOCK_NAME, one_run_in
from lisa_dist.ds_config import read_ds_config
from lisa_dist.run.arguments import RunArguments, RunConfig, parse_arguments
from lisa_dist.run.inputs import load_examples
from lisa_dist.run.run import run
from lisa_dist.run.task_configs import LisaSFTConfig
from lisa_dist.train.sft_trainer import LisaTrainer

pytestmark = pytest.mark.usefixtures("cpu_ops")
SMALLEST = {"optim": "lisa_adamw", "lisa_master": "bf16_sr", "lisa_state_bits": "embed=8,head=8,layers=8"}
AUTO = {"lisa_activated_layers": "auto", "checkpointed_layers": "auto", "deepspeed": "zero2", "bf16": True}
AUTO |= {"optim": "lisa_adamw"}

# The same for methods without LISA; each step says how many layers are checkpointed in it.
WATCHED = """
from lisa_dist.commands.train import main
from lisa_dist.train.sft_trainer import BaselineTrainer

step = BaselineTrainer.training_step


def watched(trainer, *args, **kwargs):
    layers = [one for one in trainer.model.modules() if type(one).__name__ == "LlamaDecoderLayer"]
    print(sum(layer.gradient_checkpointing for layer in layers), "of", len(layers), "layers are checkpointed")
    return step(trainer, *args, **kwargs)


BaselineTrainer.training_step = watched
main()
"""


@pytest.mark.full
def test_a_run_of_the_deepspeed_launcher(folder, tmp_path):
    """`lisa-dist train` is below, torchrun in test_hosts.py and test_slurm.py."""
    changes = {"deepspeed": "zero3", "bf16": True, "sample_prompt": "1 + 1?"} | SMALLEST
    said = start_deepspeed([*flags_for(folder, tmp_path / "out", **changes), "--sample_prompt", "1 + 1?", "2 + 2?"])
    check_run(said, tmp_path / "out", [0, 2, 4])
    assert "before training, asked: 1 + 1?" in said
    assert "after training, asked: 2 + 2?" in said
    answers = [json.loads(line) for line in (tmp_path / "out" / "lisa_answers.jsonl").read_text().splitlines()]
    asked = [(step, prompt) for step in (0, 5) for prompt in ("1 + 1?", "2 + 2?")]
    assert [(one["step"], one["prompt"]) for one in answers] == asked


@pytest.mark.full
def test_the_number_of_layers_is_planned_and_stays_on_a_resume(folder, tmp_path):
    """Also frozen layers in fewer bits, evaluated with their originals, from the command line."""
    auto = AUTO | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    out = tmp_path / "out"
    said = run_well(flags_for(folder, out, **auto, gpu_memory="1GiB"), tmp_path)
    assert "2 steps with 6 layers, uniform" in said, "all that there are"
    assert "(100.0%): full training" in said
    shutil.rmtree(out / "checkpoint-4")
    resumed = auto | {"gpu_memory": "3MiB", "resume_from_checkpoint": True, "eval_frozen_bits": 16}
    resumed |= {"lisa_frozen_bits": 4, "lisa_frozen_store": tmp_path}
    said = run_well(flags_for(folder, out, **resumed), tmp_path, report=True)
    assert "2 steps with 6 layers, uniform" in said, "though fewer would be planned"
    measured = r"step 3 took [\d.]+ MiB at its peak: 6 of 6 layers checkpointed, .*; [1-5] of 6 layers train from the"
    assert re.search(measured, said), "which the first step that is measured has shown"
    assert re.search(r"frozen layers +\d+% of their bytes in 4 bits; originals, once a host: [\d.]+ MiB", said)


@pytest.mark.full
def test_fewer_layers_are_planned_or_none(folder, tmp_path):
    fewer = AUTO | {"gpu_memory": "2.6MiB", "max_steps": 1, "lisa_frozen_bits": 4}
    said = run_well(flags_for(folder, tmp_path / "fewer", **fewer), tmp_path)
    assert int(re.search(r"2 steps with (\d) layers, uniform", said)[1]) < 6
    none = AUTO | {"gpu_memory": "1MiB", "checkpointed_layers": "all"}
    status, said = run_alone(flags_for(folder, tmp_path / "none", **none), tmp_path / "none.txt")
    assert status == 2
    assert "lisa-dist: --lisa_activated_layers auto: not one layer fits 1.0 MiB: with one " in said
    assert not (tmp_path / "none").exists()


@pytest.mark.full
def test_a_run_of_which_nothing_is_said_trains_adapters(folder, tmp_path):
    """With embedding and head, on two ranks, in bf16; resumed it ends with the same weights."""
    changes = {"deepspeed": "zero3", "bf16": True, "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    words = flags_for(folder, tmp_path / "out", **changes)
    for flag in ("--lisa_preset", "--lisa_interval_steps"):
        del words[(at := words.index(flag)) : at + 2]
    said = on_two_ranks(words, tmp_path)
    small = "optim lisa_adamw, lisa_state_bits embed=factored,head=factored,layers=8, lisa_master bf16_sr"
    assert f"adapters: lisa_activated_layers 0, lisa_adapters 32, {small}" in said
    assert re.search(r"always trained +embed \S+, head \S+, rest \S+, adapters ", said)
    assert "active layers" not in said, "nothing is sampled"
    whole = load_file(tmp_path / "out" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-5")
    on_two_ranks([*words, "--resume_from_checkpoint", "true"], tmp_path)
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_modules_of_layers_are_sampled_by_themselves(folder, tmp_path):
    """What the run says, logs and draws of them, and that the plan of a step is near what was measured."""
    changes = {"lisa_unit": "module", "lisa_budget": "10%", "max_steps": 6, "lisa_interval_steps": 2, "bf16": True}
    out = tmp_path / "out"
    said = run_well(flags_for(folder, out, **changes, deepspeed="zero3"), tmp_path, report=True)
    assert "6 at model.layers, of 42 linear modules, 2048 to 6144 parameters each" in said
    assert "2 steps with modules of 10% of their parameters, uniform" in said
    assert re.search(r"active modules: (\d\.(self_attn|mlp)\.\w+_proj(, )?)+\n", said)
    assert re.search(r"step 1/6 .*  modules: \d+  ", said)
    modules = json.loads((out / "lisa_run.json").read_text())["modules"]
    assert len(modules) == 42
    assert modules[7] == "layers.1.self_attn.q_proj"
    periods = [json.loads(line)["layers"] for line in (out / "lisa_log.jsonl").read_text().splitlines()]
    assert len(periods) == 3
    assert all(0 < len(period) <= 9 for period in periods)
    moved = [json.loads(line)["blocks"] for line in (out / "lisa_movement.jsonl").read_text().splitlines()]
    for period, blocks in zip(periods, moved, strict=True):
        assert {modules[number] for number in period} | {"embed", "head", "rest"} == set(blocks)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    of_periods = [one for one in history if "lisa/visits/layer_00.mlp.up_proj" in one]
    assert sum(value for name, value in of_periods[0].items() if "active_layers" in name) == len(periods[0])
    norms = {name for one in of_periods for name in one if name.startswith("lisa/update_norm/layer_")}
    ended = {modules[number].removeprefix("layers.") for period in periods[:-1] for number in period}
    assert norms == {f"lisa/update_norm/layer_0{name}" for name in ended}
    memory = json.loads((out / "lisa_memory.json").read_text())
    # 0.013 with the oldest releases.
    assert memory["planned"]["peak"] == pytest.approx(memory["measured"]["peak"], rel=0.02)
    assert {path.stem for path in (out / "report").iterdir()} >= {"layers", "visits", "movement"}


def logged(folder: Path, name: str) -> list[float]:
    """The values of this name that a run has logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def launch_until(condition: Callable[[], bool], flags: list[str], folder: Path, **variables: str) -> subprocess.Popen:
    """`lisa-dist train --gpus 2`, once a condition has come to hold."""
    command = [str(BIN / "lisa-dist"), "train", "--gpus", "2", *flags]
    with (folder / "said.txt").open("w") as said:
        run = subprocess.Popen(command, env=clean_environment() | variables, stdout=said, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + PATIENCE
    while not condition() and run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return run


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_lisa_dist_train_saves_on_its_ranks(folder, tmp_path, number):
    flags = flags_for(folder, tmp_path / "out", max_steps=2000, eval_strategy="no", eval_on_start=False)
    run = launch_until(lambda: "step 3/2000" in (tmp_path / "said.txt").read_text(), flags, tmp_path)
    run.send_signal(number)
    assert run.wait(timeout=PATIENCE) == 0, (tmp_path / "said.txt").read_text()[-3000:]
    said = (tmp_path / "said.txt").read_text()
    assert f"{number.name}: stopped after step" in said
    assert not re.findall(r".*(?:INFO|WARN|Warn|deprecat|caution|Max_MA).*", said), "lines of other programs"
    assert len(list((tmp_path / "out").glob("checkpoint-*/lisa_state.json"))) == 1
    mask = os.umask(0)
    os.umask(mask)
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "out", saved)] == [0o777 & ~mask] * 2
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir() if path.is_file()} == {0o666 & ~mask}


# It compiles until it is ended; of what torch asks it otherwise the real one answers.
COMPILER = """#!/bin/sh
case " $* " in *" -c "*) echo $$ >> "$(dirname "$0")/compiling"; exec sleep 1000;; esac
exec /usr/bin/c++ "$@"
"""


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_while_an_operator_is_compiled_leaves_no_rank(folder, tmp_path, number):
    (compiler := tmp_path / "c++").write_text(COMPILER)
    compiler.chmod(0o755)
    variables = {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    run = launch_until((tmp_path / "compiling").exists, flags_for(folder, tmp_path / "out"), tmp_path, **variables)
    below = psutil.Process(run.pid).children(recursive=True)
    ours = [process for process in below if "python" in process.name()]
    assert len(ours) >= 4, "the launcher, its helper and two ranks"
    try:
        run.send_signal(number)
        assert run.wait(timeout=PATIENCE) != 0
        assert psutil.wait_procs(ours, timeout=PATIENCE)[1] == []
    finally:
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.full
def test_full_training_under_the_same_roof(folder, tmp_path):
    (tmp_path / "watched.py").write_text(WATCHED)
    # As a recipe of `lisa-dist init` has them; the last is the flag that they stand in for.
    changes = {"checkpointed_layers": "auto", "gpu_memory": "23GiB", "gradient_checkpointing": False}
    flags = flags_for(folder, tmp_path / "out", method="full", **changes)
    said = run_well(flags, tmp_path, tmp_path / "watched.py", report=True)
    without_effect = (
        "without effect +--lisa_interval_steps, --lisa_debug, --lisa_preset, --gpu_memory, which are for --method lisa"
    )
    assert re.search(without_effect, said)
    assert re.search("checkpointing +all layers; auto chooses among them with --method lisa alone", said)
    assert set(re.findall(".* layers are checkpointed", said)) == {"6 of 6 layers are checkpointed"}
    assert not (tmp_path / "out" / "lisa_log.jsonl").exists()
    report = (tmp_path / "out" / "report.html").read_text()
    sections = ["loss", "learning_rate", "gradient_norm", "speed", "data", "settings"]
    assert re.findall(r'<section id="(\w+)">', report) == sections
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_lora_under_the_same_roof(folder, tmp_path):
    changes = {"deepspeed": "zero2", "method": "lora", "lora_r": 4, "lora_dropout": 0.0, "max_steps": 10}
    changes |= {"checkpointed_layers": "none", "gpu_memory": "23GiB", "lisa_preset": "adapters"}
    (tmp_path / "watched.py").write_text(WATCHED)
    flags = flags_for(folder, tmp_path / "out", **changes)
    said = on_two_ranks(flags, tmp_path, tmp_path / "watched.py", report=True)
    assert re.search("adapters +rank 4, alpha 32, dropout 0.0, on all linear layers but the head", said)
    assert re.search("checkpointing +no layer\n", said)
    assert "preset adapters" not in re.sub(" +", " ", said)
    assert re.search("without effect +--lisa_interval_steps, --lisa_debug, --lisa_preset, --gpu_memory, which", said)
    assert set(re.findall(".* layers are checkpointed", said)) == {"0 of 6 layers are checkpointed"}
    held_out = logged(tmp_path / "out", "eval_loss")
    assert held_out[-1] < held_out[0] - 0.05
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path / "out")
    trained = {name.split(".")[-4] for name, value in adapted.named_parameters() if "lora_B" in name and value.any()}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("method", ["full", "lora", full("lisa")])
def test_a_run_that_saves_before_it_logs_keeps_its_model(folder, tmp_path, method):
    """Also where its model card cannot be written, which is a warning on one line."""
    out = tmp_path / "out"
    (out / "README.md").mkdir(parents=True)
    changes = {"method": method, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "logging_steps": 10}
    said = run_well(flags_for(folder, out, **changes, lora_r=4, eval_strategy="no", eval_on_start=False), tmp_path)
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert (out / weights).is_file()
    assert (out / "checkpoint-1").is_dir()
    assert (out / "checkpoint-2").is_dir()
    warnings = [line for line in said.splitlines() if line.startswith("warning: the model card could not be written (")]
    assert len(warnings) == (0 if method == "lisa" else 3)  # LISA writes a card only for the hub
    assert all(line.endswith("; weights and checkpoints are not affected.") for line in warnings)


# A run that gets a signal at the second call of a function, given by the last two words of the command line.
SIGNALLED = """
import importlib, os, signal, sys
from operator import attrgetter
from lisa_dist.commands.train import main

number, path = int(sys.argv.pop()), sys.argv.pop()
module, owner, name = path.split(":")
owner = attrgetter(owner)(importlib.import_module(module)) if owner else importlib.import_module(module)
function, calls = getattr(owner, name), []


def signalled(*args, **kwargs):
    calls.append(None)
    if len(calls) == 2 or name == "_prepare_for_training":
        os.kill(os.getpid(), number)
    return function(*args, **kwargs)


setattr(owner, name, signalled)
main()
"""
MOMENTS = {
    "before the first step": "transformers:Trainer:_prepare_for_training",
    "in an evaluation": "transformers:Trainer:evaluation_loop",
    "in a save": "lisa_dist.checkpoint.folders::make_durable",
}


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    """What a run of a method comes to that no signal has stopped."""
    found = {}

    def of(method: str) -> tuple:
        if method not in found:
            out = tmp_path_factory.mktemp(method)
            run_well(flags_for(folder, out / "out", method=method, **SIGNALLED_RUN), out)
            found[method] = outcome(out / "out")
        return found[method]

    return of


SIGNALLED_RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_steps": 2, "lora_r": 4}


def outcome(out: Path) -> tuple:
    """Weights, and the loss and the norm of the gradients in each step."""
    weights = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert weights
    return weights, logged(out, "loss"), logged(out, "grad_norm")


@pytest.mark.parametrize(
    ("method", "moment", "number"),
    [
        ("lora", "in an evaluation", signal.SIGINT),
        full("lora", "before the first step", signal.SIGTERM),
        full("lora", "in a save", signal.SIGUSR1),
        ("full", "before the first step", signal.SIGTERM),
        full("full", "in an evaluation", signal.SIGUSR1),
        full("full", "in a save", signal.SIGINT),
        full("lisa", "before the first step", signal.SIGINT),
        full("lisa", "in an evaluation", signal.SIGTERM),
        full("lisa", "in a save", signal.SIGTERM),
    ],
)
def test_a_signal_stops_every_method_with_a_checkpoint(folder, tmp_path, uninterrupted, method, moment, number):
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    flags = flags_for(folder, tmp_path / "out", method=method, **SIGNALLED_RUN)
    words = [*flags, MOMENTS[moment], str(int(number))]
    said = run_well(words, tmp_path, tmp_path / "signalled.py")
    stopped = re.search(rf"{number.name}: stopped after step (\d) and saved; go on with the same command", said)
    assert int(stopped[1]) < 6, said
    assert not list((tmp_path / "out").glob("*.safetensors"))
    said = run_well([*flags, "--resume_from_checkpoint", "auto"], tmp_path)
    assert f"checkpoint-{stopped[1]}, after step {stopped[1]} of 6" in said
    assert outcome(tmp_path / "out") == uninterrupted(method)


@pytest.mark.full
@pytest.mark.parametrize(("method", "ds_config"), [("full", "zero3"), ("lora", "zero2"), ("lora", "zero3")])
def test_two_ranks_stop_together_and_resume_to_the_same_bits(folder, tmp_path, method, ds_config):
    """Both ranks get the signal; a resume on another number of ranks is refused in one line."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    changes = SIGNALLED_RUN | {"method": method, "deepspeed": ds_config}
    on_two_ranks(flags_for(folder, tmp_path / "whole", **changes), tmp_path)
    flags = flags_for(folder, tmp_path / "out", **changes)
    said = on_two_ranks([*flags, MOMENTS["in an evaluation"], "15"], tmp_path, tmp_path / "signalled.py")
    assert "SIGTERM: stopped after step 3 and saved" in said
    status, said = run_alone([*flags, "--resume_from_checkpoint", "true"], tmp_path / "alone.txt")
    assert status == 2
    assert "checkpoint-3 with --method " in said
    assert ": its run had 2 ranks, and this one has 1. " in said
    on_two_ranks([*flags, "--resume_from_checkpoint", "true"], tmp_path)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("method", ["lisa", "full"])
def test_a_run_with_fewer_steps_than_logging_steps_logs_its_last_loss(folder, tmp_path, method):
    """And the header says that its periods are too few for all layers."""
    changes = {"method": method, "max_steps": 3, "logging_steps": 10, "eval_strategy": "no", "eval_on_start": False}
    said = run_well(flags_for(folder, tmp_path / "out", **changes), tmp_path)
    assert re.search(r"step 3/3  100%  loss \d", said)
    assert len(logged(tmp_path / "out", "loss")) == 1
    periods = r"periods +2 periods in 3 steps; 3\.3 of 6 layers are expected to train at least once\n"
    assert bool(re.search(periods, said)) == (method == "lisa")


@pytest.mark.full
def test_every_method_trains_on_the_same_rows_in_the_same_order(folder, tmp_path):
    """Where nothing is learned the loss of a step says which rows it was of."""
    losses = {}
    for method in ("lisa", "full", "lora"):
        (tmp_path / method).mkdir()
        changes = {"method": method, "learning_rate": 0.0, "max_steps": 6, "per_device_train_batch_size": 1}
        on_two_ranks(flags_for(folder, tmp_path / method / "out", **changes), tmp_path / method)
        losses[method] = logged(tmp_path / method / "out", "loss")
    assert len(set(losses["lisa"])) == 6
    assert losses["lisa"] == pytest.approx(losses["full"], abs=1e-6)
    assert losses["lisa"] == pytest.approx(losses["lora"], abs=1e-6)


def test_no_file_of_a_run_has_a_secret(folder, tmp_path):
    ds_config = read_ds_config("zero3") | {"comet": {"enabled": False, "api_key": "secret-1"}}
    changes = {"deepspeed": json.dumps(ds_config), "hub_token": "secret-2"}
    changes |= {"model_init_kwargs": json.dumps({"token": "secret-3"}), "report_to": "tensorboard"}
    changes |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "eval_on_start": False}
    said = run_well(flags_for(folder, tmp_path / "out", **changes), tmp_path, report=True)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"training_args.bin", "lisa_run.json", "lisa_memory.json", "report.html"} <= names
    assert any("tfevents" in name for name in names)
    for path in written:
        assert b"secret-" not in path.read_bytes(), path
    assert "secret-" not in said


def test_a_folder_that_another_run_has_is_refused(folder, tmp_path):
    """Before a model is loaded."""
    with one_run_in(tmp_path / "out"):
        status, said = run_alone(flags_for(folder, tmp_path / "out"), tmp_path / "said.txt")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_NAME]
    assert status == 2
    assert f"lisa-dist: --output_dir {tmp_path / 'out'}: run " in said
    assert f", process {os.getpid()}, has it since " in said
    assert "Traceback" not in said
    assert "active at a time" not in said


@pytest.mark.parametrize(
    ("changes", "problem", "begins"),
    [
        ({"dataset_name": "absent.jsonl"}, "--dataset_name absent.jsonl: no such file", False),
        ({"metric_for_best_model": "accuracy"}, "--metric_for_best_model accuracy: no metric of an evaluation", True),
    ],
)
def test_an_error_is_one_line(folder, tmp_path, changes, problem, begins):
    status, said = run_alone(flags_for(folder, tmp_path / "out", **changes), tmp_path / "said.txt")
    assert status == 2
    assert f"lisa-dist: {problem}" in said
    assert "Traceback" not in said
    assert begins or not (tmp_path / "out").exists()


def load_under_stage_3(folder: str, output_dir: str) -> dict:
    """What a rank holds of the model before training, and what the model is."""
    unset_hf_deepspeed_config()
    args = LisaSFTConfig(output_dir=output_dir, deepspeed="zero3", bf16=False, report_to="none", max_length=32)
    rows = Dataset.from_list([{"text": "one two three"}] * 4)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    trainer = LisaTrainer(model=f"{folder}/model", args=args, train_dataset=rows, processing_class=tokenizer)
    parameters = list(trainer.model.parameters())
    return {
        "whole": sum(parameter.numel() for parameter in parameters),
        "held": sum(parameter.ds_tensor.numel() for parameter in parameters),
        "numel": sum(parameter.ds_numel for parameter in parameters),
    }


def count_tokenized(folder: str, output_dir: str) -> tuple[int, list[str]]:
    """How many texts this rank has tokenized for a run, and the files that it trains from."""
    unset_hf_deepspeed_config()
    texts = 0
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    call = type(tokenizer).__call__

    def counting(self, *args, **kwargs):
        nonlocal texts
        texts += 1
        return call(self, *args, **kwargs)

    type(tokenizer).__call__ = counting
    try:
        args = LisaSFTConfig(output_dir=output_dir, deepspeed="zero2", bf16=False, report_to="none", max_length=32)
        data_args = DataArguments(dataset_name=f"{output_dir}/rows.jsonl", eval_rows=8)
        data = load_examples(RunConfig(RunArguments(), data_args, args, None, None), tokenizer)
        rows = {"train_dataset": data.train, "eval_dataset": data.held_out}
        trainer = LisaTrainer(model=f"{folder}/model", args=args, processing_class=tokenizer, **rows)
    finally:
        type(tokenizer).__call__ = call
    return texts, [file["filename"] for file in trainer.train_dataset.cache_files]


def test_rows_are_tokenized_once_on_a_host(folder, tmp_path):
    shutil.copy(folder / "rows.jsonl", tmp_path)  # which no other test has had tokenized
    (first, its_files), (second, other_files) = run_ranks(count_tokenized, 2, str(folder), str(tmp_path))
    assert first > 0
    assert second == 0
    assert its_files == other_files
    assert its_files


def test_stage_3_loads_a_model_in_pieces(folder, tmp_path):
    """No rank ever has the whole of it: `from_pretrained` cuts each parameter as it is loaded."""
    for found in run_ranks(load_under_stage_3, 2, str(folder), str(tmp_path)):
        assert found["whole"] == 0
        assert found["held"] == pytest.approx(found["numel"] / 2, abs=100)


@pytest.mark.full
def test_the_header_of_a_recipe_is_what_is_planned_of_it():
    """One of them, in full; the others' tables are made by the same script."""
    recipes = runpy.run_path(str(ROOT / "benchmarks" / "tables" / "recipes.py"))
    texts = {path.stem: path.read_text() for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml"))}
    assert recipes["with_plan"](texts["llama2_7b_1gpu"]) == texts["llama2_7b_1gpu"]
    for name, text in texts.items():
        assert name == "quickstart" or (re.search(r"# fits +yes", text) and recipes["COMMAND"] in text), name
        flags = yaml.safe_load(text)
        for flag in re.findall(r"--(deepspeed|lisa_\w+|optim) (\S+)", text):
            assert str(flags[flag[0]]) == flag[1], (name, flag)


@pytest.mark.full
def test_every_recipe_takes_a_step_with_a_tiny_model(folder, tmp_path):
    recipes = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
    for recipe in recipes:
        flags = ["--config", str(recipe), "--model_name_or_path", str(folder / "model"), "--max_steps", "2"]
        flags += ["--dataset_name", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path / recipe.stem)]
        flags += ["--max_length", "32", "--save_strategy", "no"]
        flags += ["--gpu_memory", "4GiB"] if "checkpointed_layers: auto" in recipe.read_text() else []
        rows = str(yaml.safe_load(recipe.read_text())["per_device_train_batch_size"])
        flags += ["--eval_rows", "8", "--global_batch_size", rows, "--gradient_accumulation_steps", "1"]
        flags += [] if "lisa_master: bf16_sr" in recipe.read_text() else ["--bf16", "false"]
        if "sequence_parallel" in recipe.read_text():
            on_two_ranks([*flags, "--sequence_parallel", "2", "--lisa_activated_layers", "2"], tmp_path)
        else:
            run_well(flags, tmp_path)
        state = json.loads((tmp_path / recipe.stem / "trainer_state.json").read_text())
        assert state["global_step"] == 2
        memory = json.loads((tmp_path / recipe.stem / "lisa_memory.json").read_text())
        assert memory["measured"]["peak"] == pytest.approx(memory["planned"]["peak"], rel=0.05), recipe.stem


IN_4_BITS = "--lisa_frozen_bits 4 --bf16 true"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--dataset_text_field body", "body: has no effect here; use --dataset_columns text="),
        ("--lisa_activated_layers 7", "--lisa_activated_layers 7: the model has 6 decoder layers"),
        ("--lisa_sampler weighted --lisa_weights_file absent.json", "--lisa_weights_file absent.json"),
        ("--lisa_unit module --lisa_budget 1%", "1%: 1843 of 0.18 M parameters, and the smallest"),
        (
            "--lisa_unit module --lisa_budget 10% --torch_compile true",
            "--torch_compile True with --lisa_unit module: a layer has a graph for each set of its modules",
        ),
        ("--model_name_or_path no/such-model", "--model_name_or_path no/such-model: no such folder"),
        ("--deepspeed zero3_nvme", "--deepspeed zero3_offload"),
        ("--optim lomo", "--optim lomo: LISA runs AdamW"),
        ("--loss liger", "--loss liger: Liger's Triton kernels need a CUDA device; leave it out"),
        ("--loss logits --label_smoothing_factor 0.1", "logits: --label_smoothing_factor 0.1 has a loss of"),
        ("--lisa_master bf16_sr", "bf16_sr with --optim adamw_torch_fused: only --optim lisa_adamw"),
        ("--lisa_activated_layers auto", "--lisa_activated_layers auto: there is no GPU to ask for its memory"),
        (f"{IN_4_BITS} --deepspeed zero3", "--lisa_frozen_bits 4 on ZeRO stage 3"),
        ("--lisa_frozen_bits 8", "--lisa_frozen_bits 8 with weights in fp32"),
        ("--lisa_offload frozen --bf16 true --deepspeed zero3", "--lisa_offload frozen on ZeRO stage 3: it cuts"),
        ("--lisa_offload frozen --method full", "--lisa_offload frozen with --method full: it is for --method lisa"),
        (
            "--lisa_offload frozen --bf16 true --torch_compile true",
            "True with --lisa_offload frozen: a graph",
        ),
        (
            IN_4_BITS + """ --model_init_kwargs {"use_kernels":true}""",
            "--lisa_frozen_bits 4 with --model_init_kwargs use_kernels: such kernels read weights by themselves",
        ),
        (
            IN_4_BITS + """ --model_init_kwargs {"experts_implementation":"deepgemm"}""",
            "4 with experts_implementation deepgemm: its kernel reads the weights by itself; give one of eager, gr",
        ),
        ("--lisa_frozen_bits 4 --method full", "--lisa_frozen_bits 4 with --method full: it is for"),
        (f"{IN_4_BITS} --torch_compile true", "--torch_compile True with --lisa_frozen_bits 4"),
        (f"{IN_4_BITS} --lisa_frozen_store absent", "--lisa_frozen_store absent: absent is no"),
        ("--eval_frozen_bits 8", "--eval_frozen_bits 8: frozen layers are evaluated as they are quantized"),
        ("--lisa_frozen_bits fp8 --bf16 true --eval_frozen_bits 8", "with --lisa_frozen_bits fp8 give 16."),
        ("--lisa_frozen_bits fp8 --bf16 false --fp16 true", "--lisa_frozen_bits fp8 with weights in fp16: GPUs give"),
        ("--lisa_master bf16_sr --optim lisa_adamw", "--lisa_master bf16_sr with weights in fp32"),
        ("--method full --optim lisa_adamw --checkpointed_layers none", "with --method full: it is for --method lisa;"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch, flags, said):
    # Some CPUs have fp16 and some do not, and a device without it is refused first.
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    config = parse_arguments([*flags_for(folder, tmp_path / "out"), *flags.split()])
    with pytest.raises(ValueError, match="--") as error:
        run(config)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_stopped_run_goes_on_to_the_weights_of_the_whole_one(folder, tmp_path):
    # Steps enough for the signal to come before the end.
    changes = {"max_steps": 50, "save_strategy": "steps", "save_steps": 100, "eval_strategy": "no"}
    changes |= {"eval_on_start": False}
    run_well(flags_for(folder, tmp_path / "whole", **changes), tmp_path)
    out = tmp_path / "out"
    run = Alone(flags_for(folder, out, **changes), tmp_path / "out.txt", TRAIN)
    while "period    1  active" not in run.said and run.process.is_alive():
        time.sleep(0.01)
    os.kill(run.process.pid, signal.SIGINT)  # SIGTERM is above, SIGUSR1 in test_slurm.py
    status, said = run.wait(), run.said
    assert status == 0, said
    assert "Ctrl-C: the run saves after this step and ends; another one, " in said
    assert "SIGINT: stopped after step" in said
    assert "--resume_from_checkpoint true" in said
    assert not (out / LOCK_NAME).exists(), "the run that goes on may be on another host"
    assert not (out / "model.safetensors").exists()
    (saved,) = out.glob("checkpoint-*")
    assert 2 < int(saved.name.split("-")[1]) < 50

    run_well(flags_for(folder, out, **changes | {"resume_from_checkpoint": True}), tmp_path)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    logs = [(path / "lisa_log.jsonl").read_text().splitlines() for path in (out, tmp_path / "whole")]
    periods = [[(line["period"], line["step"], line["layers"]) for line in map(json.loads, log)] for log in logs]
    assert periods[0] == periods[1]
    assert "chat_template.jinja" in {path.name for path in saved.iterdir()}


def test_a_resume_where_a_period_begins_names_that_period_only(folder, tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "eval_on_start": False}
    run_well(flags_for(folder, tmp_path / "out", **changes), tmp_path)
    resume = {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-2"}
    said = run_well(flags_for(folder, tmp_path / "out", **changes, **resume), tmp_path)
    assert re.findall(r"step +(\d+)  period +(\d+)  active", said) == [("2", "1")]


@pytest.mark.full
def test_a_plain_model_begins_a_new_run_and_auto_begins_without_a_checkpoint(folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    still = {"learning_rate": 0, "max_steps": 1, "deepspeed": "zero3"}
    resume = {"resume_from_checkpoint": tmp_path / "other"}
    said = run_well(flags_for(folder, tmp_path / "out", **still, **resume), tmp_path)
    assert f"{tmp_path / 'other'} is no checkpoint of a LISA run: a new run begins from its weights." in said
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for one, two in zip(trained.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    flags = flags_for(folder, tmp_path / "new", resume_from_checkpoint="auto", max_steps=2)
    said = run_well(flags, tmp_path)
    assert f"no checkpoint in {tmp_path / 'new'} yet: the run begins at step 0." in said


REAL = {"max_length": 128, "max_steps": 10, "eval_steps": 10, "lisa_interval_steps": 5, "learning_rate": 3e-3}


@pytest.mark.full
def test_a_real_model_learns_real_data(data_dir, tmp_path):
    """Two ranks, ZeRO-3, a real Llama of 1 MB on GSM8K: the held-out loss falls."""
    rows = (data_dir / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:500]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    real = REAL | {"deepspeed": "zero3", "lisa_sampler": "reshuffle", "per_device_train_batch_size": 4}
    real |= {"model_name_or_path": data_dir / "models" / "stories260k-hf", "max_steps": 20, "eval_steps": 20}
    on_two_ranks(flags_for(tmp_path, tmp_path / "out", **real), tmp_path)
    before, after = logged(tmp_path / "out", "eval_loss")
    assert after < before - 1.0
    periods = [json.loads(line) for line in (tmp_path / "out" / "lisa_log.jsonl").read_text().splitlines()]
    assert len({tuple(period["layers"]) for period in periods}) > 1


def converted(data_dir: Path, folder: Path) -> Path:
    """PubMedQA as docs/data.md has it converted."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (folder / "ori_pqal.json").symlink_to(data_dir / "pubmedqa" / "ori_pqal.json")
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return folder / "pubmedqa.jsonl"


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("chat/oasst_en_chat.jsonl", {}, "oasst_en_chat.jsonl: "),
        full("pubmedqa", {"max_length": 512}, "pubmedqa.jsonl: question_answer (question, answer), 1000 examples"),
    ],
)
def test_each_kind_of_real_data_trains(data_dir, tmp_path, name, changes, found):
    path = converted(data_dir, tmp_path) if name == "pubmedqa" else data_dir / name
    real = REAL | {"model_name_or_path": data_dir / "models" / "stories260k-hf", "dataset_name": path}
    said = run_well(flags_for(tmp_path, tmp_path / "out", **real | changes), tmp_path)
    assert found in said
    assert "of them with loss" in said
    before, after = logged(tmp_path / "out", "eval_loss")
    assert after < before
