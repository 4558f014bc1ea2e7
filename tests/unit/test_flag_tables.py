"""Help and mistyped flags, answered by tables: as the parsers would, and before anything is imported."""

import json
import os
import subprocess
import sys

import pytest

from lisa_dist import cli, flag_tables
from lisa_dist.commands import chat, check, eval, init, norms, plan, train
from lisa_dist.commands.given_files import look_for_files, look_for_words
from lisa_dist.commands.verbs import TABLES, parser_of
from lisa_dist.errors import UserError
from lisa_dist.flag_words import first_word_as

PARSERS = {"train": train, "init": init, "plan": plan, "eval": eval, "chat": chat, "check": check, "norms": norms}
HEAVY = ("torch", "transformers", "trl", "deepspeed", "datasets")


@pytest.fixture(scope="module")
def tables() -> dict[str, list]:
    return {name: json.loads(json.dumps(flag_tables.table_of(parser_of(name)))) for name in TABLES}


def test_the_shipped_tables_are_of_the_flags_as_they_are(tables):
    """After a flag has changed: make flags. Those of TRL and of the Trainer may be of other releases."""
    versions, *lines = map(json.loads, flag_tables.SHIPPED.read_text(encoding="utf-8").splitlines())
    shipped: dict[str, list] = {}
    for line in lines:
        for verb in line.pop("of"):
            shipped.setdefault(verb, []).append(line)
    assert shipped.keys() == tables.keys()
    for verb, table in tables.items():
        if versions == flag_tables.versions() or not verb.startswith("train"):
            assert sorted(shipped[verb], key=str) == sorted(table, key=str), f"flags of {verb} are others: make flags"
        ours, known = (
            sorted((one for one in each if one.get("dest", "").startswith("lisa_")), key=str)
            for each in (table, shipped[verb])
        )
        assert ours == known, f"the flags of {verb} are others: make flags"


SLIPS = [
    ("train", ["--lerning_rate", "3"], r"--lerning_rate: no such flag; did you mean --learning_rate\?"),
    ("train", ["--learning_rate", "abc"], "--learning_rate: invalid float value: 'abc'"),
    ("train", ["--max_steps", "9" * 20], "--max_steps: invalid int value"),
    ("train", ["--packing", "maybe"], "--packing: maybe is neither true nor false"),
    ("train", ["--lr_scheduler_type", "steep"], "--lr_scheduler_type: invalid choice: 'steep'"),
    ("train", ["--lisa_interval_steps", "many"], "--lisa_interval_steps: invalid int value: 'many'"),
    ("train", ["--config", "there_is_none.yaml"], "--config there_is_none.yaml: no such file"),
    ("train", ["--config", "a.yaml", "--config=b.yaml"], "--config: two recipes are given"),
    ("train", ["--config", "a.yaml", "b.yaml"], "--config: two recipes are given"),
    ("train", ["b.yaml", "--config", "a.yaml"], "--config: two recipes are given"),
    ("train", ["--sequence_len", "3"], "--sequence_len: no such flag; here it is --max_length"),
    ("train", ["word"], "word: belongs to no flag"),
    ("train", ["--lisa_depth_bias", "4"], r"--lisa_depth_bias 4: removed since 0\.2\.0; give the weights"),
    ("train", ["--lisa-lr-power=-0.5"], r"--lisa_lr_power -0\.5: removed since 0\.2\.0; give --learning_rate"),
    ("plan", ["--model", "x", "--lisa_probe_steps", "9"], r"--lisa_probe_steps 9: removed since 0\.2\.0; leave it out"),
    ("plan", ["--gpus", "2"], "the following arguments are required: --model"),
    ("plan", ["--model", "x", "--gpu_memry", "3"], r"did you mean --gpu_memory\?"),
    ("eval", ["--model", "x", "--limit", "y"], "--limit: invalid float value: 'y'"),
    ("norms", ["--out", "x"], "the following arguments are required: RUN"),
]


