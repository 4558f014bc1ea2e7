"""The size of the project beside its budgets: `make size`. tests/budgets.json has the budgets, which only go down."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

from lisa_dist.config import LisaConfig

ROOT = Path(__file__).parents[2]
BUDGETS = ROOT / "tests" / "budgets.json"
FOLDERS = ("lisa_dist", "kernels", "benchmarks", "tests")
PAGES = ("README.md", "CHANGELOG.md", "docs/**/*.md", "benchmarks/*.md")


def python_files(folder: Path) -> list[Path]:
    """The modules below a folder; links to other folders of the project are left out."""
    return [path for path in sorted(folder.rglob("*.py")) if not any(parent.is_symlink() for parent in path.parents)]


def count_lines(paths: list[Path]) -> int:
    """Lines of files, blank ones and comments included."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def overridden_names() -> list[str]:
    """Names of DeepSpeed that lisa_dist/zero replaces: the first column of the table in its docstring, up to "when"."""
    docstring = ast.get_docstring(ast.parse((ROOT / "lisa_dist" / "zero" / "__init__.py").read_text(encoding="utf-8")))
    lines = (docstring or "").splitlines()
    _, head, end = (at for at, line in enumerate(lines) if line.startswith("===="))
    width = lines[head].index(" ")
    cells = [line[:width].rstrip() for line in lines[head + 1 : end]]
    # A name on two lines goes on with an underscore, where no comma ends the first one.
    joined = re.sub(r"(?<=\w)\n(?=_)", "", "\n".join("" if cell.startswith(" ") else cell for cell in cells))
    return re.split(r"[\s,]+", joined.strip())


def measure() -> dict[str, int]:
    """Every figure that has a budget, by its name."""
    sizes = {}
    for folder in FOLDERS:
        files = python_files(ROOT / folder)
        sizes[f"lines of {folder}"] = count_lines(files)
        if folder == "lisa_dist":
            sizes["modules of lisa_dist"] = len(files)
    pages = [path for pattern in PAGES for path in ROOT.glob(pattern)]
    sizes["words of pages"] = sum(len(path.read_text(encoding="utf-8").split()) for path in pages)
    sizes["settings of LisaConfig"] = len(fields(LisaConfig))
    sizes["overridden names of DeepSpeed"] = len(overridden_names())
    return sizes


def main() -> None:
    """Print every figure with its budget, then lines and modules by package."""
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8"))
    for name, size in measure().items():
        print(f"{name:32} {size:7,}   budget {budgets[name]:7,}")
    print()
    for folder in ("lisa_dist", "benchmarks", "tests", "tests/unit"):
        for package in (path for path in sorted((ROOT / folder).iterdir()) if path.is_dir() and not path.is_symlink()):
            if files := python_files(package):
                print(f"{package.relative_to(ROOT)!s:32} {count_lines(files):7,} lines in {len(files):3} modules")


if __name__ == "__main__":
    main()
