"""The entry points: `python -m lisa_dist`; and imports without collections, which leave the collector as it was."""

import gc
import subprocess
import sys

import pytest

from lisa_dist import cli
from lisa_dist.commands import verbs
from lisa_dist.commands.verbs import without_collection


def test_nothing_is_collected_in_between_and_all_is_as_before():
    """Also after an import that fails."""
    with pytest.raises(ImportError), without_collection():
        assert not gc.isenabled()
        made = [[] for _ in range(10000)]
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    oldest = {id(thing) for thing in gc.get_objects(generation=2)}
    assert all(id(thing) in oldest for thing in made), "the next collection of the youngest would walk them"


@pytest.mark.parametrize("module", ["lisa_dist", "lisa_dist.cli"])  # the second is in copies of the SLURM scripts
def test_the_command_as_a_module(module):
    finished = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert finished.stdout.startswith("usage: lisa-dist train")


def test_trl_of_another_program_is_told(monkeypatch, capsys):
    monkeypatch.setattr(verbs, "version", lambda name: "1.9.0")
    monkeypatch.setattr(cli.sys, "argv", ["lisa-dist", "plan", "--model", "llama3.1-8b"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "lisa-dist plan: trl 1.9.0: needs trl>=1.16; install it, or train by a plugin" in capsys.readouterr().out
