"""Ranks of a run are killed, stopped or told to end, in a save and in a period; each resume ends with the same bits."""

import os
import shutil
from pathlib import Path

import faults
import pytest

from lisa_dist.files import DamagedError

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("cpu_ops")]


@pytest.mark.parametrize("method", ["lisa", "full", "lora"])
def test_no_fault_loses_what_was_saved(method):
    """A slice of `python tests/system/faults.py`, at moments that are drawn."""
    came = faults.campaign(4, seed=3, method=method)
    assert came.total() == 4
    assert len(came) > 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("faults") / "finished"
    _, said = faults.start(folder, faults.RUNS[0], None)
    assert (folder / "done").exists(), said[-3000:]
    return folder


@pytest.mark.parametrize(
    ("lost", "said"),
    [("torn", "is damaged"), ("older", "after 0"), ("other end", "another end than undisturbed")],
)
def test_the_campaign_sees_what_is_lost(monkeypatch, finished, lost, said):
    """Each with one of its checks."""

    def start_and_lose(folder, run, fault):
        shutil.copytree(finished, folder)
        if folder.name == "run" and lost == "torn":
            os.truncate(min((folder / f"checkpoint-{faults.STEPS}").glob("model-*.safetensors")), 100)
        elif folder.name == "run" and lost == "other end":
            monkeypatch.setattr(faults, "digest", lambda _: "another")
        elif folder.name == "run":
            monkeypatch.setattr(faults, "whole_checkpoints", lambda _: [-1])
        return False, ""

    monkeypatch.setattr(faults, "start", start_and_lose)
    monkeypatch.setattr(faults, "draw", lambda *_: None)
    with pytest.raises((AssertionError, DamagedError), match=said):
        faults.campaign(1, seed=0)
