"""The layout: imports go downward, one folder touches DeepSpeed's privates, one module the kernels."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from runs import python_files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lisa_dist"
# A module imports from its own package and from packages of earlier lines, never sideways or up.
LEVELS = [
    {"ground"},  # the modules at the top
    {"data", "distributed", "optim"},
    {"zero"},
    {"core", "loss"},
    {"checkpoint", "memory", "report"},
    {"train"},
    {"convert", "eval", "integrations", "run"},
    {"commands"},
]
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
ENTRY_POINTS = {"__main__", "cli"}
GROUND = {path.stem for path in PACKAGE.glob("*.py")} - ENTRY_POINTS - {"__init__"}
# These two run without a trainer: on the files of a run, on a model.
INDEPENDENT = {"convert", "eval", "report"}
PRIVATES = re.compile(
    r"_z3_optimizer|_hp_mapping|bit16_groups|fp16_groups|single_partition_of_fp32|fp32_partitioned_groups"
    r"|_grad_acc_hooks|parameter_offload|_configure_zero_optimizer|ds_opt_adam"
    r"|\bds_(?:tensor|numel|shape|id|status|persist|process_group|summary|active_sub_modules)\b"
)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(name: str) -> str:
    """The package of a module: its folder, or for those at the top "ground", "commands" or "public" (the package)."""
    parts = name.split(".")[1:]
    if not parts:
        return "public"
    if parts[0] in ENTRY_POINTS:
        return "commands"
    return "ground" if parts[0] in GROUND else parts[0]


def imported(path: Path) -> set[str]:
    """The modules of lisa_dist that a file imports, anywhere in it; of `from package import module`, the module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "lisa_dist"}


FILES = python_files(PACKAGE)
MODULES = {name_of(path): path for path in FILES}


def test_every_room_has_a_level():
    assert len(MODULES) > 60  # all of them were found
    assert {package_of(name) for name in MODULES} - {"public"} == set(LEVEL)


@pytest.mark.parametrize("package", sorted(LEVEL))
def test_imports_go_downward(package):
    for name, path in MODULES.items():
        if package_of(name) != package:
            continue
        for target in imported(path):
            to = package_of(target)
            if to in (package, "kernels"):
                continue
            assert to != "public", f"{name} imports the package itself: name the module"
            assert LEVEL[to] < LEVEL[package], f"{name} imports {target}"
            assert package not in INDEPENDENT or LEVEL[to] == 0 or to == "distributed", f"{name} imports {target}"


def test_no_circles():
    graph = {name: imported(path) & MODULES.keys() for name, path in MODULES.items() if name != "lisa_dist"}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


@pytest.mark.parametrize("package", sorted(set(LEVEL) - {"zero"}))
def test_only_zero_names_deepspeed_privates(package):
    for name, path in MODULES.items():
        found = PRIVATES.findall(path.read_text(encoding="utf-8")) if package_of(name) == package else ()
        assert not found, f"{name} names {found}"


def test_one_module_imports_the_kernels_of_triton():
    importing = [name for name, path in MODULES.items() if any(one.endswith("_triton") for one in imported(path))]
    assert importing == ["lisa_dist.optim.ops"]


def test_kernels_import_nothing_of_the_library():
    files = list((ROOT / "kernels").glob("*.py"))
    assert files
    for path in files:
        assert not {name for name in imported(path) if not name.startswith("lisa_dist.kernels")}


def test_no_package_shadows_another():
    for folder in ("kernels", "launch", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    libraries = {"kernels", "torch", "triton", "trl", "deepspeed", "lisa_dist"}
    assert not libraries & {path.name for path in (ROOT / "tests").iterdir()}
    basenames = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert len(basenames) == len(set(basenames))  # pytest imports each by its name alone
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "ds_configs").is_symlink()
