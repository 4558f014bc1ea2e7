"""The site of the documentation: every page is in it, and every public name in its reference."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lisa_dist
from docs import draw_architecture, flag_page
from docs.site_hooks import OTHERS

ROOT = Path(__file__).parents[2]


def pages(entries: list) -> list[str]:
    """The files of the navigation."""
    found = []
    for entry in entries:
        (content,) = entry.values()
        found += pages(content) if isinstance(content, list) else [content]
    return found


def test_every_page_has_its_place():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(nav)) == sorted([*(path.name for path in (ROOT / "docs").glob("*.md")), *OTHERS.values()])


def test_every_public_name_is_in_the_reference():
    named = re.findall(r"^::: lisa_dist\.[\w.]+\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(name for name in lisa_dist.__all__ if name != "__version__")


def test_the_flags_are_those_of_the_code():
    page = flag_page.PAGE.read_text(encoding="utf-8")
    assert flag_page.with_flags(page) == page, "python docs/flag_page.py writes them"
    assert "- **`--lisa_interval_steps`** (20): Optimizer steps in a period" in page


def test_the_picture_of_the_packages_is_that_of_their_imports():
    picture = draw_architecture.PICTURE.read_text(encoding="utf-8")
    assert draw_architecture.draw() == picture, "python docs/draw_architecture.py draws it"
    assert picture.count("<rect") == 1 + len(draw_architecture.packages())


@pytest.mark.full
def test_the_site_is_built(tmp_path):
    """With --strict: a name that cannot be found, or a link to a page or a heading that is not there, ends it.

    As `make docs` does it: with --quiet there would be no warnings, and nothing to be strict about.
    """
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "lisa_dist.config.LisaConfig" in reference
    assert "Call before every step" in reference, "docstrings are there"
    first = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="tutorial/"' in first, "README's links are those of the site"
