"""What `make mutants` changes, and what it leaves alone."""

from pathlib import Path

import pytest

SOURCE = '''"""A module. 1 + 1"""

LIMIT = 3


def clip(values: list[int], folder, most: int = LIMIT) -> int:
    """Not this: 1 < 2."""
    assert len(values) < 9
    if not values:
        raise ValueError(f"{1 + 1} values")
    values.sort()
    total = values[0] + (values[-1]
                         if most > 2 else 7)
    return min(total, most) if total < most or folder / "é" else "é" * most
'''
CHANGES = {
    (3, "3", "4", False),
    (9, "not values", "(not (not values))", True),
    (9, "not values", "(values)", True),
    (11, "values.sort()", "pass", True),
    (12, "0", "1", True),
    (12, "1", "2", True),
    (13, "most > 2", "(most >= 2)", True),
    (13, "most > 2", "(not (most > 2))", True),
    (13, "2", "3", True),
    (13, "7", "8", True),
    (14, "total < most", "(total <= most)", True),
    (14, 'total < most or folder / "é"', "(total < most and folder / 'é')", True),
    (14, 'total < most or folder / "é"', "(not (total < most or folder / 'é'))", True),
    (14, '"é" * most', "('é' + most)", True),
}


def test_what_is_changed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    import mutants

    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    path, tree = tmp_path / "module.py", tmp_path / "tree"
    path.write_text(SOURCE, encoding="utf-8")
    tree.mkdir()
    found = set()
    for mutant in mutants.mutants_of(path):
        found.add((mutant.line, mutant.apply(tree), mutant.new, mutant.in_function))
        changed = (tree / "module.py").read_text(encoding="utf-8")
        compile(changed, "module.py", "exec")
        assert changed != SOURCE
    whole = {one for one in found if "\n" in one[1]}
    assert found - whole == CHANGES
    assert {(line, new) for line, _, new, _ in whole} == {(12, "(values[0] - (values[-1] if most > 2 else 7))")}


@pytest.mark.parametrize("budget", [0, 5, 60])
def test_the_nearest_and_quickest_tests_of_a_line_come_first(budget, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    import mutants

    mutant = mutants.Mutant("lisa_dist/core/sampling.py", 9, 0, 1, "", True)
    seconds = {"core/test_a.py::a[1]": 3, "core/test_a.py::a[2]": 2, "core/test_a.py::b": 4, "data/test_c.py::c": 1}
    seconds |= {"checkpoint/test_d.py::d": 1}
    recorded = {f"tests/unit/{test}": (taken, {"lisa_dist/core/sampling.py:9"}) for test, taken in seconds.items()}
    recorded["tests/unit/core/test_a.py::elsewhere"] = (1, {"lisa_dist/core/sampling.py:10"})
    ordered = ["core/test_a.py::a[2]", "core/test_a.py::b", "checkpoint/test_d.py::d", "core/test_a.py::a[1]"]
    chosen = {0: ordered[:1], 5: [ordered[0], ordered[2]], 60: ordered}[budget]
    assert mutants.tests_for(mutant, recorded, budget) == [f"tests/unit/{test}" for test in chosen]
