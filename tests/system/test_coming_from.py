"""The page for people who come from other tools names flags, values and defaults that we have."""

import functools
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from lisa_dist.commands.verbs import parser_of
from lisa_dist.config import LisaConfig
from lisa_dist.data.encoding import LONG_EXAMPLES
from lisa_dist.data.formats import FORMATS
from lisa_dist.flags import task_of
from lisa_dist.run.arguments import run_parser
from lisa_dist.tasks import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text(encoding="utf-8")
TOOLS = ("LMFlow", "Axolotl", "ms-swift", "LLaMA-Factory")
parser = functools.cache(run_parser)


def parsed(words: list[str]) -> dict[str, object]:
    """The values of all flags; UserError for one that is unknown, or a value that it does not take."""
    parser().check(words)
    return vars(parser().parse_known_args(words)[0])


def cells(tool: str) -> list[list[str]]:
    """The rows of the table whose first column has this heading."""
    table = re.search(rf"^\| {tool} \|.*\n(?:\|.*\n)+", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[0].splitlines()[2:]]


def ours() -> list[str]:
    """What stands as code in the columns "here"."""
    return [code for tool in TOOLS for row in cells(tool) for code in re.findall(r"`([^`]+)`", row[1])]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_has_its_table(tool):
    rows = cells(tool)
    assert len(rows) >= 12
    assert {len(row) for row in rows} == {3}
    here = " ".join(row[1] for row in rows)
    for flag in ("--method lisa", "--lisa_activated_layers", "--lisa_interval_steps", "--packing", "--deepspeed"):
        assert flag in here, flag


@pytest.mark.parametrize("words", dict.fromkeys(ours()))
def test_what_is_named_as_ours_parses(words):
    assert words.startswith("--"), "the columns name flags"
    if "--task" in words:
        assert parser_of("train", task_of(shlex.split(words))).given(shlex.split(words))["task"] in TASKS
        return
    values = parsed(shlex.split(words))
    LisaConfig(**{field.name: values[field.name] for field in fields(LisaConfig)})
    assert values["long_examples"] in LONG_EXAMPLES
    assert values["dataset_format"] in (None, *FORMATS)


def test_flags_in_the_text_exist():
    text = PAGE[PAGE.index("## What is different") :]
    named = re.findall(r"--(\w+)", text)
    assert len(named) >= 10
    assert set(named) <= set(parsed([]))


def test_defaults_are_ours():
    table = cells("flag")
    assert len(table) >= 7
    for row in table:
        names = re.findall(r"`--(\w+)`", row[0])
        for name, said in zip(names, row[1].split(", "), strict=True):
            default = parsed([])[name]
            if isinstance(default, (int, float)) and not isinstance(default, bool):
                assert float(said) == default, name
            else:
                assert said == str(getattr(default, "value", default)).lower(), name
