"""Dataclasses as their sources have them: as they are when they are imported, and nothing of them is run."""

import dataclasses
import sys
from typing import Any, get_type_hints

import pytest
from transformers import HfArgumentParser

from lisa_dist.commands import verbs
from lisa_dist.commands.verbs import parser_of, read_parser
from lisa_dist.definitions import UnreadableError, read
from lisa_dist.flags import FlagParser
from lisa_dist.run.arguments import ARGUMENTS, run_parser
from lisa_dist.run.task_configs import CONFIGS
from lisa_dist.tasks import SFT, TASKS

# What takes more than reading: a call of a method of a module's, an optional package.
UNREAD = {(name, about) for name in ("log_level", "log_level_replica") for about in ("choices", "type")}
UNREAD |= {("parallelism_config", "type")}


def actions_of(parser: Any) -> dict[tuple[str, str], Any]:
    """All of each flag, by its first name."""
    facts: dict[tuple[str, str], Any] = {}
    for action in parser._actions:
        if action.option_strings[0] in ("-h", "--help_all"):
            continue
        kind = getattr(action.type, "__name__", None)
        about = {name: getattr(action, name) for name in ("option_strings", "nargs", "const", "required", "help")}
        about |= {"default": getattr(action.default, "value", action.default), "choices": [*(action.choices or ())]}
        about |= {"type": "choice" if action.choices else "read_bool" if kind == "string_to_bool" else kind}
        facts |= {(action.option_strings[0].removeprefix("--"), name): value for name, value in about.items()}
    return facts


@pytest.mark.parametrize("task", TASKS)
def test_flags_are_those_of_transformers_parser(task):
    """Names, types, defaults, choices and help agree, for the classes that are imported and for those that are read."""
    theirs = actions_of(HfArgumentParser((*ARGUMENTS, CONFIGS[task]), allow_abbrev=False))
    assert len(theirs) > 8 * 150
    assert actions_of(run_parser(task)) == theirs
    found = actions_of(parser_of("train", task))
    assert found.keys() == theirs.keys()
    assert {key for key in theirs if found[key] != theirs[key]} <= UNREAD


MODULES = {
    "__init__": """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from .config import Config as Config
else:
    raise SystemError("this package was imported")
""",
    "config": '''
from __future__ import annotations
import torch_of_another_day
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Optional
from .names import LONG, Kind, make, settings
from .base import Base, Mixin
from elsewhere import Thing

WORDS = {"a": 0}
WORDS |= {name: 1 for name in ("b",)}

@dataclass
class Config(Mixin, Base):
    """Options of a test."""
    shared: ClassVar[int] = 3
    optional: Optional[int] = None
    kind: Kind | str = field(default=Kind.FAST, metadata={"help": f"One of {', '.join(WORDS)}." " And " + LONG})
    literal: "Literal['x', 'y']" = "x"
    several: list[str] = field(default_factory=lambda: ["sigmoid"])
    thing: Thing | None = None
    made: str = field(default=make(), metadata={"help": settings.help, "choices": list(WORDS)})
    hidden: int = field(default=1, init=False)
    rate: float = 2e-5

    def __post_init__(self):
        raise SystemError("a method was run")
''',
    "extended": """
from dataclasses import dataclass
from elsewhere import Base
@dataclass
class Extended(Base):
    more: int = 1
""",
    "names": """
from enum import Enum
LONG = "long"
class Kind(str, Enum):
    FAST = "fast"
    SLOW = "slow"
def make():
    raise SystemError("a function was run")
settings = make()
""",
    "base": """
import dataclasses
@dataclasses.dataclass
class Base:
    rate: float = dataclasses.field(default=1e-3, metadata={"help": "Rate.", "aliases": ["--lr"]})
    name: str = dataclasses.field()
@dataclasses.dataclass
class Mixin:
    rate: float = 5.0
    mixed: bool = True
""",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The name of one whose import fails."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "read_alone").mkdir()
    for name, text in MODULES.items():
        (folder / "read_alone" / f"{name}.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield "read_alone"
    sys.path.remove(str(folder))


def test_what_is_read_of_a_package_that_cannot_be_imported(package):
    found = read(package, "Config")
    fields = {one.name: one for one in dataclasses.fields(found)}
    assert [*fields] == ["rate", "name", "mixed", "optional", "kind", "literal", "several", "thing", "made", "hidden"]
    defaults = {"rate": 2e-5, "mixed": True, "optional": None, "literal": "x", "made": None}
    assert {name: fields[name].default for name in defaults} == defaults
    assert fields["name"].default is dataclasses.MISSING
    assert fields["several"].default_factory() == ["sigmoid"]
    assert fields["kind"].metadata == {"help": "One of a, b. And long"}
    assert fields["made"].metadata == {"help": None, "choices": ["a", "b"]}
    hints = get_type_hints(found)
    assert [one.value for one in hints["kind"].__args__[0]] == ["fast", "slow"]
    assert str(hints["optional"]) == "typing.Optional[int]"
    parser = FlagParser((found,), "", {})
    given = {"name": "x", "kind": "slow", "thing": "y", "mixed": False}
    assert parser.given(["--name", "x", "--kind", "slow", "--thing", "y", "--no_mixed"]) == given
    assert "hidden" not in parser.kinds


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        ("read_alone.config", "Other", "read_alone.config defines no Other"),
        ("read_alone.other", "Other", "read_alone.other has no source"),
        ("no_such_package", "Other", "no_such_package has no source"),
        # Else its flags would be missing, and the parser would refuse them.
        ("read_alone.extended", "Extended", "read_alone.extended.Extended: a base of it is in no source"),
    ],
)
def test_what_has_no_source_is_named(package, module, name, said):
    with pytest.raises(UnreadableError, match=said):
        read(module, name)


def test_where_sources_are_not_enough_modules_are_imported(monkeypatch):
    def unreadable(*_: object) -> None:
        raise UnreadableError("no source")

    monkeypatch.setattr(verbs, "read_parser", unreadable)
    for verb, task in (("train", "dpo"), ("plan", SFT)):
        assert actions_of(parser_of(verb, task)).keys() == actions_of(read_parser(verb, task)).keys()