@pytest.mark.parametrize(("verb", "words", "said"), SLIPS, ids=[" ".join(words)[:40] for _, words, _ in SLIPS])
def test_a_table_refuses_what_the_parser_does(tables, verb, words, said):
    with pytest.raises(UserError, match=said) as by_table:
        flag_tables.answer(tables[verb], words, takes_recipe=verb == "train")
    parser = PARSERS[verb].parser()
    with pytest.raises(UserError) as by_parser:
        parser.check(words) if verb == "train" else parser.check_words(words)
    assert str(by_table.value) == str(by_parser.value)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("learning_rate: 1.0e-5\nlisa_sampler: none\n", "--lisa_sampler none: unknown"),
        ("lerning_rate: 1.0e-5\n", "lerning_rate: no such key; did you mean learning_rate"),
        ("max_steps: 2026-01-01\n", "max_steps: 2026-01-01: a date is no value of this key"),
        ("[1, 2]\n", "must hold keys and values"),
        (
            "lisa_depth_bias: 4\n",
            r"--config .*\.yaml: --lisa_depth_bias 4: removed since 0\.2\.0; give the weights",
        ),
        ("lisa_sampler: window\n", r"recipe\.yaml: --lisa_sampler window: removed since 0\.2\.0; give uniform or"),
    ],
)
def test_a_recipe_is_read_too(tables, tmp_path, recipe, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        flag_tables.answer(tables["train"], ["--config", str(path)], takes_recipe=True)


def test_words_that_can_be_meant_pass(tables, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "lisa_sampler: balanced\nlisa_depth_bias: 0\nlisa_activated_layers: auto\nbf16: null\n", encoding="utf-8"
    )
    words = [
        "--config",
        str(path),
        "--lisa_interval_steps",
        "5",
        "--no_remove_unused_columns",
        "--dataset_name",
        "a",
        "b",
    ]
    flag_tables.answer(tables["train"], words, takes_recipe=True)
    flag_tables.answer(tables["plan"], ["--model", "x", "--lisa_state_bits", "embed=8"], takes_recipe=False)
    flag_tables.answer(tables["norms"], ["a", "b", "--out", "c"], takes_recipe=False)


@pytest.mark.parametrize("verb", TABLES)
def test_a_table_has_the_parser_s_screen(tables, verb, capsys):
    with pytest.raises(SystemExit):
        flag_tables.answer(tables[verb], ["--help"], takes_recipe=False)
    by_table = capsys.readouterr().out
    parser_of(verb).print_help()
    assert by_table == capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["trian"], 2),
        (["train", "--help"], 0),
        (["train", "--lerning_rate", "3"], 2),
        (["train", "there_is_none.yaml", "--gpus", "2"], 2),
        (["train", "--lisa_activated_layers", "-1"], 2),
        (["plan", "--gpu_memry", "3"], 2),
        (["eval", "model", "--help"], 0),
        (["eval", "--gpus", "2", "model", "--limt", "3"], 2),
        (["train", "--gpus=2", "there_is_none.yaml"], 2),
        (["check", "--help"], 0),
        (["train", "--deepspeed", "none.json"], 2),
        (["export", "nofile", "out"], 2),
        (["plan", "--model", "llama3.1-8b", "--gpu_memory", "24"], 2),
        (["init", "--model", "llama3.1-8b", "--recipe", "."], 2),
        (["train", "--output_dir", "finished"], 2),
        (["train", "--lisa_sampler", "cyclic"], 2),
        (["train", "--lisa_wake_warmup_steps", "2"], 2),
    ],
    ids=str,
)
def test_nothing_is_imported_for_an_answer(monkeypatch, tmp_path, words, code):
    """Where a table of these releases is shipped, or in the cache."""
    for verb, module in PARSERS.items():
        if flag_tables.load(verb) is None:
            flag_tables.store(verb, module.parser())
    (tmp_path / "finished" / "checkpoint-2").mkdir(parents=True)
    script = f"""
import sys
from lisa_dist import cli
sys.argv = ["lisa-dist", *{words!r}]
try:
    cli.main()
    code = 0
except SystemExit as ended:
    code = ended.code
print(code, [name for name in {HEAVY!r} if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ran.stdout.splitlines()[-1] == f"{code} []", ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("verb", "given", "said"),
    [
        ("train", {"deepspeed": "zero9"}, "--deepspeed zero9: neither a file nor a shipped config"),
        ("train", {"model_name_or_path": "./none"}, "--model_name_or_path ./none: no such folder"),
        ("train", {"resume_from_checkpoint": "runs/none"}, "--resume_from_checkpoint runs/none: no such folder"),
        ("train", {"lisa_weights_file": "none.csv#a/b"}, "--lisa_weights_file none.csv: no such file"),
        ("plan", {"model": "here/none.json"}, "--model here/none.json: no such file or folder"),
        ("init", {"model": "llama3.1-8"}, r"--model llama3.1-8: .*did you mean llama3\.1-8b\?"),
        ("chat", {"model": "/none"}, "/none: no such folder"),
        ("eval", {"model": "a/b", "data_dir": "none"}, "--data_dir none: no such folder"),
        ("norms", {"runs": ["here", "x=none"]}, "x=none: no such file or folder"),
        ("plan", {"model": 300 * "x"}, "--model xxx.*x: no such file or folder"),
        ("chat", {"model": 300 * "x"}, "xxx.*x: no such folder"),
    ],
)
def test_what_is_not_there_is_named(monkeypatch, tmp_path, verb, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match=said):
        look_for_files(verb, given)


def test_what_may_be_there_passes(monkeypatch, tmp_path):
    """Names of the hub, words that name no file, and what is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here.json").write_text("{}")
    of_hub = {"model_name_or_path": "org/name", "resume_from_checkpoint": "auto", "deepspeed": "zero2"}
    for verb, given in {
        "train": of_hub,
        "check": {"deepspeed": "here.json", "model_name_or_path": "./none"},
        "plan": {"model": "org/name", "deepspeed": None},
        "init": {"model": "./here"},
        "chat": {"model": "here"},
        "norms": {"runs": ["here", "x=here", "a=b=here"]},
        "eval": {"model": "org/name", "data_dir": "a\0b"},  # of which what opens it says more
    }.items():
        look_for_files(verb, given)
    look_for_files("train", {"resume_from_checkpoint": "true", "lisa_weights_file": "here.json#a"})
    look_for_words("report", ["here"])
    with pytest.raises(UserError, match="none: no such folder"):
        look_for_words("report", ["here", "none"])


