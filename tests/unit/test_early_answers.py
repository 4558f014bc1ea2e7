"""Help, mistyped flags and missing files, answered by sources: as the run's parsers would, and without an import."""

import subprocess
import sys

import pytest

from lisa_dist.commands.verbs import WITH_FLAGS, import_verb, look_for_files, parser_of
from lisa_dist.errors import UserError
from lisa_dist.flags import FlagParser, first_argument_as, take
from lisa_dist.run.arguments import run_parser
from lisa_dist.tasks import SFT, TASKS

HEAVY = ("torch", "transformers", "trl", "deepspeed", "datasets", "pyarrow")


def imported_parser(verb: str, task: str = SFT) -> FlagParser:
    if verb == "train":
        return run_parser(task)
    module = import_verb(verb)
    return FlagParser(module.ARGUMENTS, module.USAGE, module.HELP)


SLIPS = [
    ("train", ["--lerning_rate", "3"], r"--lerning_rate: no such flag; did you mean --learning_rate\?"),
    ("train", ["--lr", "3"], "--lr: no such flag; here it is --learning_rate"),
    ("train", ["--bf16", "--max_steps", "3"], "--bf16: expected one argument: true or false"),
    ("train", ["--learning_rate", "abc"], "--learning_rate: invalid float value: 'abc'"),
    ("train", ["--max_steps", "9" * 20], "--max_steps: invalid int value"),
    ("train", ["--packing", "maybe"], "--packing: maybe is neither true nor false"),
    ("train", ["--lr_scheduler_type", "steep"], "--lr_scheduler_type: invalid choice: 'steep'"),
    ("train", ["--lisa_interval_steps", "many"], "--lisa_interval_steps: invalid int value: 'many'"),
    ("train", ["--config", "there_is_none.yaml"], "--config there_is_none.yaml: no such file"),
    ("train", ["--config", "a.yaml", "--config=b.yaml"], "--config: two recipes are given"),
    ("train", ["b.yaml", "--config", "a.yaml"], "--config: two recipes are given"),
    ("train", ["--max_steps", "3", "--config"], "--config is the last word: give a recipe"),
    ("train", ["--sequence_len", "3"], "--sequence_len: no such flag; here it is --max_length"),
    ("train", ["word"], "word: belongs to no flag"),
    ("train", ["--lisa-lr-power=-0.5"], r"--lisa_lr_power -0\.5: removed since 0\.2\.0; give --learning_rate"),
    ("plan", ["--model", "x", "--lisa_probe_steps", "9"], r"--lisa_probe_steps 9: removed since 0\.2\.0; leave it out"),
    ("plan", ["--gpus", "2"], "the following arguments are required: --model"),
    ("plan", ["--model", "x", "--gpu_memry", "3"], r"did you mean --gpu_memory\?"),
    ("eval", ["--model", "x", "--limit", "y"], "--limit: invalid float value: 'y'"),
    ("norms", ["--out", "x"], "the following arguments are required: RUN"),
]


