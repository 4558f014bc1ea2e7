"""Whatever the code imports is declared in setup.py, under the name that an index has it by."""

import ast
import itertools
import re
import runpy
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def modules_imported_by(folder: str) -> dict[str, str]:
    """Top-level modules of other distributions, each with a file that imports it; imports within functions too."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            found |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, "lisa_dist"}}


@pytest.fixture
def declared(monkeypatch) -> set[str]:
    """The distributions of install_requires and of the extras."""
    settings = {}
    monkeypatch.setattr(setuptools, "setup", settings.update)
    runpy.run_path(str(ROOT / "setup.py"))
    requirements = itertools.chain(settings["install_requires"], *settings["extras_require"].values())
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


@pytest.mark.parametrize("folder", ["lisa_dist", "kernels", "launch"])
def test_what_is_imported_is_declared(folder, declared):
    imported = modules_imported_by(folder)
    assert "torch" in declared
    assert imported
    distributions = packages_distributions()
    for module, path in imported.items():
        names = {canonical(name) for name in distributions.get(module, [module])}
        assert names & declared, f"{path} imports {module}, of {', '.join(sorted(names))}, which setup.py lacks"
