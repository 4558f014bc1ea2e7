"""A trace is read from its file where all that it depends on is the same, and is made anew where anything is not."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lisa_dist.files import CACHE, cache_folder
from lisa_dist.memory import trace_files
from lisa_dist.memory.trace import FakeRun, FakeRuns, PlanError
from lisa_dist.memory.workload import CHUNKED, LOGITS, OWN, Lora, Trained, Workload

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=9)
WORKLOAD = Workload(16, loss=LOGITS)
PERIOD = Trained((0, 1), ("embed", "head", "rest"))


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


AutoModelForCausalLM.register(OwnConfig, OwnModel)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A place with the trace of the defaults."""
    place = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(place))
        assert trace_of()[1]
    return place


@pytest.fixture(autouse=True)
def folder(kept, tmp_path, monkeypatch) -> Path:
    shutil.copytree(kept, tmp_path / "cache")
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "traces"


def found_by(run: FakeRun, period: Trained | None = PERIOD, reduces_rows: bool = False) -> dict:
    """A trace with parameters by name."""
    names = {id(parameter): name for name, parameter in run._run.named_parameters()}
    return run.trace(run.groups(period, reduces_rows=reduces_rows)).to_dict(names)


def trace_of(config=LLAMA, workload=WORKLOAD, period=PERIOD, reduces_rows=False, lora_rank=0, layers_attribute=None):
    """The same by a new fake run, and whether a step has run for it."""
    run, calls = FakeRun(config, workload, Lora(lora_rank) if lora_rank else None, layers_attribute, on_disk=True), []
    run.model.register_forward_hook(lambda *_: calls.append(None))
    return found_by(run, period, reduces_rows), bool(calls)


CHANGES = [
    {"config": LlamaConfig(**SIZES | {"intermediate_size": 64}, num_hidden_layers=9)},
    {"config": LlamaConfig(**SIZES, num_hidden_layers=10)},
    {"config": LlamaConfig(**SIZES, num_hidden_layers=9, _own={1: {2, 3}, "four": torch.float32})},  # of no config.json
    *({"workload": replace(WORKLOAD, **change)} for change in (
        {"seq_length": 17}, {"checkpointed_layers": 2}, {"dtype": torch.float32}, {"loss": CHUNKED}, {"padded": True},
        {"attention": "eager"}, {"micro_batch_size": 2}, {"triton": True}, {"by_module": True}, {"frozen_bits": 8},
        {"frozen_bits": "fp8"}, {"streams": True},
    )),
    {"layers_attribute": "model.layers"},
    {"period": Trained((0, 2), ("embed", "head", "rest"))},
    {"period": Trained((0, 1), ("head", "rest"))},
    {"reduces_rows": True},
    {"period": None, "lora_rank": 2},
    {"period": None, "lora_rank": 4},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_trace_depends_on_makes_another_that_is_read_again(folder, change):
    if "lora_rank" in change:
        trace_of(**change | {"lora_rank": change["lora_rank"] + 1})
    before = len(list(folder.iterdir()))
    made, ran = trace_of(**change)
    assert ran
    assert made["arrivals"]
    assert trace_of(**change) == (made, False)
    assert len(list(folder.iterdir())) == before + 1


def test_a_trace_after_one_that_was_read_is_that_after_one_that_was_made(monkeypatch):
    """What is read leaves the model without its loss and its checkpoints."""

    def with_more_checkpoints() -> dict:
        run = FakeRun(LLAMA, WORKLOAD, on_disk=True)
        found_by(run)
        return found_by(run.with_workload(replace(run.workload, checkpointed_layers=4)))

    after_one_that_was_read = with_more_checkpoints()
    monkeypatch.setenv(CACHE, "")
    assert with_more_checkpoints() == after_one_that_was_read


def test_kernels_that_attention_may_use_make_another():
    try:
        torch.backends.cuda.enable_flash_sdp(False)
        assert trace_of()[1]
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_other_code_makes_another(monkeypatch, tmp_path):
    assert not trace_of()[1], "nothing is another"
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(trace_files, "__file__", str(tmp_path / "memory" / "trace_files.py"))
    for number, text in enumerate(("a = 1", "a = 2", "a = 2")):
        (tmp_path / "other.py").write_text(text)
        if number == 2:
            monkeypatch.setattr(trace_files, "version", lambda name: f"9.9 of {name}")
        trace_files._code.cache_clear()
        assert [trace_of()[1] for _ in range(2)] == [True, False]
    trace_files._code.cache_clear()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"now": 3, "checksum": "x"}', None])
def test_a_damaged_file_is_written_anew(folder, content):
    (path,) = folder.iterdir()
    whole = path.read_text()
    path.write_text(whole.replace('"now": ', '"now": 1') if content is None else content)
    assert [trace_of()[1] for _ in range(2)] == [True, False]
    assert path.read_text() == whole


def test_without_a_place_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file"), ""):
        monkeypatch.setenv(CACHE, place)
        assert [trace_of()[1] for _ in range(2)] == [True, True]
    assert (tmp_path / "file").read_text() == ""


def test_only_traces_of_plans_and_of_a_release_of_transformers_are_kept(folder, monkeypatch):
    workload = replace(WORKLOAD, loss=OWN)
    run = FakeRun(LLAMA, workload)
    run.trace(run.groups(PERIOD))
    assert [trace_of(OwnConfig(**SIZES, num_hidden_layers=9))[1] for _ in range(2)] == [True, True]
    with monkeypatch.context() as patched:
        patched.setattr("lisa_dist.memory.trace.transformers.__version__", "9.9.0.dev0")
        assert trace_of()[1]
    assert len(list(folder.iterdir())) == 1
    run = FakeRuns(LLAMA).of(workload)
    run.trace(run.groups(PERIOD))
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("set_to", "folder_of_user"),
    [
        ({CACHE: "~/own"}, "/home/someone/own"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/lisa_dist"),
        ({}, "/home/someone/.cache/lisa_dist"),
        ({CACHE: "", "XDG_CACHE_HOME": "/caches"}, None),
        ({"HOME": None}, None),
    ],
)
def test_the_folder_is_the_users_cache(monkeypatch, set_to, folder_of_user):
    for name in (CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/someone"} | set_to).items():
        if value is None:  # a user without a home
            monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == (folder_of_user and Path(folder_of_user))


def test_a_loss_that_could_not_be_set_is_set_by_the_next_trace(monkeypatch):
    run = FakeRun(LLAMA, replace(WORKLOAD, loss=CHUNKED))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "trl.trainer.utils", None)
        with pytest.raises(PlanError, match="LlamaConfig: this model cannot be planned"):
            found_by(run)
    assert found_by(run) == trace_of(workload=run.workload)[0]


@pytest.mark.full
def test_a_plan_by_kept_traces_needs_neither_trl_nor_what_it_imports(tmp_path):
    LLAMA.save_pretrained(tmp_path / "model")
    script = (
        "import sys; from lisa_dist.commands.plan import main; main(sys.argv[1:]); "
        "print([n for n in ('trl.trainer.utils', 'peft', 'bitsandbytes', 'datasets') if n in sys.modules])"
    )
    words = ["--model", str(tmp_path / "model"), "--seq_length", "16", "--deepspeed", "zero2", "--lisa_preset", "none"]
    first, second = (
        subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert "trl.trainer.utils" in first.splitlines()[-1]
    assert second.splitlines()[-1] == "[]"
    assert second.splitlines()[:-1] == first.splitlines()[:-1]