@pytest.mark.parametrize(("verb", "words", "said"), SLIPS, ids=[" ".join(words)[:40] for _, words, _ in SLIPS])
def test_slips_are_refused_in_the_words_of_the_run(verb, words, said):
    with pytest.raises(UserError, match=said) as early:
        parser_of(verb).check(words)
    with pytest.raises(UserError) as late:
        imported_parser(verb).check(words)
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("lerning_rate: 1.0e-5\n", "lerning_rate: no such key; did you mean learning_rate"),
        ("lisa_depth_bias: 4\n", r"--config .*\.yaml: --lisa_depth_bias 4: removed since 0\.2\.0; give the weights"),
    ],
)
def test_a_recipe_is_read_too(tmp_path, recipe, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        parser_of("train").given(["--config", str(path)])


def test_what_is_given_is_told_from_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lisa_sampler: weighted\nlearning_rate: 3e-5\nbf16: null\nenv: {A: 1}\n", encoding="utf-8")
    words = ["--max-steps=7", "--no_remove_unused_columns", "--config", str(path), "--dataset_name", "a", "b"]
    given = parser_of("train").given([*words, "--learning_rate", "1"])
    assert [*given.items()] == [
        ("max_steps", 7),
        ("remove_unused_columns", False),
        ("dataset_name", ["a", "b"]),
        ("learning_rate", 1.0),
        ("lisa_sampler", "weighted"),
        ("bf16", None),
    ]
    assert parser_of("plan").given(["--model_name_or_path=x", "--lisa_state_bits", "embed=8"]) == {
        "model": "x",
        "lisa_state_bits": "embed=8",
    }
    assert parser_of("norms").given(["a", "b", "--out", "c"]) == {"runs": ["a", "b"], "output_dir": "c"}


@pytest.mark.parametrize(
    ("verb", "task"), [*((verb, SFT) for verb in WITH_FLAGS), *(("train", task) for task in TASKS)]
)
def test_help_is_that_of_the_run_s_parser(verb, task, capsys):
    with pytest.raises(SystemExit):
        parser_of(verb, task).check(["--help"])
    early = capsys.readouterr().out
    imported_parser(verb, task).print_help()
    assert early == capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["trian"], 2),
        (["train", "--help"], 0),
        (["train", "--task", "grpo", "--help_all"], 0),
        (["train", "--lerning_rate", "3"], 2),
        (["train", "there_is_none.yaml", "--gpus", "2"], 2),
        (["train", "--lisa_activated_layers", "-1"], 2),
        (["plan", "--gpu_memry", "3"], 2),
        (["eval", "model", "--help"], 0),
        (["eval", "--gpus", "2", "model", "--limt", "3"], 2),
        (["train", "--gpus=2", "there_is_none.yaml"], 2),
        (["check", "--help"], 0),
        (["train", "--deepspeed", "none.json"], 2),
        (["train", "--dataset_name", "none.jsonl"], 2),
        (["export", "nofile", "out"], 2),
        (["plan", "--model", "llama3.1-8b", "--gpu_memory", "24"], 2),
        (["init", "--model", "llama3.1-8b", "--recipe", "."], 2),
        (["train", "--output_dir", "finished"], 2),
        (["train", "--lisa_sampler", "cyclic"], 2),
        (["train", "--lisa_wake_warmup_steps", "2"], 2),
        (["completion", "bash"], 0),
    ],
    ids=str,
)
def test_nothing_is_imported_for_an_answer(tmp_path, words, code):
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
        ("train", {"dataset_name": ["here", "two words.json.gz"]}, "--dataset_name two words.json.gz: no such file"),
        ("train", {"eval_dataset_name": "none.csv#30"}, "--eval_dataset_name none.csv#30: no such file"),
        ("train", {"task": "grpo", "reward_funcs": ["none.py:f"]}, "--reward_funcs none.py:f: no such file"),
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
    (tmp_path / "my rewards.py").write_text("def reward(completions, **columns):\n    return []\n")
    of_hub = {"model_name_or_path": "org/name", "resume_from_checkpoint": "auto", "deepspeed": "zero2"}
    of_hub |= {"dataset_name": ["org/name", "json", "x" * 300, "here.json", "here.json#30"]}
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
    look_for_files("train", {"task": "grpo", "reward_funcs": "my rewards.py", "dataset_name": "here.json"})
    look_for_files("report", {"words": ["here"]})
    with pytest.raises(UserError, match="none: no such folder"):
        look_for_files("report", {"words": ["here", "none"]})


def test_a_first_word_that_is_no_flag():
    assert first_argument_as("--config", ["a.yaml", "--x", "1"]) == ["--config", "a.yaml", "--x", "1"]
    for words in ([], ["--x", "a.yaml"]):
        assert first_argument_as("--config", words) == words


@pytest.mark.parametrize(
    ("words", "found", "others"),
    [
        (["--gpus", "2", "a.yaml"], ["2"], ["a.yaml"]),
        (["a.yaml", "--x", "-1", "b c", "--gpus=2", "--y"], ["2"], ["a.yaml", "--x", "-1", "b c", "--y"]),
        (["--x", "1", "--gpus"], [""], ["--x", "1"]),
        (["--gpus", "--x", "--x"], [""], ["--x", "--x"]),
        (["--gpu", "1"], [], ["--gpu", "1"]),
        (["--gpus", "1", "--gpus", "2"], ["1", "2"], []),
    ],
    ids=str,
)
def test_a_flag_is_taken_out_of_words(words, found, others):
    assert take(words, "--gpus", "--none") == ([found, []], others)
