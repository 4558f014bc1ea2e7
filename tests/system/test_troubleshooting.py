"""docs/troubleshooting.md and docs/method.md: what they quote of the code and of the command line is there.

A message on the page is a heading that is one code span, or a code span with a blank and `...` in it, where `...` is
what changes from run to run.
"""

import ast
import importlib.util
import pydoc
import re
from pathlib import Path

import pytest

from lisa_dist.run.arguments import run_parser

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("troubleshooting", "method")}
FILES = sorted((ROOT / "lisa_dist").rglob("*.py"))
HOLE = "\0"  # what an f-string fills in
# Messages that other packages have, by the file that has them.
OF_OTHERS = {
    "Please correct the following DeepSpeed config values that mismatch": "transformers/integrations/deepspeed.py",
    "Check batch related parameters": "deepspeed/runtime/config.py",
    "CUDA_HOME does not exist": "deepspeed/ops/op_builder/builder.py",
    "Unable to JIT load the": "deepspeed/ops/op_builder/builder.py",
    "Failed to load CPU gemm_4bit_forward": "bitsandbytes/backends/cpu/ops.py",
}
# Read before the parser; a prefix; of other programs.
NO_RUN_FLAGS = {"--config", "--lisa_", "--keep_adapter", "--pid", "--shm-size", "--master_port", "--master-port"}


def strings_of(path: Path) -> list[str]:
    """Every string of a source file but docstrings, its parts joined, with a HOLE for each value of an f-string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    passed_over = {id(node.format_spec) for node in ast.walk(tree) if isinstance(node, ast.FormattedValue)}
    passed_over |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = []
    for node in ast.walk(tree):
        if id(node) in passed_over:
            continue
        if isinstance(node, ast.JoinedStr):
            strings.append("".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
    return strings


OUR_STRINGS = [text for path in FILES for text in strings_of(path)]


def is_in(message: str, strings: list[str]) -> bool:
    """Whether one of the strings has all constant parts of a message, in order."""
    pattern = re.compile(".*?".join(re.escape(part) for part in message.split("...")), re.DOTALL)
    return any(pattern.search(text) for text in strings)


def code_spans(page: str) -> list[str]:
    """The code of a page, in spans and in blocks."""
    blocks = re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE))


HEADINGS = re.findall(r"^### (.*)$", PAGES["troubleshooting"], re.MULTILINE)
MESSAGES = [heading.strip("`") for heading in HEADINGS if "`" in heading]
INLINE = [span for span in code_spans(PAGES["troubleshooting"]) if "..." in span and " " in span]


def test_the_page_has_messages():
    assert len(MESSAGES) > 20
    assert all(re.fullmatch("`[^`]+`", heading) for heading in HEADINGS if "`" in heading)


@pytest.mark.parametrize("message", sorted({*MESSAGES, *INLINE}))
def test_quoted_messages_are_in_the_sources(message):
    constant = "".join(message.split("..."))
    assert sum(map(len, re.findall(r"\w+", constant))) >= 8, "too little of it is constant for a search"
    file = next((file for begins, file in OF_OTHERS.items() if message.startswith(begins)), None)
    if file is None:
        assert is_in(message, OUR_STRINGS)
        return
    package, _, inside = file.partition("/")
    assert is_in(message, strings_of(Path(importlib.util.find_spec(package).origin).parent / inside))


def test_every_message_of_others_is_on_the_page():
    for begins in OF_OTHERS:
        assert any(message.startswith(begins) for message in MESSAGES), begins


NAMES = [
    (page, name.removesuffix("()").removeprefix("lisa_dist."))
    for page, text in PAGES.items()
    for name in code_spans(text)
    if re.fullmatch(r"lisa_dist(\.\w+)+(\(\))?", name)
    or (page == "method" and re.fullmatch(r"[a-z_]+(\.\w+)+", name) and not name.endswith((".py", ".json", ".jsonl")))
]


def test_the_pages_name_code():
    assert sum(page == "method" for page, _ in NAMES) > 12


@pytest.mark.parametrize("name", sorted({name for _, name in NAMES}))
def test_named_code_exists(name):
    """By all of its own name, or from the last word of its module's on."""
    first, _, rest = name.partition(".")
    modules = [path.relative_to(ROOT).with_suffix("") for path in FILES if path.stem == first]
    modules += [path.parent.relative_to(ROOT) for path in FILES if path.parent.name == first]
    known = [f"lisa_dist.{name}", *(f"{'.'.join(module.parts)}.{rest}" for module in modules)]
    assert any(pydoc.locate(one) is not None for one in known)


@pytest.mark.parametrize("page", PAGES)
def test_flags_are_those_of_a_run(page):
    flags = {flag for span in code_spans(PAGES[page]) for flag in re.findall(r"--\w[\w-]*", span)} - NO_RUN_FLAGS
    assert len(flags) > 15
    unknown = flags - run_parser()._option_string_actions.keys()
    assert not unknown
