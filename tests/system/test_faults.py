"""Ranks of a run are killed, stopped or told to end, in a save and in a period; each resume ends with the same bits."""

import os

import faults
import pytest

from lisa_dist.files import DamagedError

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("cpu_ops")]


def test_no_fault_loses_what_was_saved():
    """A slice of `python tests/system/faults.py`, at moments that are drawn."""
    came = faults.campaign(4, seed=3)
    assert came.total() == 4
    assert len(came) > 2


@pytest.mark.parametrize("lost", ["torn", "older", "other end"])
def test_the_campaign_sees_what_is_lost(monkeypatch, lost):
    """Each with one of its checks, of a run that nothing else has happened to."""
    start = faults.start

    def start_and_lose(folder, run, fault):
        ended = start(folder, run, None)
        if folder.name == "run":
            last = folder / f"checkpoint-{faults.STEPS}"
            weights = min(last.glob("model-*.safetensors"))
            if lost == "torn":
                os.truncate(weights, 100)
            elif lost == "other end":
                monkeypatch.setattr(faults, "digest", lambda _: "another")
            else:
                monkeypatch.setattr(faults, "whole_checkpoints", lambda _: [-1])
        return ended

    monkeypatch.setattr(faults, "start", start_and_lose)
    monkeypatch.setattr(faults, "draw", lambda _: None)
    said = {"torn": "is damaged", "older": "after 0", "other end": "another end than undisturbed"}[lost]
    with pytest.raises((AssertionError, DamagedError), match=said):
        faults.campaign(1, seed=0)
