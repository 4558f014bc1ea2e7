"""Lists on the pages of the docs that come from the code: between `<!-- list: NAME -->` and `<!-- end of list -->`."""

import re
import textwrap
from pathlib import Path

import pytest

from lisa_dist.core.run_state import FREE_SETTINGS
from lisa_dist.model_names import shipped_model_configs
from lisa_dist.run_folder import MEMORY_PARTS

DOCS = Path(__file__).parents[3] / "docs"
MARKED = re.compile(r"^<!-- list: ([^\n]*) -->\n(.*?)\n<!-- end of list -->$", re.MULTILINE | re.DOTALL)
LISTS = {
    ("checkpoints.md", "free settings"): [f"`--{name}`" for name in FREE_SETTINGS],
    ("memory.md", "shipped model configs"): [f"`{name}`" for name in shipped_model_configs()],
    ("memory.md", "parts of a plan"): [f'"{title}"' for title, _ in MEMORY_PARTS],
}


@pytest.mark.parametrize(("page", "name"), LISTS)
def test_a_list_on_a_page_is_what_the_code_has(page, name):
    lists = dict(MARKED.findall((DOCS / page).read_text(encoding="utf-8")))
    expected = textwrap.fill(", ".join(LISTS[page, name]), 120, break_long_words=False, break_on_hyphens=False)
    assert lists[name] == expected, f"docs/{page}: put this between the marks of {name}"


def test_every_marked_list_comes_from_the_code():
    marked = {(page.name, name) for page in DOCS.glob("*.md") for name, _ in MARKED.findall(page.read_text("utf-8"))}
    assert marked == LISTS.keys()
