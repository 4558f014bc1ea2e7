"""Write the lists of docs/flags.md from the help of our flags: `python docs/flag_page.py`, after a flag has changed."""

import dataclasses
import re
import textwrap
from pathlib import Path

from lisa_dist.config import LisaConfig
from lisa_dist.data.dataset import DataArguments
from lisa_dist.run.arguments import RunArguments
from lisa_dist.run.task_configs import TrainingFlags

PAGE = Path(__file__).with_name("flags.md")
LISTS = {"run": RunArguments, "lisa": LisaConfig, "data": DataArguments, "training": TrainingFlags}


def flags_of(arguments: type) -> str:
    """The flags of a dataclass, with their defaults and their help, a point each."""
    points = []
    for field in dataclasses.fields(arguments):
        default = "" if field.default in ("", None) else f" ({str(field.default).lower()})"
        text = f"- **`--{field.name}`**{default}: {' '.join(field.metadata['help'].split())}"
        points.append(textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    return "\n".join(points)


def with_flags(page: str) -> str:
    """The page with its lists as they should be."""
    for name, arguments in LISTS.items():
        new = f"<!-- flags: {name} -->\n{flags_of(arguments)}\n<!-- end of flags -->"
        page, count = re.subn(
            rf"<!-- flags: {name} -->\n.*?<!-- end of flags -->", lambda _, new=new: new, page, flags=re.DOTALL
        )
        assert count == 1, name
    return page


if __name__ == "__main__":
    PAGE.write_text(with_flags(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
