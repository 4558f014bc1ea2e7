"""Checkpoints of full and LoRA runs: which one a resume takes, and how a model takes the place of another."""

import os

import pytest

from lisa_dist.checkpoint.folders import list_checkpoints, rotate_checkpoints
from lisa_dist.checkpoint.trainer_checkpoint import complete_checkpoint, find_trainer_checkpoint, move_model


def save(folder, step: int):
    staging = folder / f"tmp-checkpoint-{step}-0"
    (staging / "global_step").mkdir(parents=True)
    for name in ("trainer_state.json", "weights", "global_step/states"):
        (staging / name).write_text(f"{name} of step {step}")
    complete_checkpoint(staging, folder / f"checkpoint-{step}", writes=True)
    return folder / f"checkpoint-{step}"


def test_the_one_saved_last_is_found_and_not_that_of_the_highest_step(tmp_path):
    assert find_trainer_checkpoint(tmp_path) is None
    save(tmp_path, 8)
    last = save(tmp_path, 2)
    assert find_trainer_checkpoint(tmp_path) == last
    assert not list(tmp_path.glob("tmp-*"))


def damage(path):
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize(
    ("hurt", "said"),
    [
        (lambda folder: damage(folder / "weights"), "its bytes are not those that were written"),
        (lambda folder: os.truncate(folder / "global_step" / "states", 3), "is damaged: 3 bytes, not "),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: damage(folder / "lisa_checkpoint.json"), "lisa_checkpoint.json is damaged"),
        (
            lambda folder: [(folder / name).unlink() for name in ("lisa_checkpoint.json", "trainer_state.json")],
            "there is no trainer_state.json in it, which is written last",
        ),
    ],
)
def test_one_that_is_not_whole_is_passed_over(tmp_path, capsys, hurt, said):
    first, second = save(tmp_path, 2), save(tmp_path, 4)
    hurt(second)
    assert find_trainer_checkpoint(tmp_path) == first
    printed = capsys.readouterr().out
    assert printed.startswith(f"warning: {second} is passed over: ")
    assert said in printed


def test_checkpoints_of_other_programs_are_taken_by_their_age_and_stay(tmp_path):
    """They have no list of files."""
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").touch()
    assert find_trainer_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    save(tmp_path, 1)
    rotate_checkpoints(save(tmp_path, 2), 1)
    assert sorted(path.name for path in list_checkpoints(tmp_path)) == ["checkpoint-2", "checkpoint-9"]


def test_a_model_takes_the_place_of_another(tmp_path):
    """Shards of the earlier one do not stay, and PEFT's card does not come."""
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "own.txt"):
        (tmp_path / name).write_text("earlier")
    (tmp_path / "tmp-model" / "global_step").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "README.md"):
        (tmp_path / "tmp-model" / name).write_text("new")
    move_model(tmp_path / "tmp-model", tmp_path)
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert found == {"model.safetensors": "new", "config.json": "new", "own.txt": "earlier"}
    assert (tmp_path / "global_step").is_dir()
    assert not (tmp_path / "tmp-model").exists()
