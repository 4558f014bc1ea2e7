"""Models, checkpoints and output folders that a run is given and cannot use: one line, before a model is loaded."""

import json
import os
import shutil
from pathlib import Path

import pytest
from runs import flags_for, refused, save_tiny_run

from lisa_dist.commands.given_files import look_for_files
from lisa_dist.files import describe_file, write_json
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.check_files import check_resume
from lisa_dist.run.processor import load_tokenizer
from lisa_dist.run.run import check_config, run
from lisa_dist.run_folder import write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_run(tmp_path_factory.mktemp("given"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file", "file is no folder; give another"),
        ("file/below", "nothing can be written there (Not a directory)"),
        ("link", "link is no folder"),
        ("x" * 300, "nothing can be written there (File name too long)"),
        ("/proc/self/x", "nothing can be written there"),
    ],
)
def test_output_folders_in_which_nothing_can_be_written(folder, tmp_path, name, said):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    config = parse_arguments(flags_for(folder, tmp_path / name))
    assert said in refused(check_config, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def without(*names: str):
    return lambda model: [path.unlink() for name in names for path in model.glob(name)]


def writing(name: str, content: str):
    return lambda model: (model / name).write_text(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("config.json"), "there is no config.json in it; give the folder of a model"),
        (without("tokenizer*"), "there is no tokenizer in it"),
        (without("*.safetensors"), "there are no weights in it, such as model.safetensors"),
        (writing("config.json", "{"), "config.json: cannot be read"),
        (writing("config.json", "[]"), "config.json: is damaged: it holds no object"),
        (writing("config.json", "{}"), "its config.json is of no model that can be trained"),
        (
            writing("config.json", '{"model_type": "llama", "num_attention_heads": -4}'),
            "its config.json is of no model that can be trained (num_attention_heads -4)",
        ),
        (writing("tokenizer_config.json", "{"), "tokenizer_config.json: cannot be read"),
        (writing("tokenizer.json", "{"), "its tokenizer cannot be loaded"),
        (writing("tokenizer.json", '{"added_tokens": "x"}'), "its tokenizer cannot be loaded"),
        (writing("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
        (writing("model.safetensors", ""), "model.safetensors is damaged"),
        (
            lambda model: os.truncate(model / "model.safetensors", 5000),
            "model.safetensors is damaged",
        ),
        (
            lambda model: (
                (model / "model.safetensors").unlink(),
                (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
            ),
            "model.safetensors.index.json names gone.safetensors, and there is no such file",
        ),
        (lambda model: (shutil.rmtree(model), model.touch()), "is a file; give the folder of a model"),
    ],
)
def test_a_model_that_is_not_whole(folder, tmp_path, damage, said):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    damage(model)
    config = parse_arguments(flags_for(folder, tmp_path / "out", model_name_or_path=model))

    def until_the_model():
        check_config(config)
        load_tokenizer(config)

    assert said in refused(until_the_model)


@pytest.mark.parametrize(
    ("flag", "place", "said"),
    [
        ("dataset_name", "pipe.jsonl", "pipe.jsonl: is neither a file nor a folder, but a pipe or a device"),
        ("chat_template_path", "pipe.jinja", "pipe.jinja: cannot be read (it is a folder, a pipe or a device"),
        ("config", "pipe.yaml", "pipe.yaml: cannot be read (it is a folder, a pipe or a device"),
        ("dataset_name", "x" * 300, "cannot be read (File name too long)"),
        ("lisa_weights_file", "pipe.json", "pipe.json: cannot be read (it is a folder, a pipe or a device"),
    ],
)
def test_what_is_no_file_is_not_opened(folder, tmp_path, flag, place, said):
    if place.startswith("pipe"):
        os.mkfifo(tmp_path / place)
    weighted = {"lisa_sampler": "weighted"} if flag == "lisa_weights_file" else {}
    words = flags_for(folder, tmp_path / "out", **{flag: tmp_path / place}, **weighted)
    assert said in refused(lambda: run(parse_arguments(words)))


def checkpoint(folder: Path, **changes: object) -> None:
    """The small files of a LISA checkpoint that a trainer saved."""
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "scheduler.pt"):
        (folder / name).write_text("{}")
    files = {path.name: describe_file(path) for path in folder.iterdir()}
    state = {"format": 1, "saved_at": 1.0, "world_size": 1, "lisa": {"config": {}}, "versions": {"lisa_dist": "0"}}
    state |= {"files": files} | changes
    write_json(folder / "lisa_state.json", {name: value for name, value in state.items() if value != "missing"})


@pytest.mark.parametrize(
    ("method", "wanted", "changes", "said"),
    [
        ("full", True, {}, "checkpoint-2 with --method full: it is a checkpoint of --method lisa, which resumes it"),
        ("lora", "CHECKPOINT", {}, "checkpoint-2 with --method lora: it is a checkpoint of --method lisa"),
        ("lisa", True, {"files": {}}, "there is no trainer_state.json in it: it was saved in a loop of one's own"),
        ("lisa", "CHECKPOINT", {"files": {}}, "there is no trainer_state.json in it: it was saved in a loop"),
        ("lisa", "CHECKPOINT", {"lisa": []}, "lisa_state.json is damaged, or not of a LISA run: lisa is not an object"),
        ("lisa", True, {"saved_at": "missing"}, "or not of a LISA run: saved_at is no number"),
        ("lisa", "auto", {"files": {"a": {"bytes": -1}}}, "or not of a LISA run: files.a.bytes is no whole number"),
        ("lisa", "absent", {}, "--resume_from_checkpoint absent: no such folder."),
        ("full", "absent", {}, "--resume_from_checkpoint absent with --method full: no such folder."),
    ],
)
def test_checkpoints_that_cannot_be_resumed(tmp_path, method, wanted, changes, said):
    checkpoint(tmp_path / "checkpoint-2", **changes)
    wanted = tmp_path / "checkpoint-2" if wanted == "CHECKPOINT" else wanted
    assert said in refused(check_resume, wanted, tmp_path, method)


def test_checkpoints_that_can_be_resumed(tmp_path):
    checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "lisa_state.json").write_text("{")  # which the trainer passes over
    for wanted in (True, "auto", tmp_path / "checkpoint-2"):
        check_resume(wanted, tmp_path, "lisa")
    (tmp_path / "latest").symlink_to(tmp_path / "checkpoint-2")
    check_resume(tmp_path / "latest", tmp_path, "lisa")
    check_resume("auto", tmp_path / "absent", "lisa")
    (tmp_path / "full" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "full" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    check_resume(True, tmp_path / "full", "full")
    (tmp_path / "full" / "lisa_run.json").write_text(json.dumps([]))
    assert "lisa_run.json: is damaged" in refused(check_resume, True, tmp_path / "full", "full")


@pytest.mark.parametrize("method", ["lisa", "full"])
def test_nothing_to_resume(tmp_path, method):
    assert "--resume_from_checkpoint true: there is no" in refused(check_resume, True, tmp_path, method)


@pytest.mark.parametrize("wanted", [None, False, "auto", "ELSEWHERE"])
def test_a_folder_with_a_model_or_checkpoints_is_not_written_over(tmp_path, wanted):
    """But where it is asked for, or where the run that begins has left logs alone."""
    out, elsewhere = tmp_path / "out", tmp_path / "other" / "checkpoint-1"
    checkpoint(elsewhere)
    wanted = elsewhere if wanted == "ELSEWHERE" else wanted
    out.mkdir()
    (out / "lisa_run.json").write_text("{}")
    (out / "training_args.bin").touch()
    check_resume(wanted, out, "lisa")
    (out / "model.safetensors").touch()
    said = f"--output_dir {out}: has model.safetensors, which this run would write over; give another folder, or "
    assert f"{said}--overwrite_output_dir true." in refused(check_resume, wanted, out, "lisa")
    (out / "model.safetensors").unlink()
    checkpoint(out / "checkpoint-2")
    given = {"output_dir": str(out), "resume_from_checkpoint": str(wanted).lower()}
    if wanted == "auto":
        check_resume(wanted, out, "lisa")
    else:
        said = f"--output_dir {out}: has checkpoint-2, which this run would write over; give another folder, --resume"
        assert said in refused(check_resume, wanted, out, "lisa")
        assert said in refused(look_for_files, "train", given), "also before torch is imported"
    check_resume(wanted, out, "lisa", overwrites=True)
    look_for_files("train", given | {"overwrite_output_dir": True})
    (out / "checkpoint-9").symlink_to(elsewhere)  # as to another disk
    check_resume(out / "checkpoint-9", out, "lisa")


def test_a_run_that_writes_over_another_one_leaves_none_of_its_checkpoints(tmp_path):
    checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-notes.txt").touch()
    (tmp_path / "checkpoint-4.tar").touch()
    write_run(tmp_path, {}, resumes=True)
    assert (tmp_path / "checkpoint-2").is_dir()
    write_run(tmp_path, {})
    assert {path.name for path in tmp_path.iterdir()} == {"lisa_run.json", "checkpoint-notes.txt", "checkpoint-4.tar"}