def test_with_other_releases_the_first_command_leaves_a_table(monkeypatch, tmp_path):
    monkeypatch.setenv("LISA_DIST_CACHE", str(tmp_path))
    monkeypatch.setattr(flag_tables, "versions", lambda: {"transformers": "5.99", "trl": "1.99"})
    assert flag_tables.load("norms") is None
    with pytest.raises(SystemExit):
        cli.run_verb("norms", ["--help"])
    (kept,) = tmp_path.rglob("norms-*.jsonl")
    assert flag_tables.load("norms") == json.loads(json.dumps(flag_tables.table_of(norms.parser())))
    kept.write_text("cut", encoding="utf-8")
    assert flag_tables.load("norms") is None


def test_a_home_that_cannot_be_written_costs_nothing_but_time(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LISA_DIST_CACHE", str(tmp_path / "file"))
    flag_tables.store("norms", norms.parser())
    assert not (tmp_path / "file").read_bytes()


def test_without_a_home_or_with_versions_of_a_day_there_is_no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(flag_tables, "versions", lambda: {"transformers": "5.99", "trl": "1.99"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LISA_DIST_CACHE", "")  # nothing is to be written
    flag_tables.store("norms", norms.parser())
    assert flag_tables.load("norms") is None
    for name in ("XDG_CACHE_HOME", "LISA_DIST_CACHE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    flag_tables.store("norms", norms.parser())
    assert flag_tables.load("norms") is None
    monkeypatch.setenv("LISA_DIST_CACHE", str(tmp_path))
    for version in ("5.99.0.dev0", "5.99+local"):
        monkeypatch.setattr(flag_tables, "versions", lambda version=version: {"transformers": version, "trl": "1.99"})
        flag_tables.store("norms", norms.parser())
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], []),
        (["a.yaml", "--x", "1"], ["--config", "a.yaml", "--x", "1"]),
        (["--gpus", "2", "a.yaml"], ["--gpus", "2", "--config", "a.yaml"]),
        (["--gpus=2", "a.yaml", "--x"], ["--gpus=2", "--config", "a.yaml", "--x"]),
        (["--gpus", "2"], ["--gpus", "2"]),
        (["--x", "a.yaml"], ["--x", "a.yaml"]),
    ],
    ids=str,
)
def test_a_first_word_that_is_no_flag(words, named):
    assert first_word_as("--config", words) == named
