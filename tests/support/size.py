"""The size of the project: `make size`. budgets.json has what is allowed, which only goes down, and the goal."""

import json
import re
from dataclasses import fields
from pathlib import Path

from lisa_dist.config import LisaConfig

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "tests" / "support" / "budgets.json"
FOLDERS = ("lisa_dist", "kernels", "benchmarks", "tests")
OF_COMMANDS = ("models.md",)  # a row for each architecture, written by a command: nothing to be read as prose
PAGES = ("README.md", "CHANGELOG.md", "docs/*.md", "benchmarks/*.md")


def python_files(folder: Path) -> list[Path]:
    """The modules below a folder; links to other folders of the project are left out."""
    return [path for path in sorted(folder.rglob("*.py")) if not any(parent.is_symlink() for parent in path.parents)]


def count_lines(paths: list[Path]) -> int:
    """Lines of files, blank ones and comments included."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def overridden_names() -> list[str]:
    """Names of DeepSpeed that lisa_dist/zero replaces, by the table in its docstring: `name, name: file.py, when`."""
    table = (ROOT / "lisa_dist" / "zero" / "__init__.py").read_text(encoding="utf-8")
    rows = re.findall(r"^([\w, ]+): \w+\.py,", table, re.MULTILINE)
    return [name for row in rows for name in row.split(", ")]


def measure() -> dict[str, int]:
    """Every figure that has a budget, by its name."""
    sizes = {}
    for folder in FOLDERS:
        files = python_files(ROOT / folder)
        sizes[f"lines of {folder}"] = count_lines(files)
        if folder == "lisa_dist":
            sizes["modules of lisa_dist"] = len(files)
    pages = [path for pattern in PAGES for path in ROOT.glob(pattern) if path.name not in OF_COMMANDS]
    sizes["words of pages"] = sum(len(path.read_text(encoding="utf-8").split()) for path in pages)
    sizes["settings of LisaConfig"] = len(fields(LisaConfig))
    sizes["overridden names of DeepSpeed"] = len(overridden_names())
    return sizes


def main() -> None:
    """Print every figure beside what is allowed and the goal, then lines and modules by package."""
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8"))
    print(f"{'':32}     now  at most     goal")
    for name, size in measure().items():
        allowed = budgets[name]["at most"] + budgets[name].get("granted", 0)
        print(f"{name:32} {size:7,} {allowed:8,} {budgets[name]['goal']:8,}")
    print()
    for folder in ("lisa_dist", "benchmarks", "tests", "tests/unit"):
        for package in (path for path in sorted((ROOT / folder).iterdir()) if path.is_dir() and not path.is_symlink()):
            if files := python_files(package):
                print(f"{package.relative_to(ROOT)!s:32} {count_lines(files):7,} lines in {len(files):3} modules")


if __name__ == "__main__":
    main()
