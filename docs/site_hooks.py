"""Hooks of `make docs`: pages of the repository that are not in docs/ are pages of the site too.

Links between pages are those of the repository; to files that are no pages there is none.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages beside docs/, and what they are called on the site; README is its first page.
OTHERS = {
    "README.md": "index.md",
    "launch/README.md": "launch.md",
    "benchmarks/REPORT.md": "report.md",
    "benchmarks/cost/GPU.md": "gpu.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are elsewhere."""
    for path, name in OTHERS.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from where the page is in the repository, to where it is on the site."""
    name = page.file.src_uri
    source = next((path for path, other in OTHERS.items() if other == name), f"docs/{name}")
    folder = posixpath.dirname(source)

    def on_site(link: re.Match) -> str:
        image, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        if not target:
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        found = OTHERS.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return text if found is None else f"{image}[{text}]({found}{anchor})"

    return _LINK.sub(on_site, markdown)
