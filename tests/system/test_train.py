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
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from cells import full
from datasets import Dataset
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
    save_tiny_run,
    start_deepspeed,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lisa_dist.data.dataset import DataArguments
from lisa_dist.distributed import launching
from lisa_dist.distributed.launching import launch_if_asked
from lisa_dist.distributed.run_lock import LOCK_NAME, one_run_in
from lisa_dist.ds_config import read_ds_config
from lisa_dist.run.arguments import RunArguments, RunConfig, parse_arguments, run_parser
from lisa_dist.run.inputs import load_examples
from lisa_dist.run.run import run
from lisa_dist.run.task_configs import LisaSFTConfig, accumulation_steps
from lisa_dist.train.sft_trainer import LisaTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with a byte tokenizer and a chat template, and some rows."""
    return save_tiny_run(tmp_path_factory.mktemp("train"))


SMALLEST = {"optim": "lisa_adamw", "lisa_master": "bf16_sr", "lisa_state_bits": "embed=8,head=8,layers=8"}


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


@pytest.mark.usefixtures("cpu_ops")
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


@pytest.mark.usefixtures("cpu_ops")
def test_the_number_of_layers_is_planned_and_stays_on_a_resume(folder, tmp_path):
    """Also frozen layers in fewer bits, evaluated with their originals, from the command line."""
    auto = {"lisa_activated_layers": "auto", "checkpointed_layers": "auto", "deepspeed": "zero2", "bf16": True}
    auto |= {"optim": "lisa_adamw", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    out = tmp_path / "out"
    status, said = run_alone(flags_for(folder, out, **auto, gpu_memory="1GiB"), tmp_path / "said.txt")
    assert status == 0, said[-3000:]
    assert "2 steps with 6 layers, uniform" in said, "all that there are"
    assert "(100.0%): full training" in said
    shutil.rmtree(out / "checkpoint-4")
    resumed = auto | {"gpu_memory": "3MiB", "resume_from_checkpoint": True, "eval_frozen_bits": 16}
    resumed |= {"lisa_frozen_bits": 4, "lisa_frozen_store": tmp_path}
    status, said = run_alone(flags_for(folder, out, **resumed), tmp_path / "resumed.txt")
    assert status == 0, said[-3000:]
    assert "2 steps with 6 layers, uniform" in said, "though fewer would be planned"
    measured = (
        r"step 3 took [\d.]+ MiB at its peak: 6 of 6 layers checkpointed, .*; [1-5] of 6 layers train from the next"
    )
    assert re.search(measured, said), "which the first step that is measured has shown"
    assert re.search(r"frozen layers +\d+% of their bytes in 4 bits; originals, once a host: [\d.]+ MiB", said)


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_fewer_layers_are_planned_or_none(folder, tmp_path):
    auto = {"lisa_activated_layers": "auto", "checkpointed_layers": "auto", "deepspeed": "zero2", "bf16": True}
    auto |= {"optim": "lisa_adamw"}
    fewer = auto | {"gpu_memory": "2.6MiB", "max_steps": 1, "lisa_frozen_bits": 4}
    status, said = run_alone(flags_for(folder, tmp_path / "fewer", **fewer), tmp_path / "fewer.txt")
    assert status == 0, said[-3000:]
    assert int(re.search(r"2 steps with (\d) layers, uniform", said)[1]) < 6
    none = auto | {"gpu_memory": "1MiB", "checkpointed_layers": "all"}
    status, said = run_alone(flags_for(folder, tmp_path / "none", **none), tmp_path / "none.txt")
    assert status == 2
    assert "lisa-dist: --lisa_activated_layers auto: not one layer fits 1.0 MiB: with one " in said
    assert not (tmp_path / "none").exists()


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_run_of_which_nothing_is_said_has_the_memory_of_lora(folder, tmp_path, stage):
    """On two ranks, in bf16; resumed in a period it ends with the same weights."""
    changes = {"deepspeed": stage, "bf16": True, "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    words = flags_for(folder, tmp_path / "out", **changes)
    del words[(at := words.index("--lisa_preset")) : at + 2]
    said = on_two_ranks(words, tmp_path)
    small = "lisa_state_bits embed=factored,head=factored,layers=8, lisa_master bf16_sr"
    assert f"lora: optim lisa_adamw, {small}" in said
    assert (
        layers := re.search(
            r"layers +lora: (\d) of 6, [\d.]+ \wiB planned without checkpointing; LoRA's step, rank 16, and a tenth",
            said,
        )
    )
    assert f"2 steps with {layers[1]} layers, uniform" in said
    whole = load_file(tmp_path / "out" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-5")
    said = on_two_ranks([*words, "--resume_from_checkpoint", "true"], tmp_path)
    assert f"{layers[1]}, as the run had that goes on" in said
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.usefixtures("cpu_ops")
def test_modules_of_layers_are_sampled_by_themselves(folder, tmp_path):
    """What the run says, logs and draws of them, and that the plan of a step is near what was measured."""
    changes = {"lisa_unit": "module", "lisa_budget": "10%", "max_steps": 6, "lisa_interval_steps": 2, "bf16": True}
    out = tmp_path / "out"
    status, said = run_alone(flags_for(folder, out, **changes, deepspeed="zero3"), tmp_path / "said.txt")
    assert status == 0, said[-3000:]
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
    logged = [one for one in history(out) if "lisa/visits/layer_00.mlp.up_proj" in one]
    assert sum(value for name, value in logged[0].items() if "active_layers" in name) == len(periods[0])
    norms = {name for one in logged for name in one if name.startswith("lisa/update_norm/layer_")}
    ended = {modules[number].removeprefix("layers.") for period in periods[:-1] for number in period}
    assert norms == {f"lisa/update_norm/layer_0{name}" for name in ended}
    memory = json.loads((out / "lisa_memory.json").read_text())
    assert memory["planned"]["peak"] == pytest.approx(
        memory["measured"]["peak"], rel=0.02
    )  # 0.013 with the oldest releases
    assert {path.stem for path in (out / "report").iterdir()} >= {"layers", "visits", "movement"}


def history(folder: Path) -> list[dict]:
    """What a run has logged, times left out."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("second", "runtime", "flops", "seconds", "bytes")
    return [{name: value for name, value in one.items() if not any(map(name.__contains__, timed))} for one in entries]


