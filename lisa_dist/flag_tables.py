"""The flags of each verb as a table, so that help and mistyped flags are answered before torch is imported.

Flags of a run are fields of transformers' and TRL's dataclasses, whose import takes seconds. What they are with the
versions of the day is in flag_tables.jsonl, next to this file (`make flags` writes it); with other versions the first
command of a verb leaves its table in the user's cache.
"""

import hashlib
import json
import warnings
from argparse import SUPPRESS, Action
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

from lisa_dist.config import LisaConfig
from lisa_dist.files import cache_folder, replacing
from lisa_dist.flag_words import NUMBER_OR_WORD, WordParser, finite, read_bool

SHIPPED = Path(__file__).with_name("flag_tables.jsonl")
# Those whose dataclasses a verb's flags are fields of.
_OF = ("transformers", "trl")
_READERS = {"int": int, "float": float, "bool": read_bool, "str": str, "dict": dict}
_KINDS = {"NoneType": NoneType, "bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict}


def versions() -> dict[str, str]:
    """What a table depends on besides lisa_dist. A package that is not installed has no flags."""
    found = {}
    for name in _OF:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def table_of(parser: WordParser) -> list[dict[str, Any]]:
    """A parser as JSON has it, all that `answer` needs: its screen of help, then each flag without what is not set."""
    groups = {heading: dict(shown) for heading, shown in parser.groups.items()}
    shown = {name for flags in groups.values() for name in flags}
    table: list[dict[str, Any]] = [{"usage": parser.usage, "groups": groups}]
    for action in parser._actions:
        if action.dest in (SUPPRESS, "help"):
            continue
        reader = "bool" if action.type is read_bool else getattr(action.type, "__name__", "")
        flag = {
            "dest": action.dest,
            "names": list(action.option_strings),
            "reader": reader if reader in _READERS and not action.choices else "str",
            "kinds": [name for name, one in _KINDS.items() if one in parser.kinds.get(action.dest, ())],
            "nargs": action.nargs,
            "required": action.required or None,
            "metavar": action.metavar if isinstance(action.metavar, str) else None,
            "choices": list(action.choices or ()),
            "default": _shown_default(action) if action.dest in shown else None,
        }
        table.append({name: value for name, value in flag.items() if value is not None and value != []})
    return table


def _shown_default(action: Action) -> Any:
    default = getattr(action, "shown", action.default)
    return getattr(default, "value", default)


class _TableParser(WordParser):
    """A verb's parser again, of its table: flags that are not given are not in what it parses."""

    def __init__(self, table: Sequence[Mapping[str, Any]]):
        screen, *flags = table
        super().__init__(usage=screen["usage"], allow_abbrev=False)
        self.groups = screen["groups"]
        self.kinds = {flag["dest"]: {_KINDS[name] for name in flag.get("kinds", ())} for flag in flags}
        for flag in flags:
            action = self.add_argument(*flag.get("names", [flag["dest"]]), **_as_argument(flag))
            action.shown = flag.get("default")  # type: ignore[attr-defined]  # `print_help` reads it
        self.add_argument("--help_all", action="store_true", default=SUPPRESS)


def _as_argument(flag: Mapping[str, Any]) -> dict[str, Any]:
    """What `add_argument` takes."""
    named: dict[str, Any] = {"metavar": flag.get("metavar")}
    if "names" in flag:
        named = {"dest": flag["dest"], "required": flag.get("required", False)}
    if flag.get("nargs") == 0:
        return named | {"action": "store_false", "default": SUPPRESS}
    reader = _READERS[flag["reader"]]
    if reader in (int, float):
        reader = finite(reader, NUMBER_OR_WORD.get(flag["dest"], ()))
    found = named | {"nargs": flag.get("nargs"), "default": SUPPRESS, "type": reader}
    if choices := flag.get("choices"):
        by_text = {str(choice): choice for choice in choices}
        found |= {"choices": choices, "type": lambda text: by_text.get(text, text)}
    return found


def answer(table: Sequence[Mapping[str, Any]], words: Sequence[str], takes_recipe: bool) -> dict[str, Any]:
    """Print the help of a verb and exit, or raise UserError for what its words cannot be; else what they give.

    A setting of LISA that cannot work is refused here too. What else a verb refuses it must refuse itself.
    """
    parser = _TableParser(table)
    if "--help_all" in words:  # with a text on each flag, which a table has not
        return {}
    if takes_recipe:
        words = parser.check_with_recipe(words)
        if "--config" in words:  # its values are defaults by now
            at = words.index("--config")
            words = [*words[:at], *words[at + 2 :]]
    else:
        parser.check_words(words)
    given = vars(parser.parse_known_args(list(words))[0])
    settings = {field.name: given[field.name] for field in fields(LisaConfig) if field.name in given}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings without an effect: said when the run has begun
        LisaConfig(**settings)
    return given


def load(verb: str) -> list[dict[str, Any]] | None:
    """The table of a verb with the installed versions; None where there is none yet."""
    for place in (lambda verb: SHIPPED, _cached):
        try:
            first, *lines = place(verb).read_text(encoding="utf-8").splitlines()
            if json.loads(first) == versions():
                entries = [json.loads(line) for line in lines]
                table = [entry for entry in entries if verb in entry.pop("of")]
                return sorted(table, key=lambda entry: "usage" not in entry)  # the screen is the first
        except (OSError, ValueError):  # there is none, or it is of a process that was cut
            continue
    return None


def store(verb: str, parser: WordParser) -> None:
    """Leave the table of a verb in the user's cache; where there can be none, the next command takes seconds again."""
    if any("dev" in found or "+" in found for found in versions().values()):
        return  # flags may change under such a version
    try:
        path = _cached(verb)
        path.parent.mkdir(parents=True, exist_ok=True)
        write({verb: parser}, path)
    except OSError:  # a home that is read-only, or none: nothing depends on a cache
        return


def write(parsers: Mapping[str, WordParser], path: Path) -> None:
    """The tables of verbs as a file: versions, then a line for each entry, which several tables may have alike."""
    tables_of: dict[str, list[str]] = {}
    for verb, parser in parsers.items():
        for entry in table_of(parser):
            tables_of.setdefault(json.dumps(entry), []).append(verb)
    lines = [json.dumps({"of": verbs} | json.loads(entry)) for entry, verbs in tables_of.items()]
    with replacing(path) as new:
        new.write_text("".join(f"{line}\n" for line in [json.dumps(versions()), *lines]), encoding="utf-8")


def _cached(verb: str) -> Path:
    folder = cache_folder()
    if folder is None:
        raise FileNotFoundError("no cache")
    ours = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()[:12]  # it changes with the flags of lisa_dist
    name = "-".join([verb.replace(" ", "-"), ours, *(f"{package}-{found}" for package, found in versions().items())])
    return folder / "flags" / f"{name}.jsonl"
