"""`lisa-dist recipes` and `lisa-dist completion`, which need nothing but the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lisa_dist import cli
from lisa_dist.commands import completion, recipes

ROOT = Path(__file__).parents[3]


def said(capsys, *words: str) -> str:
    recipes.main(*words)
    return capsys.readouterr().out


def test_every_recipe_and_example_is_listed(capsys):
    listed = [line.split(maxsplit=1) for line in said(capsys).splitlines()]
    assert said(capsys, "list") == said(capsys)
    names = {path.stem for path in (ROOT / "launch" / "recipes").glob("*.yaml")}
    names |= {path.name for path in (ROOT / "examples").glob("*.py")} | {"continued_pretraining"}
    assert {name for name, _ in listed} == names
    assert all(words and len(f"{name} {words}") < 110 for name, words in listed)


def test_a_recipe_is_shown_and_copied(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "launch" / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    assert said(capsys, "show", "quickstart") == text
    assert said(capsys, "copy", "quickstart.yaml") == "wrote quickstart.yaml\n"
    said(capsys, "copy", "quickstart", "mine.yaml")
    (tmp_path / "folder").mkdir()
    said(capsys, "copy", "dpo.py", "folder")
    assert (tmp_path / "quickstart.yaml").read_text(encoding="utf-8") == text
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))["method"] == "lisa"
    assert (tmp_path / "folder" / "dpo.py").read_bytes() == (ROOT / "examples" / "dpo.py").read_bytes()


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (("show", "quickstrat"), r"quickstrat: no such recipe; did you mean quickstart\?"),
        (("show", "x"), "x: no such recipe; see the list"),
        (("copy", "quickstart", "there.yaml"), "there.yaml: is there already; name another file"),
        (("copy", "quickstart", "no/such/folder.yaml"), "cannot be written"),
        (("draw", "quickstart"), "draw quickstart: give nothing for a list, show NAME, or copy NAME"),
    ],
)
def test_what_cannot_be_shown_or_copied(capsys, tmp_path, monkeypatch, words, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").touch()
    with pytest.raises(SystemExit) as ended:
        recipes.main(*words)
    assert ended.value.code == 2
    line = capsys.readouterr().out
    assert re.fullmatch(rf"lisa-dist recipes: .*{refused}.*\n", line)


SHELL = """
eval "$({python} -m lisa_dist completion bash)"
complete() {{ :; }}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); _lisa_dist; echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("lisa-dist re", "report recipes"),
        ("lisa-dist train --lisa_state", "--lisa_state --lisa_state_bits"),
        ("lisa-dist plan --gpu_m", "--gpu_memory"),
        ("lisa-dist recipes s", "show"),
        ("lisa-dist train --gp", "--gpu_memory --gpus"),
        ("lisa-dist train --num_gen", "--num_generations --num_generations_eval"),
        ("lisa-dist convert --t", "--tool"),
        ("lisa-dist train set", "setup.py"),
    ],
)
def test_the_shell_is_offered_verbs_flags_and_files(words, offered):
    script = SHELL.format(python=sys.executable, words=words)
    ran = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == offered.split(), ran.stderr


def test_zsh_reads_the_same_after_it_has_learned_how(capsys):
    completion.main("bash")
    bash = capsys.readouterr().out
    completion.main("zsh")
    first, rest = capsys.readouterr().out.split("\n", 1)
    assert "bashcompinit" in first
    assert rest == bash
    with pytest.raises(SystemExit):
        completion.main("fish")
    assert capsys.readouterr().out == "lisa-dist completion: fish: give bash or zsh.\n"
    assert f'words="{" ".join(cli.VERBS)}"' in bash