@pytest.mark.usefixtures("cpu_ops")
def test_a_signal_to_lisa_dist_train_saves_on_its_ranks(folder, tmp_path):
    flags = flags_for(folder, tmp_path / "out", max_steps=2000, eval_strategy="no", eval_on_start=False)
    command = [str(BIN / "lisa-dist"), "train", "--gpus", "2", *flags]
    with (tmp_path / "said.txt").open("w") as said:
        run = subprocess.Popen(command, env=clean_environment(), stdout=said, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + PATIENCE
    while "step 3/2000" not in (tmp_path / "said.txt").read_text() and run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=PATIENCE) == 0, (tmp_path / "said.txt").read_text()[-3000:]
    said = (tmp_path / "said.txt").read_text()
    assert "SIGTERM: stopped after step" in said
    assert not re.findall(r".*(?:INFO|WARN|Warn|deprecat|caution|Max_MA).*", said), "lines of other programs"
    assert len(list((tmp_path / "out").glob("checkpoint-*/lisa_state.json"))) == 1
    mask = os.umask(0)
    os.umask(mask)
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "out", saved)] == [0o777 & ~mask] * 2
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir() if path.is_file()} == {0o666 & ~mask}


ORPHAN = """
import os, subprocess, time
from lisa_dist.distributed.launching import launch_if_asked
launcher = subprocess.Popen(["sleep", "1000"])
os.environ["LISA_DIST_LAUNCHER"] = str(launcher.pid)
launch_if_asked([], "train", check=print)
launcher.kill()
time.sleep(1000)
"""


