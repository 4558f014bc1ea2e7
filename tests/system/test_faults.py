"""Ranks of a run are killed, stopped or told to end, in a save and in a period; each resume ends with the same bits."""

import json
import os
import signal
import time
from pathlib import Path

import faults
import pytest
from models import save_tiny_llama
from ranks import free_port
from runs import TRAIN, Alone, flags_for

from lisa_dist.files import DamagedError

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("cpu_ops")]

PATIENCE = 300  # seconds until a start has come to its fault, and from there to its end


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model and some rows."""
    folder = tmp_path_factory.mktemp("faults")
    save_tiny_llama(folder / "model")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(64)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def start(folder: Path, out: Path) -> list[Alone]:
    """Both ranks of a run, which goes on from what is in `out`."""
    changes = {"max_steps": 24, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "hang_timeout": 10}
    changes |= {"eval_rows": 0, "eval_on_start": False, "eval_strategy": "no", "resume_from_checkpoint": "auto"}
    meet = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    flags = flags_for(folder, out, **changes)
    return [Alone(flags, out.with_name(f"{r}.txt"), TRAIN, RANK=str(r), LOCAL_RANK=str(r), **meet) for r in range(2)]


def periods(out: Path) -> int:
    """How many are logged, each after its first step; one that a resume goes on with is logged already."""
    log = out / "lisa_log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(moment: str, out: Path, ranks: list[Alone]) -> None:
    """Until a save or another period has begun, as closely as a save of milliseconds needs."""
    deadline, before = time.monotonic() + PATIENCE, periods(out)
    while not (list(out.glob("tmp-checkpoint-*")) if moment == "save" else periods(out) > before + 1):
        assert time.monotonic() < deadline, ranks[0].said[-3000:]
        assert ranks[0].process.is_alive(), ranks[0].said[-3000:]
        time.sleep(0.001)


def ended(ranks: list[Alone]) -> list[int | None]:
    for rank in ranks:
        rank.process.join(timeout=PATIENCE)
    codes = [rank.process.exitcode for rank in ranks]
    for rank in ranks:
        rank.process.kill()
        rank.process.join()
    return codes


def test_every_start_after_a_fault_goes_on_to_the_weights_of_the_undisturbed_run(folder, tmp_path):
    (tmp_path / "whole").mkdir()
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    ranks = start(folder, whole)
    assert ended(ranks) == [0, 0], ranks[0].said[-3000:]

    faults = [("SIGSTOP", "period", 1), ("SIGTERM", "save", 1)]
    for name, moment, victim in faults:
        ranks = start(folder, out)
        wait_for(moment, out, ranks)
        os.kill(ranks[victim].process.pid, getattr(signal, name))
        other = ranks[1 - victim]
        other.process.join(timeout=PATIENCE)
        if name != "SIGTERM":
            ranks[victim].process.kill()
        codes = ended(ranks)
        if name == "SIGTERM":
            assert codes == [0, 0], other.said[-3000:]
            assert "SIGTERM: stopped after step" in ranks[0].said
        else:
            assert codes[1 - victim] == 1, f"{name} in a {moment}: {codes}\n{other.said[-3000:]}"
            assert f"rank(s) [{victim}]" in other.said
        assert not (out / "model.safetensors").exists(), "the run was struck before its end"
    ranks = start(folder, out)
    assert ended(ranks) == [0, 0], ranks[0].said[-3000:]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_no_fault_loses_what_was_saved():
    """A slice of `python tests/system/faults.py`, at moments that are drawn."""
    came = faults.campaign(8, seed=3)
    assert came.total() == 8
    assert len(came) > 4


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
