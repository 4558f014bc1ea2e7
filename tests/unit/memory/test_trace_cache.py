"""A trace is read from its file where all that it depends on is the same, and is made anew where anything is not."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lisa_dist.memory import trace_cache
from lisa_dist.memory.trace import FakeRun
from lisa_dist.memory.workload import CHUNKED, LOGITS, Trained, Workload

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=6)
WORKLOAD = Workload(16, loss=LOGITS)
PERIOD = Trained((0, 3), ("embed", "head", "rest"))


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


AutoModelForCausalLM.register(OwnConfig, OwnModel)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(trace_cache.VARIABLE, str(tmp_path))
    return tmp_path / "traces"


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


def trace_of(config=LLAMA, workload=WORKLOAD, period=PERIOD, reduces_rows=False, lora_rank=0):
    """A trace by a new fake run, with parameters by name, and whether a step has run for it."""
    run = FakeRun(config, workload, lora_rank)
    calls = []
    run.model.register_forward_hook(lambda *_: calls.append(None))
    trace = run.trace(run.groups(period, reduces_rows=reduces_rows))
    names = {id(parameter): name for name, parameter in run._run.named_parameters()}
    return trace.to_dict(names), bool(calls)


@pytest.mark.parametrize("reduces_rows", [False, True])
@pytest.mark.parametrize("loss", [LOGITS, CHUNKED])
def test_the_second_trace_is_read(folder, loss, reduces_rows):
    of = {"workload": replace(WORKLOAD, loss=loss), "reduces_rows": reduces_rows}
    first, ran = trace_of(**of)
    assert ran
    assert len(files(folder)) == 1
    second, ran = trace_of(**of)
    assert not ran
    assert len(files(folder)) == 1
    assert second["arrivals"]
    assert json.dumps(second) == json.dumps(first)


def test_a_trace_after_one_that_was_read_is_that_after_one_that_was_made(monkeypatch):
    """What is read leaves the model without its loss and its checkpoints."""

    def with_more_checkpoints() -> str:
        run = FakeRun(LLAMA, WORKLOAD)
        run.trace(run.groups(PERIOD))
        names = {id(parameter): name for name, parameter in run._run.named_parameters()}
        other = run.checkpointing(4)
        return json.dumps(other.trace(other.groups(PERIOD)).to_dict(names))

    trace_of()
    after_one_that_was_read = with_more_checkpoints()
    monkeypatch.setenv(trace_cache.VARIABLE, "")
    assert with_more_checkpoints() == after_one_that_was_read


@pytest.mark.parametrize(
    "change",
    [
        {"config": LlamaConfig(**SIZES | {"intermediate_size": 64}, num_hidden_layers=6)},
        {"config": LlamaConfig(**SIZES, num_hidden_layers=7)},
        {"workload": replace(WORKLOAD, seq_length=17)},
        {"workload": replace(WORKLOAD, checkpointed_layers=2)},
        {"workload": replace(WORKLOAD, dtype=torch.float32)},
        {"workload": replace(WORKLOAD, loss=CHUNKED)},
        {"workload": replace(WORKLOAD, padded=True)},
        {"workload": replace(WORKLOAD, frozen_bits=8)},
        {"period": Trained((0, 4), ("embed", "head", "rest"))},
        {"period": Trained((0, 3), ("head", "rest"))},
        {"reduces_rows": True},
        {"period": None, "lora_rank": 2},
        {"period": None, "lora_rank": 4},
    ],
)
def test_what_a_trace_depends_on_makes_another(folder, change):
    trace_of()
    if "lora_rank" in change:
        trace_of(**change | {"lora_rank": change["lora_rank"] + 1})
    before = len(files(folder))
    _, ran = trace_of(**change)
    assert ran
    assert len(files(folder)) == before + 1


def test_other_code_makes_another(folder, monkeypatch):
    trace_of()
    monkeypatch.setattr(trace_cache, "_code", lambda: ("torch 0.1", "other"))
    assert trace_of()[1]
    assert len(files(folder)) == 2


def test_the_code_is_that_of_every_module_and_package(tmp_path, monkeypatch):
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(trace_cache, "__file__", str(tmp_path / "memory" / "trace_cache.py"))
    found = set()
    for number, text in enumerate(("a = 1", "a = 2", "a = 2")):
        (tmp_path / "other.py").write_text(text)
        if number == 2:
            monkeypatch.setattr(trace_cache, "version", lambda name: f"9.9 of {name}")
        found.add(trace_cache._code.__wrapped__())
    assert len(found) == 3


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"now": 3, "checksum": "x"}', None])
def test_a_damaged_file_is_written_anew(folder, content):
    whole, _ = trace_of()
    (path,) = files(folder)
    path.write_text(path.read_text().replace(str(whole["now"]), "17") if content is None else content)
    again, ran = trace_of()
    assert ran
    assert json.dumps(again) == json.dumps(whole)
    assert not trace_of()[1]


def test_without_a_place_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(trace_cache.VARIABLE, str(tmp_path / "file"))
    assert trace_of()[1]
    assert trace_of()[1]
    monkeypatch.setenv(trace_cache.VARIABLE, "")
    assert trace_of()[1]
    assert trace_of()[1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_folder_is_the_users_cache(monkeypatch):
    monkeypatch.delenv(trace_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert trace_cache.cache_folder() == Path("/caches/lisa_dist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert trace_cache.cache_folder() == Path("/home/someone/.cache/lisa_dist")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert trace_cache.cache_folder() is None


def test_of_models_that_are_not_of_transformers_nothing_is_kept(folder):
    config = OwnConfig(**SIZES, num_hidden_layers=6)
    assert trace_of(config)[1]
    assert trace_of(config)[1]
    assert not files(folder)


def test_of_one_batch_of_a_run_nothing_is_kept(folder):
    assert trace_of(workload=replace(WORKLOAD, labels=5))[1]
    assert not files(folder)


def test_a_plan_by_kept_traces_needs_neither_trl_nor_what_it_imports(tmp_path):
    LLAMA.save_pretrained(tmp_path / "model")
    script = (
        "import sys; from lisa_dist.commands.plan import main; main(sys.argv[1:]); "
        "print([n for n in ('trl.trainer.utils', 'peft', 'bitsandbytes', 'datasets') if n in sys.modules])"
    )
    words = ["--model", str(tmp_path / "model"), "--seq_length", "16", "--deepspeed", "zero2"]
    first, second = (
        subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert "trl.trainer.utils" in first.splitlines()[-1]
    assert second.splitlines()[-1] == "[]"
    assert second.splitlines()[:-1] == first.splitlines()[:-1]
