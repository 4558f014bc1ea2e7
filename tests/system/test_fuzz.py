"""A slice of the fuzz: nothing that users give ends in a traceback; and the fuzz sees what does."""

import collections
import os
import re
import subprocess
import sys

import fuzz
import pytest
from ranks import PATIENCE

from lisa_dist.errors import UserError


@pytest.mark.full
def test_a_seeded_slice_ends_in_no_traceback():
    command = [sys.executable, fuzz.__file__, "--cases", "60", "--seed", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stdout[-6000:]
    counts = dict(re.findall(r"^(\w+)((?: +\d+)+)$", ended.stdout, re.M))
    cases, ok, refused, *bad = map(int, counts["all"].split())
    assert (cases, bad) == (ok + refused, [0, 0, 0])
    assert counts.keys() == fuzz.KINDS.keys() | {"all"}
    assert ok > 8
    assert refused > 30


def refuse(message: str) -> None:
    raise UserError(message)


def hang() -> None:
    os.mkfifo("pipe")
    open("pipe").close()


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (lambda: None, "ok"),
        (lambda: refuse("one line"), "refused"),
        (lambda: refuse("two\nlines"), "several lines"),
        (hang, "hangs"),
        (lambda: {}["bug"], "traceback"),
    ],
)
def test_the_fuzz_sees_what_is_no_good(monkeypatch, capsys, case, outcome):
    monkeypatch.setitem(fuzz.KINDS, "seeded", (lambda *_: case(), 1.0))
    monkeypatch.setattr(fuzz, "PATIENCE", 2)
    counts = fuzz.fuzz(1, 0, ("seeded",), None)
    assert counts == {"seeded": collections.Counter({outcome: 1})}
    assert fuzz.exit_status(counts) == (outcome not in ("ok", "refused"))
    assert ("KeyError: 'bug'" in capsys.readouterr().out) == (outcome == "traceback")
