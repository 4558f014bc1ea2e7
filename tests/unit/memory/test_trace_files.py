"""A trace is read from its file where all that it depends on is the same, and is made anew where anything is not."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

from lisa_dist.files import CACHE, cache_folder
from lisa_dist.memory import trace_files
from lisa_dist.memory.trace import FakeRun, FakeRuns, PlanError
from lisa_dist.memory.workload import CHUNKED, LOGITS, Trained, Workload

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=9)
WORKLOAD = Workload(16, loss=LOGITS)
PERIOD = Trained((0, 1), ("embed", "head", "rest"))


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


AutoModelForCausalLM.register(OwnConfig, OwnModel)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path))
    return tmp_path / "traces"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder with the trace of the defaults."""
    place = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(place))
        trace_of()
    return place / "traces"


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


def found_by(run: FakeRun, period: Trained | None = PERIOD, reduces_rows: bool = False) -> dict:
    """A trace with parameters by name."""
    names = {id(parameter): name for name, parameter in run._run.named_parameters()}
    return run.trace(run.groups(period, reduces_rows=reduces_rows)).to_dict(names)


def trace_of(config=LLAMA, workload=WORKLOAD, period=PERIOD, reduces_rows=False, lora_rank=0, layers_attribute=None):
    """The same by a new fake run, and whether a step has run for it."""
    run, calls = FakeRun(config, workload, lora_rank, layers_attribute, on_disk=True), []
    run.model.register_forward_hook(lambda *_: calls.append(None))
    return found_by(run, period, reduces_rows), bool(calls)


@pytest.mark.parametrize("reduces_rows", [False, True])
@pytest.mark.parametrize("loss", [LOGITS, CHUNKED])
def test_the_second_trace_is_read(folder, loss, reduces_rows):
    of = {"workload": replace(WORKLOAD, loss=loss), "reduces_rows": reduces_rows}
    first, ran = trace_of(**of)
    assert ran
    assert len(files(folder)) == 1
    assert first["arrivals"]
    assert trace_of(**of) == (first, False)
    assert len(files(folder)) == 1


def test_a_trace_after_one_that_was_read_is_that_after_one_that_was_made(monkeypatch):
    """What is read leaves the model without its loss and its checkpoints."""

    def with_more_checkpoints() -> dict:
        run = FakeRun(LLAMA, WORKLOAD, on_disk=True)
        found_by(run)
        return found_by(run.with_workload(replace(run.workload, checkpointed_layers=4)))

    trace_of()
    after_one_that_was_read = with_more_checkpoints()
    monkeypatch.setenv(CACHE, "")
    assert with_more_checkpoints() == after_one_that_was_read


@pytest.mark.parametrize(
    "change",
    [
        {"config": LlamaConfig(**SIZES | {"intermediate_size": 64}, num_hidden_layers=9)},
        {"config": LlamaConfig(**SIZES, num_hidden_layers=10)},
        {"workload": replace(WORKLOAD, seq_length=17)},
        {"workload": replace(WORKLOAD, checkpointed_layers=2)},
        {"workload": replace(WORKLOAD, dtype=torch.float32)},
        {"workload": replace(WORKLOAD, loss=CHUNKED)},
        {"workload": replace(WORKLOAD, padded=True)},
        {"workload": replace(WORKLOAD, attention="eager")},
        {"workload": replace(WORKLOAD, micro_batch_size=2)},
        {"workload": replace(WORKLOAD, triton=True)},
        {"workload": replace(WORKLOAD, by_module=True)},
        {"layers_attribute": "model.layers"},
        {"workload": replace(WORKLOAD, frozen_bits=8)},
        {"period": Trained((0, 2), ("embed", "head", "rest"))},
        {"period": Trained((0, 1), ("head", "rest"))},
        {"reduces_rows": True},
        {"period": None, "lora_rank": 2},
        {"period": None, "lora_rank": 4},
    ],
)
def test_what_a_trace_depends_on_makes_another(folder, kept, change):
    shutil.copytree(kept, folder)
    if "lora_rank" in change:
        trace_of(**change | {"lora_rank": change["lora_rank"] + 1})
    before = len(files(folder))
    assert trace_of(**change)[1]
    assert len(files(folder)) == before + 1


def test_how_experts_and_attention_are_computed_makes_another():
    """It is not in config.json."""
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, num_hidden_layers=2)
    found = []
    for experts in ("grouped_mm", "batched_mm"):
        config._experts_implementation = experts
        found.append(trace_of(config, period=Trained((0,), ("head",))))
    assert found[1][1]
    assert found[0][0]["activations"] != found[1][0]["activations"]
    try:
        torch.backends.cuda.enable_flash_sdp(False)
        assert trace_of(config, period=Trained((0,), ("head",)))[1]
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_other_code_makes_another(folder, kept, monkeypatch, tmp_path):
    shutil.copytree(kept, folder)
    assert not trace_of()[1], "nothing is another"
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(trace_files, "__file__", str(tmp_path / "memory" / "trace_files.py"))
    found = []
    for number, text in enumerate(("a = 1", "a = 2", "a = 2")):
        (tmp_path / "other.py").write_text(text)
        if number == 2:
            monkeypatch.setattr(trace_files, "version", lambda name: f"9.9 of {name}")
        found.append(trace_files._code())
    assert len(set(map(str, found))) == 3
    monkeypatch.setattr(trace_files, "_CODE", found[0])
    assert trace_of()[1]
    assert len(files(folder)) == 2


def test_a_config_that_is_no_json_is_described():
    config = LlamaConfig(**SIZES, num_hidden_layers=9)
    config.own = {1: {2, 3}, "four": torch.float32}
    assert trace_of(config)[1]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"now": 3, "checksum": "x"}', None])
def test_a_damaged_file_is_written_anew(folder, kept, content):
    shutil.copytree(kept, folder)
    (path,) = files(folder)
    whole = path.read_text()
    path.write_text(whole.replace('"now": ', '"now": 1') if content is None else content)
    assert trace_of()[1]
    assert path.read_text() == whole
    assert not trace_of()[1]


def test_without_a_place_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file"), ""):
        monkeypatch.setenv(CACHE, place)
        assert trace_of()[1]
        assert trace_of()[1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("set_to", "folder"),
    [
        ({CACHE: "~/own"}, "/home/someone/own"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/lisa_dist"),
        ({}, "/home/someone/.cache/lisa_dist"),
        ({CACHE: "", "XDG_CACHE_HOME": "/caches"}, None),
    ],
)
def test_the_folder_is_the_users_cache(monkeypatch, set_to, folder):
    for name in (CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/someone"} | set_to).items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == (folder and Path(folder))


def test_a_user_without_a_home_has_no_folder(monkeypatch):
    for name in (CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_folder() is None


def test_of_models_that_are_not_of_a_release_of_transformers_nothing_is_kept(folder, monkeypatch):
    config = OwnConfig(**SIZES, num_hidden_layers=9)
    assert trace_of(config)[1]
    assert trace_of(config)[1]
    monkeypatch.setattr(trace_files.transformers, "__version__", "9.9.0.dev0")
    assert trace_of()[1]
    assert not files(folder)


def test_traces_that_are_not_of_plans_are_not_kept(folder):
    found_by(FakeRun(LLAMA, WORKLOAD))
    assert not files(folder)
    found_by(FakeRuns(LLAMA).of(WORKLOAD))
    assert files(folder)


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
