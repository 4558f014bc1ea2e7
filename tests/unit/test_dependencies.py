"""Whatever the code imports is declared in pyproject.toml, under the name of its distribution, and with bounds."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

import lisa_dist

ROOT = Path(__file__).parents[2]
# Imported by the programs that they are plugins of, which are there then, and what these depend on.
PLUGINS = {"axolotl", "swift", "pydantic"}
# A module that is imported inside functions alone, once its extra is known to be there.
OF_AN_EXTRA = {"lisa_dist/eval/harness.py"}
UNBOUNDED = {
    "lisa-dist",  # extras of its own
    "packaging",  # its versions are years
    "types-pyyaml",  # these follow the library that they describe
    "types-psutil",
    "types-tqdm",
    "transformers",  # as transformers[serving] of the tests: the dependencies bound it
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imports_in(node: ast.AST, in_function: bool = False) -> Iterator[tuple[str, bool]]:
    """Names that are imported below a node, and whether a function imports them."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, in_function) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.module, in_function
    in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from imports_in(child, in_function)


def modules_imported_by(folder: str) -> Iterator[tuple[str, str, bool]]:
    """File, top-level module of another distribution, and whether a function imports it."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name, in_function in imports_in(ast.parse(path.read_text(encoding="utf-8"))):
            module = name.partition(".")[0]
            if module not in {*sys.stdlib_module_names, "lisa_dist"}:
                yield str(path.relative_to(ROOT)), module, in_function


@pytest.fixture(scope="module")
def settings() -> dict:
    """pyproject.toml as setuptools reads it."""
    return read_configuration(ROOT / "pyproject.toml")


def requirements_of(settings: dict) -> list[str]:
    extras = settings["project"]["optional-dependencies"]
    return [*settings["project"]["dependencies"], *(one for extra in extras.values() for one in extra)]


def names_of(requirements: list[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


@pytest.mark.parametrize("folder", ["lisa_dist", "kernels", "launch"])
def test_what_is_imported_is_declared(folder, settings):
    always = names_of(settings["project"]["dependencies"])
    anywhere = names_of(requirements_of(settings))
    assert "torch" in always
    imported = list(modules_imported_by(folder))
    assert imported
    distributions = packages_distributions()
    for path, module, in_function in imported:
        if module in PLUGINS and path.startswith("lisa_dist/integrations/"):
            continue
        names = {canonical(name) for name in distributions.get(module, [module])}
        may_lack = in_function or folder != "lisa_dist" or path in OF_AN_EXTRA
        where = "pyproject.toml" if may_lack else "dependencies"
        assert names & (anywhere if may_lack else always), f"{path} imports {module}, of {names}, which {where} lacks"


def test_every_requirement_has_both_bounds(settings):
    requirements = requirements_of(settings)
    bounded = [one for one in requirements if re.search(">=[^;]*,<", one)]
    assert names_of([one for one in requirements if one not in bounded]) == UNBOUNDED


def test_every_package_is_packed(settings):
    packages = settings["tool"]["setuptools"]["packages"]
    folders = {f"lisa_dist.{path.parent.name}" for path in (ROOT / "lisa_dist").glob("*/__init__.py")}
    assert "lisa_dist.zero" in folders
    links = {f"lisa_dist.{path.name}" for path in (ROOT / "lisa_dist").iterdir() if path.is_symlink()}
    assert len(links) == 4
    assert {"lisa_dist"} | links | folders <= set(packages)
    assert all((ROOT / package.replace(".", "/")).is_dir() for package in packages)
    assert len(packages) == len(set(packages))


def test_there_is_one_version(settings):
    assert settings["project"]["version"] == lisa_dist.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", lisa_dist.__version__)
