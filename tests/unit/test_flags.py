"""The command line: a screen of help, and a frozen set of flags."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cases import full

from lisa_dist import cli
from lisa_dist.commands import chat, check, eval, init, norms, plan, train
from lisa_dist.commands.chat import ChatArguments
from lisa_dist.commands.check import CheckArguments
from lisa_dist.commands.norms import NormsArguments
from lisa_dist.config import LisaConfig
from lisa_dist.data.dataset import DataArguments
from lisa_dist.eval.arguments import EvalArguments
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.run import arguments
from lisa_dist.run.arguments import RunArguments, run_parser
from lisa_dist.run.recipe import InitArguments

SNAPSHOT = Path(__file__).with_name("flags.json")


def own_flags() -> dict[str, dict[str, str]]:
    """Our flags and their defaults; TRL's and the Trainer's are theirs to change."""
    of_verbs = {
        "train": (RunArguments, DataArguments, LisaConfig),
        "init": (InitArguments,),
        "plan": (PlanArguments,),
        "check": (CheckArguments,),
        "eval": (EvalArguments,),
        "norms": (NormsArguments,),
        "chat": (ChatArguments,),
    }
    return {
        verb: {
            field.name: "required" if field.default is dataclasses.MISSING else repr(field.default)
            for arguments in dataclasses_of_verb
            for field in dataclasses.fields(arguments)
        }
        for verb, dataclasses_of_verb in of_verbs.items()
    }


def test_the_flags_are_those_that_people_use():
    """A flag that goes or changes its default breaks recipes: CHANGELOG.md says so, and then this file changes too."""
    assert own_flags() == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("verb", "groups"),
    [
        (train.main, arguments.HELP),
        *((verb.main, verb.HELP) for verb in (plan, init, check, eval, norms, chat)),
    ],
)
def test_help_is_a_screen(capsys, monkeypatch, verb, groups):
    monkeypatch.setenv("SLURM_NTASKS", "4")  # as in an allocation, where a run would ask for srun
    with pytest.raises(SystemExit) as ended:
        verb(["--help"])
    assert ended.value.code == 0
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) <= 54
    assert max(map(len, screen)) <= 120
    shown = [line.split()[0].removeprefix("--") for line in screen if line.startswith("  --")]
    assert shown == [flag for flags in groups.values() for flag in flags]
    if verb is train.main:
        assert "  --lisa_interval_steps          20                 optimizer steps in a period (K)" in screen


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "usage: lisa-dist train"),
        ([], 2, "usage: lisa-dist train"),
        (["trian"], 2, "lisa-dist: trian: no such verb; did you mean train?\n"),
        (["x"], 2, "lisa-dist: x: no such verb; lisa-dist --help lists them.\n"),
        (["--version"], 0, f"lisa-dist {version('lisa_dist')}\n"),
        (
            ["export", "--help"],
            0,
            "usage: lisa-dist export CHECKPOINT OUT [--keep_adapter] [--push_to_hub NAME]\n\nturn a checkpoint of any",
        ),
        (["export", "one"], 2, "usage: lisa-dist export CHECKPOINT OUT [--keep_adapter] [--push_to_hub NAME]\n"),
        (["report", "-h"], 0, "usage: lisa-dist report OUTPUT_DIR [OUTPUT_DIR ...] [--serve [PORT]]\n\nwrite report"),
        (["info", "more"], 2, "usage: lisa-dist info\n\nwhat is installed here"),
    ],
)
def test_verbs_without_flags_say_how_they_are_used(monkeypatch, capsys, words, code, said):
    monkeypatch.setattr(cli.sys, "argv", ["lisa-dist", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    screen = capsys.readouterr().out
    assert screen.startswith(said)
    assert len(screen.splitlines()) <= 54


@pytest.mark.parametrize(
    ("words", "rank"),
    [
        (["--help"], {}),
        (["recipes", "--help"], {}),
        (["train", "--help"], {}),  # of its table
        full(["train", "--help"], {"RANK": "0"}),  # of its parser
        full(["train", "--help_all"], {}),
        full(["train", "--help_all"], {"RANK": "0"}),
    ],
)
def test_a_reader_may_go_before_the_end(words, rank):
    """As `lisa-dist train --help | head -1` has it, also where Python does not buffer."""
    command = [sys.executable, "-u", "-m", "lisa_dist.cli", *words]
    environment = {**os.environ, **rank}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (1, "")


def test_all_flags_can_be_listed(capsys):
    with pytest.raises(SystemExit):
        run_parser().check(["--help_all"])
    listed = capsys.readouterr().out
    for flag in (*own_flags()["train"], "adam_beta2", "neftune_noise_alpha"):
        assert f"--{flag}" in listed


def test_a_recipe_may_have_one_prompt_or_several(tmp_path):
    path = tmp_path / "recipe.yaml"
    for text, prompts in (("one: 1 + 1?", ["one: 1 + 1?"]), ("[a, b]", ["a", "b"])):
        path.write_text(f"sample_prompt: {text if text[0] == '[' else repr(text)}\n", encoding="utf-8")
        parser = run_parser()
        given = parser.given(["--config", str(path)])["sample_prompt"]
        assert RunArguments(sample_prompt=given).sample_prompt == prompts
