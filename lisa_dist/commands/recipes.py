"""`lisa-dist recipes`: the recipes and examples that come with the package, listed, shown, copied."""

import difflib
import itertools
import re
import shutil
from importlib import resources
from pathlib import Path

from lisa_dist.commands import exit_on_error, writing
from lisa_dist.errors import UserError


def main(*argv: str) -> None:
    """List them, print one, or copy one to edit."""
    with exit_on_error("lisa-dist recipes"):
        verb, *rest = argv or ("list",)
        if verb == "list" and not rest:
            known = shipped()
            width = max(map(len, known)) + 2
            for name, path in known.items():  # each with the first sentence of what it says of itself
                print(f"{name:<{width}}{_first_sentence(path).rstrip('.')}")
        elif verb == "show" and len(rest) == 1:
            print(_find(rest[0]).read_text(encoding="utf-8"), end="")
        elif verb == "copy" and len(rest) in (1, 2):
            source = _find(rest[0])
            target = Path(rest[1] if len(rest) == 2 else source.name)
            target = target / source.name if target.is_dir() else target
            if target.exists():
                raise UserError(f"{target}: is there already; name another file.")
            with writing(str(target)):
                shutil.copyfile(source, target)
            print(f"wrote {target}")
        else:
            raise UserError(f"{' '.join(argv)}: give nothing for a list, show NAME, or copy NAME [FILE].")


def shipped() -> dict[str, Path]:
    """Recipes by name, and examples by file name."""
    root = Path(str(resources.files("lisa_dist")))
    found = {path.stem: path for path in sorted((root / "recipes").glob("*.yaml"))}
    found["continued_pretraining"] = root / "examples" / "continued_pretraining" / "recipe.yaml"
    return found | {path.name: path for path in sorted((root / "examples").glob("*.py"))}


def _find(name: str) -> Path:
    known = shipped()
    path = known.get(name) or known.get(name.removesuffix(".yaml"))
    if path is None:
        nearest = difflib.get_close_matches(name, known, n=1)
        raise UserError(f"{name}: no such recipe; {f'did you mean {nearest[0]}?' if nearest else 'see the list.'}")
    return path


def _first_sentence(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text.partition('"""')[2].partition("\n")[0]
    said = itertools.takewhile(re.compile(r"# (?!\$)").match, text.splitlines())
    return " ".join(line.removeprefix("# ") for line in said).partition(": ")[0]
