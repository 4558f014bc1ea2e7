"""A slice of the fuzz: nothing that users give ends in a traceback; and the fuzz sees what does."""

import json
import re
import subprocess
import sys

import pytest
from ranks import PATIENCE
from runs import ROOT

FUZZ = ROOT / "tests" / "system" / "fuzz.py"
SCRIPT = """
import os, sys, time
sys.path.insert(0, {folder!r})
import fuzz
fuzz.set_up()


def seeded(draws, place, folder):
    from lisa_dist.errors import UserError
    end = draws.choice(("ok", "refused", "lines", "hangs", "bug"))
    print(end)
    if end == "refused":
        raise UserError("one line")
    if end == "lines":
        raise UserError("two\\nlines")
    if end == "hangs":
        os.mkfifo("pipe")
        open("pipe")
    if end == "bug":
        raise KeyError(end)


fuzz.KINDS["seeded"] = (seeded, 1.0)
sys.argv[1:] = ["--kinds", "seeded", "--cases", "20"]
fuzz.main()
"""


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=PATIENCE)


def table(said: str) -> dict[str, list[int]]:
    """The counts of each kind."""
    return {
        name: [int(one) for one in counts.split()] for name, counts in re.findall(r"^(\w+)((?: +\d+)+)$", said, re.M)
    }


@pytest.mark.full
def test_a_seeded_slice_ends_in_no_traceback():
    ended = run(str(FUZZ), "--cases", "100", "--seed", "1")
    counts = table(ended.stdout)
    assert ended.returncode == 0, ended.stdout[-6000:]
    cases, ok, refused, *bad = counts["all"]
    assert (cases, bad) == (ok + refused, [0, 0, 0])
    assert len(counts) > 10
    assert ok > 15
    assert refused > 60


@pytest.mark.full
def test_the_fuzz_sees_what_is_no_good(tmp_path):
    (tmp_path / "seeded.py").write_text(SCRIPT.format(folder=str(FUZZ.parent)))
    ended = run(str(tmp_path / "seeded.py"))
    assert ended.returncode == 1, ended.stderr[-3000:]
    counts = table(ended.stdout)
    assert counts["seeded"][0] == 20
    assert all(counts["seeded"]), json.dumps(counts)
    assert "KeyError: 'bug'" in ended.stdout
