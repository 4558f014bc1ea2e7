"""The public names: typed, listed, and importable without what they do not need."""

import ast
import pydoc
import subprocess
import sys
from pathlib import Path

import lisa_dist

WITHOUT_TRL = sorted({*lisa_dist.__all__} - {"LisaTrainer"})
IMPORTS = f"""
import sys
from lisa_dist import {", ".join(WITHOUT_TRL)}
assert "trl" not in sys.modules
from lisa_dist import LisaTrainer
assert issubclass(LisaTrainer, (LisaMixin, sys.modules["trl"].SFTTrainer))
"""


def test_names_that_do_without_trl_do_not_import_it():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


def test_names_are_listed_and_imported_for_type_checkers_from_where_they_are():
    assert set(lisa_dist.__all__) <= set(dir(lisa_dist))
    tree = ast.parse(Path(lisa_dist.__file__).read_text(encoding="utf-8"))
    (for_checkers,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.name: node.module for node in for_checkers.body for alias in node.names}
    assert set(declared) == set(lisa_dist.__all__) - {"__version__"}
    for name, module in declared.items():
        assert getattr(lisa_dist, name) is getattr(sys.modules[module], name)


def test_the_first_screen_of_help_names_them():
    screen = pydoc.plain(pydoc.render_doc(lisa_dist)).splitlines()[:24]
    assert [name for name in lisa_dist.__all__ if name not in "\n".join(screen)] == ["__version__"]
