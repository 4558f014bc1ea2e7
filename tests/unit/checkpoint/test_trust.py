"""A checkpoint from elsewhere, or a link planted in a folder, has nothing read or written outside, and runs no code."""

import json
import os
import pickle
import random

import numpy
import pytest
import torch
from models import tiny_llama
from safetensors.torch import save_file

from lisa_dist.checkpoint.export import export_checkpoint
from lisa_dist.checkpoint.folders import STATE_NAME, make_staging, put_in_place, remove_leftovers, rotate_checkpoints
from lisa_dist.checkpoint.resume import check_pickles
from lisa_dist.checkpoint.weights import weight_files
from lisa_dist.distributed.collectives import describe_files
from lisa_dist.errors import UserError
from lisa_dist.files import describe_file, replacing, write_json

INDEX = "model.safetensors.index.json"
STATE = {"format": 1, "world_size": 1, "saved_at": 0.0, "lisa": {"config": {}}, "versions": {"lisa_dist": "0"}}


@pytest.fixture
def folder(tmp_path):
    """What an export reads of a checkpoint, and a file outside."""
    folder = tmp_path / "checkpoint-2"
    tiny_llama().save_pretrained(folder)
    save_file({"x": torch.zeros(1)}, folder / "lisa_optimizer-00000-of-00001.safetensors")
    (tmp_path / "outside.txt").write_text("of somebody else")
    return folder


def list_files(folder, left_out=(), **more) -> None:
    files = {name: about for name, about in describe_files(folder).items() if name not in (STATE_NAME, *left_out)}
    write_json(folder / STATE_NAME, STATE | {"files": files | more})


def check_refused(folder, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        export_checkpoint(folder, folder.parent / "elsewhere" / "out")
    assert "\n" not in str(error.value)
    assert "use a copy from whoever wrote it" in str(error.value)
    assert not (folder.parent / "elsewhere").exists()


@pytest.mark.parametrize("name", ["../outside.txt", "tokenizer/../../outside.txt", "{outside}"])
def test_names_that_lead_out_are_refused(folder, name):
    outside = folder.parent / "outside.txt"
    name = name.format(outside=outside)
    list_files(folder, **{name: describe_file(outside)})
    check_refused(folder, f"{STATE_NAME} names the file '{name}'")


def test_links_that_lead_out_are_refused(folder):
    (folder / "README.md").symlink_to(folder.parent / "outside.txt")
    list_files(folder)
    check_refused(folder, r"README\.md is a link to .*outside\.txt")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("config.json")
    list_files(folder)
    export_checkpoint(folder, folder.parent / "out")


def test_weights_outside_are_refused(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    list_files(folder)
    check_refused(folder, f"{INDEX} names the file '../model.safetensors'")
    with pytest.raises(UserError, match="names the file"):  # of a folder with a model and nothing of a LISA run
        weight_files(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "lisa_optimizer-00000-of-00001.safetensors", INDEX, "rng_state_1.pth"]
)
def test_every_file_that_is_read_has_a_sum(folder, name):
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    list_files(folder, left_out=[name])
    check_refused(folder, f"{STATE_NAME} does not list {name}")


def test_a_checkpoint_without_sums_is_refused(folder):
    write_json(folder / STATE_NAME, STATE | {"files": {}})
    check_refused(folder, f"{STATE_NAME} does not list")
    write_json(folder / STATE_NAME, STATE)
    with pytest.raises(UserError, match=r"is damaged, or not of a LISA run: files is not an object"):
        export_checkpoint(folder, folder.parent / "out")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code_has_run",)


def test_pickles_that_could_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(states, tmp_path / "rng_state_0.pth")
    torch.save({"last_epoch": 3}, tmp_path / "scheduler.pt")
    names = ["rng_state_0.pth", "scheduler.pt", "training_args.bin"]
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(RunsCode()))
    check_pickles(tmp_path, names)  # without the last, which no resume loads
    (tmp_path / "scheduler.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"scheduler\.pt is not loaded \(EOFError\)"):
        check_pickles(tmp_path, names)
    torch.save(RunsCode(), tmp_path / "rng_state_0.pth")
    with pytest.raises(UserError, match=r"rng_state_0\.pth is not loaded \(UnpicklingError\)") as error:
        check_pickles(tmp_path, names[:1])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "code_has_run").exists()


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "outside.txt").write_text("of somebody else")
    for planted in ("tmp-report.html", "report.html"):
        (tmp_path / planted).symlink_to(tmp_path / "outside.txt")
        with replacing(tmp_path / "report.html") as path:
            path.write_text("ours")
        assert (tmp_path / "outside.txt").read_text() == "of somebody else", planted
        assert (tmp_path / "report.html").read_text() == "ours"
        assert not (tmp_path / "report.html").is_symlink()
        (tmp_path / "report.html").unlink()


def test_links_in_the_places_of_checkpoints_are_replaced(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept.txt").touch()
    out = tmp_path / "out"
    out.mkdir()
    staging = make_staging(out / "checkpoint-2", writes=True)
    staging.rmdir()
    for name in (staging.name, "checkpoint-2", "tmp-checkpoint-3", "tmp-replaced-checkpoint-4"):
        (out / name).symlink_to(tmp_path / "outside")
    make_staging(out / "checkpoint-2", writes=True)
    (staging / STATE_NAME).touch()
    put_in_place(staging, out / "checkpoint-2")
    remove_leftovers(out)
    assert [path.name for path in out.iterdir()] == ["checkpoint-2"]
    assert not (out / "checkpoint-2").is_symlink()
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["kept.txt"]


def test_rotation_leaves_alone_what_is_no_checkpoint_of_ours(tmp_path):
    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-\u0665", "checkpoint-8", "outside"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-2":
            (tmp_path / name / STATE_NAME).touch()
    (tmp_path / "checkpoint-4").symlink_to(tmp_path / "outside")
    rotate_checkpoints(tmp_path / "checkpoint-8", 1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-2", "checkpoint-4", "checkpoint-\u0665", "checkpoint-8", "outside"}