def test_a_rank_ends_with_its_launcher(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    assert Alone([], tmp_path / "said.txt", tmp_path / "orphan.py").wait() == -signal.SIGTERM


# It compiles until it is ended; of what torch asks it otherwise the real one answers.
COMPILER = """#!/bin/sh
case " $* " in *" -c "*) echo $$ >> "$(dirname "$0")/compiling"; exec sleep 1000;; esac
exec /usr/bin/c++ "$@"
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, full(signal.SIGKILL)])
def test_a_run_that_is_ended_while_an_operator_is_compiled_leaves_no_rank(folder, tmp_path, number):
    (compiler := tmp_path / "c++").write_text(COMPILER)
    compiler.chmod(0o755)
    environment = clean_environment() | {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    command = [str(BIN / "lisa-dist"), "train", "--gpus", "2", *flags_for(folder, tmp_path / "out")]
    with (tmp_path / "said.txt").open("w") as said:
        run = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "compiling").exists() and run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
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


def test_flags_are_checked_before_ranks_are_started(monkeypatch):
    monkeypatch.setattr(launching.subprocess, "Popen", None)
    with pytest.raises(ValueError, match=r"--max_step: no such flag; did you mean --max_steps\?"):
        launch_if_asked(["--gpus", "2", "--max_step", "4"], "train", run_parser().check)


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_full_training_under_the_same_roof(folder, tmp_path):
    (tmp_path / "watched.py").write_text(WATCHED)
    # As a recipe of `lisa-dist init` has them; the last is the flag that they stand in for.
    changes = {"checkpointed_layers": "auto", "gpu_memory": "23GiB", "gradient_checkpointing": False}
    flags = flags_for(folder, tmp_path / "out", method="full", **changes)
    status, said = run_alone(flags, tmp_path / "said.txt", tmp_path / "watched.py")
    assert status == 0, said[-3000:]
    assert re.search(
        "without effect +--lisa_interval_steps, --lisa_debug, --gpu_memory, which are for --method lisa", said
    )
    assert re.search("checkpointing +all layers; auto chooses among them with --method lisa alone", said)
    assert set(re.findall(".* layers are checkpointed", said)) == {"6 of 6 layers are checkpointed"}
    assert not (tmp_path / "out" / "lisa_log.jsonl").exists()
    report = (tmp_path / "out" / "report.html").read_text()
    assert re.findall(r'<section id="(\w+)">', report) == [
        "loss",
        "learning_rate",
        "gradient_norm",
        "speed",
        "data",
        "settings",
    ]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.usefixtures("cpu_ops")
def test_lora_under_the_same_roof(folder, tmp_path):
    changes = {"deepspeed": "zero2", "method": "lora", "lora_r": 4, "lora_dropout": 0.0, "max_steps": 10}
    changes |= {"checkpointed_layers": "none", "gpu_memory": "23GiB"}
    (tmp_path / "watched.py").write_text(WATCHED)
    on_two_ranks(flags_for(folder, tmp_path / "out", **changes), tmp_path, tmp_path / "watched.py")
    said = (tmp_path / "0.txt").read_text()
    assert re.search("adapters +rank 4, alpha 32, dropout 0.0, on all linear layers but the head", said)
    assert re.search("checkpointing +no layer\n", said)
    assert set(re.findall(".* layers are checkpointed", said)) == {"0 of 6 layers are checkpointed"}
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert held_out[-1] < held_out[0] - 0.05
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path / "out")
    trained = {name.split(".")[-4] for name, value in adapted.named_parameters() if "lora_B" in name and value.any()}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_every_method_trains_on_the_same_rows_in_the_same_order(folder, tmp_path):
    """Where nothing is learned the loss of a step says which rows it was of."""
    losses = {}
    for method in ("lisa", "full", "lora"):
        (tmp_path / method).mkdir()
        changes = {"method": method, "learning_rate": 0.0, "max_steps": 6, "per_device_train_batch_size": 1}
        on_two_ranks(flags_for(folder, tmp_path / method / "out", **changes), tmp_path / method)
        history = json.loads((tmp_path / method / "out" / "trainer_state.json").read_text())["log_history"]
        losses[method] = [entry["loss"] for entry in history if "loss" in entry]
    assert len(set(losses["lisa"])) == 6
    assert losses["lisa"] == pytest.approx(losses["full"], abs=1e-6)
    assert losses["lisa"] == pytest.approx(losses["lora"], abs=1e-6)


@pytest.mark.usefixtures("cpu_ops")
def test_no_file_of_a_run_has_a_secret(folder, tmp_path):
    ds_config = read_ds_config("zero2") | {"comet": {"enabled": False, "api_key": "secret-1"}}
    changes = {"deepspeed": json.dumps(ds_config), "hub_token": "secret-2"}
    changes |= {"model_init_kwargs": json.dumps({"token": "secret-3"}), "report_to": "tensorboard"}
    changes |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "eval_on_start": False}
    status, said = run_alone(flags_for(folder, tmp_path / "out", **changes), tmp_path / "said.txt")
    assert status == 0, said[-3000:]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"training_args.bin", "lisa_run.json", "lisa_memory.json", "report.html"} <= names
    assert any("tfevents" in name for name in names)
    for path in written:
        assert b"secret-" not in path.read_bytes(), path
    assert "secret-" not in said


@pytest.mark.usefixtures("cpu_ops")
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


def test_an_error_is_one_line_and_nothing_is_written(folder, tmp_path):
    flags = flags_for(folder, tmp_path / "out", dataset_name=tmp_path / "absent.jsonl")
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 2
    assert f"lisa-dist: --dataset_name {tmp_path / 'absent.jsonl'}: no such file" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_metric_that_no_evaluation_has_is_one_line(folder, tmp_path):
    flags = flags_for(folder, tmp_path / "out", metric_for_best_model="accuracy")
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 2
    assert "lisa-dist: --metric_for_best_model accuracy: no metric of an evaluation here; choose one of " in said
    assert "Traceback" not in said


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    run_args, _, training_args, model_args, lisa_config = parse_arguments(["--config", str(recipe)])
    assert run_args.method == "lisa"
    assert model_args.model_name_or_path
    assert lisa_config.lisa_activated_layers == "auto" or lisa_config.lisa_activated_layers >= 1
    assert Path(training_args.deepspeed).is_file()


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


@pytest.mark.usefixtures("cpu_ops")
def test_rows_are_tokenized_once_on_a_host(folder, tmp_path):
    shutil.copy(folder / "rows.jsonl", tmp_path)  # which no other test has had tokenized
    (first, its_files), (second, other_files) = run_ranks(count_tokenized, 2, str(folder), str(tmp_path))
    assert first > 0
    assert second == 0
    assert its_files == other_files
    assert its_files


@pytest.mark.usefixtures("cpu_ops")
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
@pytest.mark.usefixtures("cpu_ops")
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
        status, said = run_alone(flags, tmp_path / f"{recipe.stem}.txt")
        assert status == 0, said[-3000:]
        state = json.loads((tmp_path / recipe.stem / "trainer_state.json").read_text())
        assert state["global_step"] == 2
        memory = json.loads((tmp_path / recipe.stem / "lisa_memory.json").read_text())
        assert memory["measured"]["peak"] == pytest.approx(memory["planned"]["peak"], rel=0.05), recipe.stem


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "magic"], "--method magic: unknown; choose one of lisa, full, lora"),
        (["--method", "lora", "--lora_r", "0"], "--lora_r 0: the rank of an adapter is at least 1"),
        (["--dataset_name", ""], "--dataset_name is missing"),
        (["--eval_rows", "-1"], "--eval_rows -1"),
        (["--eval_rows", "3", "--eval_dataset_name", "x.jsonl"], "give one of them"),
        (
            ["--checkpointed_layers", "3", "--method", "full"],
            "--checkpointed_layers 3 with --method full: a number of layers is for --method lisa; give none or all",
        ),
        (
            ["--gpu_memory", "22GiB"],
            "--gpu_memory 22GiB: only --checkpointed_layers auto and",
        ),
        (["--loss", "nll"], "--loss nll: unknown; choose one of auto, logits, chunked, liger"),
        (["--deepspeed", "zero7"], "--deepspeed zero7: neither a file nor a shipped config"),
        (["--lisa_activated_layers", "-1"], "--lisa_activated_layers -1"),
        (["--lisa_activated_layers", "most"], "--lisa_activated_layers: invalid int value: 'most'"),
        (["--lisa_frozen_bits", "5"], "--lisa_frozen_bits 5: frozen layers have one of 16, 8, 4 bits"),
        (["--lisa_frozen_store", "/tmp"], "--lisa_frozen_store /tmp: frozen layers of 16 bits have no originals"),
        (["--method", "lora", "--lora_alpha", "0"], "--lora_alpha 0: adapters are scaled by it over the rank"),
        (["--method", "lora", "--lora_dropout", "1"], "--lora_dropout 1.0: a probability from 0 up to"),
        (["--method", "lora", "--lora_target_modules", "lm_head"], "--lora_target_modules lm_head: TRL computes the"),
        (["--global_batch_size", "12"], "--global_batch_size 12: must be a multiple of 8, which --per_device_train"),
        (
            ["--global_batch_size", "16", "--gradient_accumulation_steps", "4"],
            "--gradient_accumulation_steps 4: give one of them; on 1 ranks it is 2",
        ),
        (["--optim", "adamw"], "--optim adamw: unknown; choose lisa_adamw or one of adamw_torch,"),
        (["--use_peft", "True"], "--use_peft True"),
        (
            ["--model_name_or_path", "llama3.1-8b"],
            "a name that init and plan know; the model is meta-llama/Llama-3.1-8B",
        ),
        (["--base_model", "x"], "--base_model: no such flag; here it is --model_name_or_path: docs/coming_from.md."),
        (["--num_gpus", "2"], "--num_gpus: no such flag; here it is --gpus"),
        (["--lisa_layer", "3"], "--lisa_layer: no such flag; did you mean --lisa_"),
        (["--lisa_activated_layer", "3"], "did you mean --lisa_activated_layers?"),
        (["--lerning-rate", "3"], "--lerning-rate: no such flag; did you mean --learning_rate?"),
        (["--fsdp", "true"], "--fsdp true: training is sharded by DeepSpeed's ZeRO"),
        (["--xyzzy"], "--xyzzy: no such flag; --help_all lists them"),
        (["more.jsonl"], "more.jsonl: belongs to no flag"),
        (["--max_steps", "many"], "--max_steps: invalid int value: 'many'"),
        (["--dataset_weights", "1", "2"], "--dataset_weights 1 2: give one for each of the 1 sources"),
        (["--dataset_weights", "0"], "--dataset_weights 0 of rows.jsonl: must be above 0"),
        (
            ["--dataset_columns", "answer"],
            "--dataset_columns answer: give the format's name of a column",
        ),
        (["--long_examples", "chop"], "--long_examples chop: unknown"),
        (["--eval_rows", "1.5"], "--eval_rows 1.5: give a number of examples, or a fraction below 1"),
        (["--load_in_4bit", "True"], "--load_in_4bit True"),
        (["--config", "absent.yaml"], "--config absent.yaml: no such file"),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path, flags, said):
    with pytest.raises(ValueError, match="--") as error:
        parse_arguments(
            ["--model_name_or_path", "m", "--dataset_name", "rows.jsonl", "--output_dir", str(tmp_path / "out"), *flags]
        )
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_text_field": "body"}, "--dataset_text_field body: has no effect here; use --dataset_columns text="),
        ({"lisa_activated_layers": 7}, "--lisa_activated_layers 7: the model has 6 decoder layers"),
        ({"lisa_sampler": "weighted", "lisa_weights_file": "absent.json"}, "--lisa_weights_file absent.json"),
        ({"lisa_unit": "module", "lisa_budget": "1%"}, "--lisa_budget 1%: 1843 of 0.18 M parameters, and the smallest"),
        (
            {"lisa_unit": "module", "lisa_budget": "10%", "torch_compile": True},
            "--torch_compile True with --lisa_unit module: a layer has a graph for each set of its modules",
        ),
        ({"model_name_or_path": "no/such-model"}, "--model_name_or_path no/such-model: no such folder"),
        ({"deepspeed": "zero3_nvme"}, "--deepspeed zero3_offload"),
        ({"optim": "lomo"}, "--optim lomo: LISA runs AdamW"),
        ({"loss": "liger"}, "--loss liger: Liger's Triton kernels need a CUDA device; leave it out"),
        (
            {"loss": "logits", "label_smoothing_factor": 0.1},
            "--loss logits: --label_smoothing_factor 0.1 has a loss of",
        ),
        ({"lisa_master": "bf16_sr"}, "--lisa_master bf16_sr with --optim adamw_torch_fused: only --optim lisa_adamw"),
        (
            {"lisa_activated_layers": "auto"},
            "--lisa_activated_layers auto: there is no GPU to ask for its memory",
        ),
        ({"lisa_frozen_bits": 4, "bf16": True, "deepspeed": "zero3"}, "--lisa_frozen_bits 4 on ZeRO stage 3"),
        ({"lisa_frozen_bits": 8}, "--lisa_frozen_bits 8 with weights in fp32"),
        ({"lisa_frozen_bits": 4, "method": "full"}, "--lisa_frozen_bits 4 with --method full: it is for"),
        (
            {"lisa_frozen_bits": 4, "bf16": True, "torch_compile": True},
            "--torch_compile True with --lisa_frozen_bits 4",
        ),
        (
            {"lisa_frozen_bits": 4, "bf16": True, "lisa_frozen_store": "absent"},
            "--lisa_frozen_store absent: absent is no",
        ),
        ({"eval_frozen_bits": 8}, "--eval_frozen_bits 8: frozen layers are evaluated as they are held"),
        ({"lisa_master": "bf16_sr", "optim": "lisa_adamw"}, "--lisa_master bf16_sr with weights in fp32"),
        (
            {"method": "full", "optim": "lisa_adamw", "checkpointed_layers": "none"},
            "--optim lisa_adamw with --method full: it is for --method lisa; give another",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(folder, tmp_path, changes, said):
    config = parse_arguments(flags_for(folder, tmp_path / "out", **changes))
    with pytest.raises(ValueError, match="--") as error:
        run(config)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["--gpus", "0"], {}, "--gpus 0: give a number of GPUs"),
        (["--gpus=two"], {}, "--gpus two: give a number of GPUs"),
        (["--max_steps", "3", "--gpus"], {}, "--gpus : give a number of GPUs"),
        (["--gpus", "2"], {"RANK": "0"}, "--gpus 2: RANK is set, so a launcher has started this process already"),
    ],
)
def test_ranks_that_cannot_be_started(monkeypatch, words, variables, said):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--gpus") as error:
        launch_if_asked(words, "train", run_parser().check)
    assert said in str(error.value)
    assert launch_if_asked(["--max_steps", "3"], "train", run_parser().check) == ["--max_steps", "3"]


@pytest.mark.parametrize(
    ("visible", "words"),
    [(None, ["--num_gpus", "2"]), ("4,5", ["--include", "localhost:4,5"]), ("7, 3,1", ["--include", "localhost:7,3"])],
)
def test_ranks_are_on_the_gpus_that_are_visible(monkeypatch, capsys, visible, words):
    started = []

    def popen(command, env, **_):
        started.append((command, env))
        return SimpleNamespace(pid=0, wait=lambda: 256 - signal.SIGKILL)

    on_gpus(monkeypatch, visible)
    monkeypatch.setattr(launching.subprocess, "Popen", popen)
    monkeypatch.setattr(launching.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        launch_if_asked(["--gpus", "2"], "train", lambda rest: None)
    assert "lisa-dist: a rank was ended by signal 9 (Killed)" in capsys.readouterr().out
    ((command, environment),) = started
    assert command[3:5] == words
    assert "CUDA_VISIBLE_DEVICES" not in environment  # the launcher sets it for each rank


@pytest.mark.parametrize(
    ("visible", "said"),
    [
        (None, "--gpus 9: this host has 8 GPUs."),
        ("4,5", "--gpus 9: CUDA_VISIBLE_DEVICES=4,5 shows 2 GPUs; show more, or give --gpus 2."),
        (",".join(f"GPU-{n}" for n in range(9)), "the deepspeed launcher takes indices of GPUs alone; give those, or "),
    ],
)
def test_more_ranks_than_gpus_are_refused(monkeypatch, visible, said):
    on_gpus(monkeypatch, visible)
    with pytest.raises(ValueError, match="--gpus 9") as error:
        launch_if_asked(["--gpus", "9"], "train", lambda rest: None)
    assert said in str(error.value)


def on_gpus(monkeypatch, visible: str | None) -> None:
    """A host with eight GPUs."""
    accelerator = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 8)
    monkeypatch.setattr(launching, "get_accelerator", lambda: accelerator)
    monkeypatch.delenv("RANK", raising=False)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(("world_size", "steps"), [(1, 6), (2, 3), (6, 1)])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(world_size, steps):
    assert accumulation_steps(24, micro_batch_size=4, given=1, world_size=world_size) == steps


END = """
import atexit, threading, time
from lisa_dist.distributed.launching import end_process
print("begun", end=" ")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread", end=" "))).start()
atexit.register(lambda: print("at exit", end=" "))
end_process()
print("never")
"""


def test_a_finished_process_ends_well_with_all_that_was_to_be_done(tmp_path):
    (tmp_path / "end.py").write_text(END)
    ended = Alone([], tmp_path / "said.txt", tmp_path / "end.py")
    assert (ended.wait(), ended.said) == (0, "begun thread at exit ")


def test_many_tasks_without_ranks_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ValueError, match="SLURM_NTASKS is 4, but nothing says which of them"):
        parse_arguments(["--dataset_name", "rows.jsonl"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "sequence_len: 3\nmodel_name_or_path: m",
            "sequence_len: no such key; here it is max_length: docs/coming_from",
        ),
        ("lisa_layers: 3\nmodel_name_or_path: m", "lisa_layers: no such key; did you mean lisa_"),
        ("- 3", "must hold keys and values, such as learning_rate: 1.0e-5"),
        ("a: b: c", "is not YAML"),
        ("env: 3", "env must hold variables and their values"),
    ],
)
def test_a_recipe_that_is_no_use_is_refused(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="--config") as error:
        parse_arguments(["--config", str(path), "--dataset_name", "rows.jsonl"])
    assert said in str(error.value)
    with pytest.raises(ValueError, match="--config") as error:
        parse_arguments([f"--config={path}", "--dataset_name", "rows.jsonl"])


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_a_stopped_run_goes_on_to_the_weights_of_the_whole_one(folder, tmp_path):
    changes = {
        "max_steps": 50,  # enough for the signal to come before the end
        "save_strategy": "steps",
        "save_steps": 100,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    assert run_alone(flags_for(folder, tmp_path / "whole", **changes), tmp_path / "whole.txt")[0] == 0

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

    status, said = run_alone(
        flags_for(folder, out, **changes | {"resume_from_checkpoint": True}), tmp_path / "resumed.txt"
    )
    assert status == 0, said[-3000:]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    logs = [(path / "lisa_log.jsonl").read_text().splitlines() for path in (out, tmp_path / "whole")]
    periods = [[(line["period"], line["step"], line["layers"]) for line in map(json.loads, log)] for log in logs]
    assert periods[0] == periods[1]
    assert "chat_template.jinja" in {path.name for path in saved.iterdir()}


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_a_plain_model_begins_a_new_run_and_auto_begins_without_a_checkpoint(folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    still = {"learning_rate": 0, "max_steps": 1, "deepspeed": "zero3"}
    resume = {"resume_from_checkpoint": tmp_path / "other"}
    status, said = run_alone(flags_for(folder, tmp_path / "out", **still, **resume), tmp_path / "plain.txt")
    assert status == 0, said[-3000:]
    assert f"{tmp_path / 'other'} is no checkpoint of a LISA run: a new run begins from its weights." in said
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for one, two in zip(trained.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    flags = flags_for(folder, tmp_path / "new", resume_from_checkpoint="auto", max_steps=2)
    status, said = run_alone(flags, tmp_path / "auto.txt")
    assert status == 0, said[-3000:]
    assert f"no checkpoint in {tmp_path / 'new'} yet: the run begins at step 0." in said


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_a_real_model_learns_real_data(data_dir, tmp_path):
    """Two ranks, ZeRO-3, a real Llama of 1 MB on GSM8K: the held-out loss falls."""
    rows = (data_dir / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:500]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    real = {
        "model_name_or_path": data_dir / "models" / "stories260k-hf",
        "deepspeed": "zero3",
        "lisa_sampler": "reshuffle",
        "per_device_train_batch_size": 4,
        "max_length": 128,
        "max_steps": 20,
        "eval_steps": 20,
        "lisa_interval_steps": 5,
        "learning_rate": 3e-3,
    }
    on_two_ranks(flags_for(tmp_path, tmp_path / "out", **real), tmp_path)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    before, after = (entry["eval_loss"] for entry in history if "eval_loss" in entry)
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


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("chat/oasst_en_chat.jsonl", {}, "oasst_en_chat.jsonl: "),
        full("pubmedqa", {"max_length": 512}, "pubmedqa.jsonl: question_answer (question, answer), 1000 examples"),
    ],
)
def test_each_kind_of_real_data_trains(data_dir, tmp_path, name, changes, found):
    path = converted(data_dir, tmp_path) if name == "pubmedqa" else data_dir / name
    real = {
        "model_name_or_path": data_dir / "models" / "stories260k-hf",
        "dataset_name": path,
        "max_length": 128,
        "max_steps": 10,
        "eval_steps": 10,
        "lisa_interval_steps": 5,
        "learning_rate": 3e-3,
    }
    on_two_ranks(flags_for(tmp_path, tmp_path / "out", **real | changes), tmp_path)
    said = (tmp_path / "0.txt").read_text()
    assert found in said
    assert "of them with loss" in said
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    before, after = (entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert after < before
