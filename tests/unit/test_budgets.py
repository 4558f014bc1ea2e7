"""The project stays inside its budgets, which only go down; what is granted beside them is for more features."""

import json
import subprocess

import pytest
from runs import ROOT
from size import BUDGETS, measure

NAME = BUDGETS.relative_to(ROOT)


def test_no_figure_is_above_its_budget():
    budgets, sizes = json.loads(BUDGETS.read_text(encoding="utf-8")), measure()
    assert sizes.keys() == budgets.keys()
    allowed = {name: one["at most"] + one.get("granted", 0) for name, one in budgets.items()}
    assert {name: size for name, size in sizes.items() if size > allowed[name]} == {}


def test_no_budget_was_raised():
    history = subprocess.run(
        ["git", "log", "--format=%H", "--", str(NAME)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if history.returncode or not history.stdout:
        pytest.skip("no history of the budgets: this is no clone with git")
    now = json.loads(BUDGETS.read_text(encoding="utf-8"))
    for commit in history.stdout.split():
        said = subprocess.run(
            ["git", "show", f"{commit}:{NAME}"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        before = json.loads(said)
        assert [name for name in now.keys() & before if now[name]["at most"] > before[name]["at most"]] == [], commit
