"""Write into the header of every recipe what `lisa-dist plan` says of it, by the command that stands there.

python -m benchmarks.tables.recipes
"""

import contextlib
import io
import shlex
from pathlib import Path

from lisa_dist.commands.plan import main as plan

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
COMMAND = "# $ lisa-dist plan "


def with_plan(text: str) -> str:
    """The recipe with what its command prints in place of what it printed once; as it is without a command."""
    lines = text.splitlines()
    at = next((number for number, line in enumerate(lines) if line.startswith(COMMAND)), None)
    if at is None:
        return text
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        plan(shlex.split(lines[at].removeprefix(COMMAND)))
    table = said.getvalue().split("\n\n")[0]  # the command after it is the recipe itself
    body = next(number for number in range(at, len(lines)) if not lines[number].startswith("#"))
    return "\n".join([*lines[: at + 1], *(f"# {line}".rstrip() for line in table.splitlines()), *lines[body:]]) + "\n"


if __name__ == "__main__":
    for path in sorted(RECIPES.glob("*.yaml")):
        path.write_text(with_plan(path.read_text(encoding="utf-8")), encoding="utf-8")
