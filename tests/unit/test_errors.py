"""Errors name settings as the user has given them: by flags of a command line, by arguments in Python."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lisa_dist import errors
from lisa_dist.commands.verbs import WITH_FLAGS, parser_of
from lisa_dist.errors import UserError, naming_flags
from lisa_dist.tasks import TASKS


@pytest.mark.parametrize(
    ("text", "in_python"),
    [
        ("--lisa_sampler x: unknown; choose one of a, b.", "lisa_sampler x: unknown; choose one of a, b."),
        ("a with --lisa_depth_bias 3: give --lisa_sampler.", "a with lisa_depth_bias 3: give lisa_sampler."),
        ("pip install flash-attn --no-build-isolation", "pip install flash-attn --no-build-isolation"),
        ("a -- b, c--d", "a -- b, c--d"),
        ("torchrun --nproc_per_node 2 by (--deepspeed)", "torchrun --nproc_per_node 2 by (deepspeed)"),
    ],
)
def test_a_setting_is_named_as_it_was_given(monkeypatch, text, in_python):
    monkeypatch.setattr(errors, "_names_flags", False)
    error = UserError(text)
    assert str(error) == in_python
    with naming_flags():
        assert str(error) == text
        with naming_flags():
            pass
        assert str(error) == text
    assert str(error) == in_python


def test_python_is_told_of_an_argument_and_the_command_line_of_a_flag():
    """In new processes: nothing of these tests' own."""
    script = "import lisa_dist\ntry: lisa_dist.LisaConfig(lisa_sampler='x')\nexcept ValueError as error: print(error)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("lisa_sampler x: unknown; choose one of uniform")
    command = [sys.executable, "-m", "lisa_dist", "plan", "--model", "llama2-7b", "--lisa_sampler", "x"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stdout.startswith("lisa-dist plan: --lisa_sampler x: unknown; choose one of uniform")
    ran = subprocess.run(
        [sys.executable, "-m", "lisa_dist", "check", "--gpus_per_node", "8"], capture_output=True, text=True
    )
    assert "--output_dir is missing" in ran.stderr


def test_flags_in_errors_are_arguments_or_known_to_be_none():
    """A flag of another program stays one in Python."""
    parsers = [parser_of(verb) for verb in WITH_FLAGS] + [parser_of("train", task) for task in TASKS]
    arguments = {name.lstrip("-") for parser in parsers for name in parser._option_string_actions}
    named: dict[str, str] = {}
    for path in Path(errors.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and "Error" in ast.unparse(node.exc.func):
                texts = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
                named |= {name: f"{path}:{node.lineno}" for text in texts for name in errors._FLAG.findall(str(text))}
    assert len(named) > 80
    known = arguments | errors._NO_ARGUMENTS | {"tool", "keep_adapter"}  # of convert and export
    assert not {name: place for name, place in named.items() if name not in known and name[-1] != "_"}
