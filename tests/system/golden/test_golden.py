"""The golden comparison finds one changed line; and a slice of it, against the last release or the parent commit."""

import copy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from compare import ROOT, Outcome, checkout, compare, compare_refusals, default_base, first_difference
from golden_cases import CASES, SLICE

STEP = {"sampled blocks": [0, 1, 4], "loss": ["0x1.4p+2"], "weights": "ab", "states": "cd"}
SAVED = {"names of files": ["config.json"], "model.safetensors": "ef", "setting a": 1}
RANK = {"steps": [STEP, dict(STEP)], "checkpoint": SAVED}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (["steps", 1, "loss"], ["0x1.5p+2"], "step 8, loss of rank 1: ['0x1.4p+2'] and ['0x1.5p+2']"),
        (["steps", 0, "sampled blocks"], [0, 1, 3], "step 7, sampled blocks of rank 1: [0, 1, 4] and [0, 1, 3]"),
        (["steps", 0, "weights"], "ac", "step 7, weights of rank 1"),
        (["steps", 1, "states"], "ac", "step 8, states of rank 1"),
        (["steps"], [STEP], "step 8, which not all have taken"),
        (["checkpoint", "model.safetensors"], "eg", "the checkpoint, model.safetensors, by rank 1"),
        (["checkpoint", "more.json"], "eg", "the checkpoint, more.json, by rank 1: None and eg"),
        (["checkpoint", "setting a"], 2, "the checkpoint, setting a, by rank 1: 1 and 2"),
        (["checkpoint", "field b"], 2, None),
        (["checkpoint", "setting b"], 2, None),  # which releases have more of, or fewer
    ],
)
def test_the_first_difference_is_named(path, value, expected):
    old = [RANK, copy.deepcopy(RANK)]
    assert first_difference(old, copy.deepcopy(old), 7) is None
    new = copy.deepcopy(old)
    place = new[1]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert first_difference(old, new, 7) == expected


@pytest.mark.parametrize(
    ("now", "equal", "messages"),
    [
        ([2, "--flag 0: too few."], True, {}),
        ([2, "--flag 0: at least 1."], True, {"it": ("--flag 0: too few.", "--flag 0: at least 1.")}),
        ([1, "--flag 0: too few."], False, {}),
        ([0, ""], False, {}),
    ],
)
def test_a_refusal_may_change_its_words_and_not_its_status(now, equal, messages):
    old, new = (SimpleNamespace(ask=lambda *_, a=answer: {"it": a}) for answer in ([2, "--flag 0: too few."], now))
    outcome = Outcome()
    compare_refusals(old, new, False, outcome, print)
    assert (outcome.equal, outcome.messages, outcome.refusals) == (equal, messages, 1)


@pytest.fixture
def changed_tree(tmp_path) -> Path:
    """The working tree, but for the last digits of AdamW's epsilon."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "build")
    )
    (path,) = (path for path in tree.glob("lisa_dist/**/*.py") if "\ndef build_optimizer(" in path.read_text())
    text = path.read_text()
    path.write_text(text.replace("eps: float = 1e-8", "eps: float = 1.01e-8"))
    assert path.read_text() != text
    return tree


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_one_changed_line_is_found(changed_tree):
    """And a case that one of them cannot run, without an end to the comparison."""
    broken = CASES[0] | {"name": "broken", "optim": "paged_adamw_8bit"}
    outcome = compare(changed_tree, ROOT, [broken, CASES[0]], [], few_refusals=True)
    assert outcome.differing.keys() == {"broken", CASES[0]["name"]}
    assert "BASE failed: " in outcome.differing["broken"]
    assert "optim paged_adamw_8bit" in outcome.differing["broken"]
    assert outcome.differing[CASES[0]["name"]] == "step 0, weights of rank 0"
    assert outcome.refusals == 3
    assert outcome.messages == {}


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_a_slice_equals_the_last_release_or_the_parent_commit():
    try:
        base = default_base()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"no history of git to compare with: {getattr(error, 'stderr', error)}")
    with checkout(base) as tree:
        outcome = compare(tree, ROOT, SLICE, SLICE[:1], few_refusals=True)
    assert outcome.equal, outcome.differing
    assert outcome.cases == len(SLICE)
