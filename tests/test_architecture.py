"""The layout: imports go downward only, and one file touches DeepSpeed's privates."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [
    {"config", "states", "imports"},
    {
        "ds_config",
        "blocks",
        "sampling",
        "importance",
        "layer_weights",
        "wake_warmup",
        "formats",
        "flags",
        "attention",
        "liger",
        "metrics",
        "cpu_bf16",
        "backend",
        "rank_discovery",
    },
    {
        "progress",
        "files",
        "stop_signals",
        "watchdog",
        "cpu_ops",
        "adamw",
        "sources",
        "encoding",
        "eval_data",
        "judge",
        "answer_writer",
    },
    {"monitoring", "data", "optimizer", "memory", "period_log", "nonfinite", "recompute", "health"},
    {"selection", "fake_run"},
    {"zero", "state_files", "weights"},
    {"invariants", "movement", "layer_gradients", "controller", "backward"},
    {"checkpoint", "harness", "mt_bench", "analysis", "planning", "loop", "describe"},
    {"measuring"},
    {"run_memory"},
    {"trainer", "arguments", "run_files"},
    {"plots", "launching", "sample_answer"},
    {"report", "norms"},
    {"train", "plan", "info", "preflight", "init", "evaluation", "cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
SAME_LEVEL = {
    ("controller", "invariants"),
    ("controller", "movement"),
    ("controller", "layer_gradients"),
    ("cli", "train"),
    ("cli", "plan"),
    ("cli", "info"),
    ("cli", "init"),
    ("init", "plan"),
    ("train", "report"),
    ("cli", "preflight"),
    ("weights", "zero"),
}
PRIVATES = re.compile(
    r"_z3_optimizer|_hp_mapping|bit16_groups|fp16_groups|single_partition_of_fp32|fp32_partitioned_groups"
    r"|_grad_acc_hooks|parameter_offload|_configure_zero_optimizer|ds_tensor"
)
MODULES = sorted(path for path in (ROOT / "lisa_dist").glob("*.py") if path.stem != "__init__")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_downward(path):
    for name in imported(path):
        if name.startswith("lisa_dist.") and not name.startswith("lisa_dist.kernels"):
            target = name.split(".")[1]
            downward = LEVEL[target] < LEVEL[path.stem]
            assert downward or (path.stem, target) in SAME_LEVEL, f"{path.stem} imports {target}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem != "zero"], ids=lambda path: path.stem)
def test_only_zero_names_deepspeed_privates(path):
    found = PRIVATES.findall(path.read_text(encoding="utf-8"))
    assert not found, f"{path.stem} names {found}"


def test_one_module_imports_the_kernels():
    importing = [path.stem for path in MODULES if any("kernels" in name.split(".") for name in imported(path))]
    assert importing == ["backend"]


def test_kernels_import_nothing_of_the_library():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not any(name.split(".")[0] == "lisa_dist" for name in imported(path))


def test_no_package_shadows_another():
    for folder in ("kernels", "launch", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    assert (ROOT / "lisa_dist" / "kernels").is_symlink()
    assert (ROOT / "lisa_dist" / "ds_configs").is_symlink()
