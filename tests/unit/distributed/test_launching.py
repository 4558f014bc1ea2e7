"""Ranks that `lisa-dist` starts by itself: how many, on which GPUs, and how they end."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from runs import ROOT, Alone

from lisa_dist.distributed import launching
from lisa_dist.distributed.launching import launch_if_asked
from lisa_dist.run.arguments import run_parser

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


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["--gpus", "0"], {}, "--gpus 0: give a number of GPUs"),
        (["--gpus=two"], {}, "--gpus two: give a number of GPUs"),
        (["--max_steps", "3", "--gpus"], {}, "--gpus : give a number of GPUs"),
        (["--gpus", "2"], {"RANK": "0"}, "--gpus 2: RANK is set, so a launcher has started this process already"),
        (["--gpus", "2", "--max_step", "4"], {}, "--max_step: no such flag; did you mean --max_steps?"),
        (["--gpus", "9"], {}, "--gpus 9: this host has 8 GPUs."),
        (
            ["--gpus", "9"],
            {"CUDA_VISIBLE_DEVICES": "4,5"},
            "--gpus 9: CUDA_VISIBLE_DEVICES=4,5 shows 2 GPUs; show more, or give --gpus 2.",
        ),
        (
            ["--gpus", "2"],
            {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"},
            "the deepspeed launcher takes indices of GPUs alone; give those, or ",
        ),
    ],
)
def test_ranks_that_cannot_be_started(monkeypatch, words, variables, said):
    on_gpus(monkeypatch, None)
    monkeypatch.setattr(launching.subprocess, "Popen", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--") as error:
        launch_if_asked(words, "train", run_parser().check)
    assert said in str(error.value)
    assert launch_if_asked(["--max_steps", "3"], "train", run_parser().check) == ["--max_steps", "3"]


@pytest.mark.parametrize(
    ("visible", "verb", "words"),
    [
        (None, "train", ["--num_gpus", "2"]),
        ("4,5", "eval", ["--include", "localhost:4,5"]),
        ("7, 3,1", "train", ["--include", "localhost:7,3"]),
    ],
)
def test_ranks_are_on_the_gpus_that_are_visible(monkeypatch, capsys, visible, verb, words):
    started = []

    def popen(command, env, **_):
        started.append((command, env))
        return SimpleNamespace(pid=0, wait=lambda: 256 - signal.SIGKILL)

    on_gpus(monkeypatch, visible)
    monkeypatch.setattr(launching.subprocess, "Popen", popen)
    monkeypatch.setattr(launching.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        launch_if_asked(["model", "--gpus", "2"], verb, lambda rest: None)
    assert "lisa-dist: a rank was ended by signal 9 (Killed)" in capsys.readouterr().out
    ((command, environment),) = started
    assert command[:5] == [sys.executable, "-m", "deepspeed.launcher.runner", *words]
    assert command[-3:] == ["lisa_dist.cli", verb, "model"]
    assert "CUDA_VISIBLE_DEVICES" not in environment  # the launcher sets it for each rank


def on_gpus(monkeypatch, visible: str | None) -> None:
    """A host with eight GPUs."""
    accelerator = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 8)
    monkeypatch.setattr(launching, "get_accelerator", lambda: accelerator)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


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


def test_ctrl_c_reaches_the_ranks_as_a_sigterm_that_they_know(monkeypatch, tmp_path, capsys):
    sent, interrupted = [], tmp_path / "interrupted"
    rank = SimpleNamespace(cmdline=lambda: ["python", *launching._RANK], send_signal=sent.append)
    monkeypatch.setattr(launching.psutil, "Process", lambda _: SimpleNamespace(children=lambda recursive: [rank]))
    launching._pass_on(0, signal.SIGUSR1, interrupted)
    assert capsys.readouterr().out == ""
    assert not interrupted.exists()
    launching._pass_on(0, signal.SIGINT, interrupted)
    assert sent == [signal.SIGUSR1, signal.SIGTERM]
    assert interrupted.exists()
    assert "Ctrl-C: passed on to the ranks; a rank that trains saves" in capsys.readouterr().out


@pytest.mark.parametrize("script", sorted((ROOT / "launch" / "slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_scripts_of_slurm_that_are_run_by_bash_say_how_to_submit_them(script):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    run = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert run.stderr.endswith("SLURM_JOB_ID: is not set, so this is not a SLURM job. Submit this file with sbatch\n")
