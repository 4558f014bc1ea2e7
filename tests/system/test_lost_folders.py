"""The output folder is full or gone between two saves: one line ends the run, and a resume goes on."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import flags_for, run_alone, run_well

STEPS, HURT_AT = 8, 5  # saved at 3 and 6; a period begins at every second step

# A step in which the output folder is lost, by the last word of the command line.
SCRIPT = """
import sys
from lisa_dist.commands.train import main
from lisa_dist.train.sft_trainer import LisaTrainer

sys.path.insert(0, {here!r})
import test_lost_folders as tests

step, lose = LisaTrainer.training_step, getattr(tests, sys.argv.pop())


def losing(trainer, *args, **kwargs):
    if trainer.state.global_step == tests.HURT_AT:
        lose(trainer.args.output_dir)
    return step(trainer, *args, **kwargs)


LisaTrainer.training_step = losing
main()
"""


def fill(folder: str) -> None:
    """Not a byte is free."""
    with open(Path(folder).parent / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            return


def take_away(folder: str) -> None:
    os.rename(folder, f"{folder}-elsewhere")


def plant(folder: str) -> None:
    """Samples and norms cannot be written."""
    Path(folder, "lisa_answers.jsonl").unlink()
    Path(folder, "lisa_answers.jsonl").mkdir()
    Path(folder, "tmp-lisa_norms.csv").mkdir()


def give_back(folder: Path) -> None:
    """What was lost is there again."""
    (folder.parent / "filler").unlink(missing_ok=True)
    if Path(f"{folder}-elsewhere").exists():
        os.rename(f"{folder}-elsewhere", folder)


@pytest.fixture
def disk(tmp_path) -> Path:
    """A file system of its own."""
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def flags(folder: Path, out: Path) -> list[str]:
    changes = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "no"}
    return flags_for(folder, out, **changes | {"eval_on_start": False, "report_to": "tensorboard"})


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory, cpu_ops) -> Path:
    """The output folder of a run that nothing has happened to."""
    out = tmp_path_factory.mktemp("whole")
    run_well(flags(folder, out / "out"), out)
    return out / "out"


def computed(out: Path) -> dict:
    """What a run leaves that does not depend on time."""
    logs = {
        name: map(json.loads, (out / name).read_text().splitlines())
        for name in ("lisa_log.jsonl", "lisa_movement.jsonl")
    }
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {
        "weights": (out / "model.safetensors").read_bytes(),
        "periods": [(line["period"], line["step"], line["layers"]) for line in logs["lisa_log.jsonl"]],
        "movement": list(logs["lisa_movement.jsonl"]),
        "losses": [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry],
    }


@pytest.mark.full
@pytest.mark.parametrize("lose", [fill, take_away], ids=lambda lose: lose.__name__)
def test_a_run_whose_folder_is_lost_goes_on_from_its_last_checkpoint(folder, whole, disk, tmp_path, lose: Callable):
    (tmp_path / "losing.py").write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    out = disk / "out"
    status, said = run_alone([*flags(folder, out), lose.__name__], tmp_path / "said.txt", tmp_path / "losing.py")
    assert status == 2, said
    last = said.splitlines()[-1]
    assert last.startswith(f"lisa-dist: {out}"), said
    assert " could not be written (" in last
    assert "Traceback" not in said

    give_back(out)
    assert sorted(path.name for path in out.glob("*checkpoint-*")) == ["checkpoint-3"]
    run_well([*flags(folder, out), "--resume_from_checkpoint", "auto"], tmp_path)
    assert computed(out) == computed(whole)


def test_samples_and_norms_that_cannot_be_written_cost_no_model(folder, tmp_path):
    (tmp_path / "losing.py").write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    out, changes = tmp_path / "out", {"max_steps": 6, "eval_strategy": "no", "eval_on_start": False}
    words = flags_for(folder, out, **changes, sample_prompt="1 + 1?", layer_norms=1)
    status, said = run_alone([*words, "plant"], tmp_path / "said.txt", tmp_path / "losing.py")
    assert status == 0, said
    assert f"warning: {out}/lisa_answers.jsonl could not be written (" in said
    assert "warning: norms could not be written (" in said
    assert (out / "model.safetensors").is_file()


def test_the_model_is_saved_before_samples_and_norms(folder, tmp_path):
    """On a full disk they would take its place."""
    out, changes = tmp_path / "out", {"max_steps": 2, "eval_strategy": "no", "eval_on_start": False}
    run_well(flags_for(folder, out, **changes, sample_prompt="1 + 1?", layer_norms=1), tmp_path)
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert written["model.safetensors"] < min(written["lisa_answers.jsonl"], written["lisa_norms.csv"])
