"""`--task`: preferences, reward models and rewards of answers, trained by LISA on two ranks, from the command line."""

import json
import random
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from cells import full
from models import save_tiny_llama
from runs import BIN, clean_environment, on_two_ranks, run_alone
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lisa_dist.commands.verbs import parser_of
from lisa_dist.config import LisaConfig, UserError
from lisa_dist.data.dataset import DataArguments
from lisa_dist.data.task_rows import load_task_data
from lisa_dist.flags import task_of
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.memory.planner import Planner
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.check_run import check_config
from lisa_dist.tasks import SFT, TASKS

REWARDS = """
import math

def reward(completions, **columns):
    assert len(columns["prompts"]) == len(columns["answer"]) == len(completions)
    return [float(len(set(one))) for one in completions]

async def awaited(completions, **columns):
    return [0.0 for one in completions]

def nan(completions, **columns):
    return [math.nan for one in completions]

def fewer(completions, **columns):
    return [1.0]

def raises(completions, **columns):
    return [columns["nothing"] for one in completions]

def nothing(completions, **columns):
    return None

async def late(completions, **columns):
    return ["1"] * len(completions)
"""
ROWS = {
    "pairs": [{"prompt": f"{n} + 1? ", "chosen": str(n + 1), "rejected": str(n)} for n in range(64)],
    "turns": [
        {
            "chosen": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}],
            "rejected": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n)}],
        }
        for n in range(64)
    ],
    "kto": [{"prompt": f"{n} + 1? ", "completion": str(n + n % 2), "label": bool(n % 2)} for n in range(64)],
    "questions": [{"question": f"{n} + 1? ", "answer": str(n + 1)} for n in range(64)],
}
OF_TASK = {
    "dpo": {"dataset_name": "pairs.jsonl"},
    "kto": {"dataset_name": "kto.jsonl"},
    "orpo": {"dataset_name": "turns.jsonl"},
    "reward": {"dataset_name": "turns.jsonl"},
    "grpo": {
        "dataset_name": "questions.jsonl",
        "dataset_columns": "prompt=question",
        "reward_funcs": "rewards.py",
        "num_generations": 4,
        "max_completion_length": 8,
    },
}
SETTINGS = {
    "model_name_or_path": "model",
    "per_device_train_batch_size": 4,
    "lisa_activated_layers": 1,
    "lisa_interval_steps": 2,
    "lisa_sampler": "reshuffle",
    "lisa_debug": True,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 3,
    "max_steps": 6,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cpu_ops) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    save_tiny_llama(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def flags_of(task: str, output_dir: Path, **changes) -> list[str]:
    values = {"task": task, "output_dir": output_dir} | SETTINGS | OF_TASK[task] | changes
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("words", "task"),
    [
        ([], "sft"),
        (["--task", "dpo"], "dpo"),
        (["--task=kto"], "kto"),
        (["--task", "dpo", "--task", "orpo"], "orpo"),
        (["--max_steps", "3", "--task"], "sft"),  # which the parser refuses
        (["--config", "of_grpo.yaml"], "grpo"),
        (["--config=of_grpo.yaml", "--task", "dpo"], "dpo"),
        (["--config"], "sft"),
    ],
    ids=str,
)
def test_the_task_is_that_of_the_words_or_of_their_recipe(tmp_path, monkeypatch, words, task):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_grpo.yaml").write_text("task: grpo\n")
    assert task_of(words) == task


def test_there_is_a_case_for_each_task():
    assert {SFT, *OF_TASK} == set(TASKS)


@pytest.mark.parametrize(
    ("task", "stage"),
    [
        ("dpo", "zero2"),
        ("grpo", "zero3"),
        full("dpo", "zero3"),
        full("grpo", "zero2"),
        full("kto", "zero3"),
        full("orpo", "zero2"),
        full("reward", "zero3"),
    ],
)
def test_a_task_trains_switches_and_resumes_on_two_ranks(folder, tmp_path, monkeypatch, task, stage):
    monkeypatch.chdir(folder)
    said = on_two_ranks(flags_of(task, tmp_path / "out", deepspeed=stage), tmp_path)
    assert f"{task}: {TASKS[task].what}" in said
    periods = [json.loads(line) for line in (tmp_path / "out" / "lisa_log.jsonl").read_text().splitlines()]
    assert [period["step"] for period in periods] == [0, 2, 4]
    layers = [period["layers"] for period in periods]
    assert len({layer for period in layers for layer in period}) == 3

    start, after = weights_of(folder / "model"), weights_of(tmp_path / "out")
    assert set(start) - set(after) <= ({"lm_head.weight"} if task == "reward" else set())
    for name in start.keys() & after.keys():
        layer = re.search(r"layers\.(\d+)\.", name)
        trains = layer is None or [int(layer[1])] in layers
        assert torch.equal(start[name], after[name]) != trains, name

    resume = {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-3"}  # in the middle of a period
    said = on_two_ranks(flags_of(task, tmp_path / "again", deepspeed=stage, **resume), tmp_path)
    assert "resumed from" in said
    again = weights_of(tmp_path / "again")
    assert after.keys() == again.keys()
    assert all(torch.equal(after[name], again[name]) for name in after)
    model_class = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    model, loading = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert task != "reward" or model.config.num_labels == 1


@pytest.mark.parametrize("task", ["dpo", *(full(task) for task in OF_TASK if task != "dpo")])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_methods_train_it_too(folder, tmp_path, monkeypatch, task, method):
    monkeypatch.chdir(folder)
    status, said = run_alone(flags_of(task, tmp_path / "out", method=method), tmp_path / "said.txt")
    assert status == 0, said[-3000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    saved = tmp_path / "out" / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    names = load_file(saved).keys()
    assert task != "reward" or any("score" in name for name in names)


@pytest.mark.full
def test_pairs_serve_kto_and_a_text_and_turns_serve_all(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    for task, rows in (("kto", "pairs"), ("dpo", "turns"), ("reward", "pairs"), ("orpo", "pairs")):
        flags = flags_of(task, tmp_path / task, dataset_name=f"{rows}.jsonl", eval_rows=8, eval_strategy="epoch")
        status, said = run_alone([*flags, "--max_steps", "2"], tmp_path / "said.txt")
        assert status == 0, said[-3000:]
        assert "held out: 8 of these examples" in said


@pytest.mark.full
def test_a_loss_that_trl_does_not_have_ends_the_run_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    status, said = run_alone(flags_of("dpo", tmp_path / "out", loss_type="nope"), tmp_path / "said.txt")
    assert status == 2, said[-3000:]
    assert "lisa-dist: --loss_type: Unknown loss type: nope. Should be one of [" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("nan", "returned nan for completion 1; a reward is a finite number, or None where there is none."),
        full("fewer", "returned 1 rewards for 4 completions."),
        full("nothing", "returned a NoneType for 4 completions."),
        full("raises", "raised KeyError: 'nothing' ("),
        full("late", "returned 1 for completion 1; a reward is a finite number, or None where there is none."),
    ],
)
def test_a_reward_that_is_none_ends_the_run_in_one_line(folder, tmp_path, monkeypatch, function, problem):
    monkeypatch.chdir(folder)
    flags = flags_of("grpo", tmp_path / "out", reward_funcs=f"rewards.py:{function}")
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 2
    assert said.splitlines()[-1].startswith(f"lisa-dist: --reward_funcs rewards.py:{function}: {problem}")
    assert "Traceback" not in said


SETTLED = [
    ("dpo", {"label_smoothing_factor": 0.5}, "--label_smoothing_factor 0.5 with --task dpo: the loss of this task has"),
    (
        "dpo",
        {"sync_ref_model": True},
        "--sync_ref_model True with --task dpo: a checkpoint has no reference model, and",
    ),
    (
        "kto",
        {"per_device_train_batch_size": 1},
        "--per_device_train_batch_size 1 with --task kto: it compares the",
    ),
    ("grpo", {"lisa_activated_layers": "auto"}, "--lisa_activated_layers auto with --task grpo: no step of it can be"),
    ("grpo", {"checkpointed_layers": "auto"}, "--checkpointed_layers auto with --task grpo: no step of it can be plan"),
    ("reward", {"sample_prompt": "x"}, "--sample_prompt with --task reward: a reward model gives scores, not answers;"),
]


@pytest.mark.parametrize(("task", "changes", "problem"), SETTLED, ids=[f"{task} {min(it)}" for task, it, _ in SETTLED])
def test_what_a_task_does_not_take_is_said_before_a_model_is_loaded(
    folder, tmp_path, monkeypatch, task, changes, problem
):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as refused:
        check_config(parse_arguments(flags_of(task, tmp_path / "out", **changes)))
    assert str(refused.value).startswith(problem)


@pytest.mark.full
def test_a_resume_knows_its_task_its_reference_and_its_answers(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)

    def said_by(task: str, name: str, code: int, **changes) -> str:
        status, said = run_alone(flags_of(task, tmp_path / name, **changes), tmp_path / "said.txt")
        assert status == code, said[-3000:]
        return said

    said_by("dpo", "dpo", 0)
    checkpoint = tmp_path / "dpo" / "checkpoint-3"
    assert "--beta 5.0 (it had 0.1)" in said_by("dpo", "other_beta", 0, resume_from_checkpoint=checkpoint, beta=5)
    turns = {"resume_from_checkpoint": checkpoint, "dataset_name": "pairs.jsonl"}
    assert "its run was of another task, by DPOTrainer, and this one is by ORPO" in said_by("orpo", "orpo", 2, **turns)
    said = said_by("dpo", "of_weights", 2, resume_from_checkpoint=folder / "model")
    assert "and the reference model would be another one; give it as --model_name_or_path." in said
    twice = {"num_iterations": 2, "save_steps": 1}
    said_by("grpo", "grpo", 0, **twice)
    said = said_by("grpo", "amid", 2, resume_from_checkpoint=tmp_path / "grpo" / "checkpoint-3", **twice)
    assert "its answers are used for 2 steps, and step 3 is amid them; resume from a multiple of 2" in said
    said_by("grpo", "again", 0, resume_from_checkpoint=tmp_path / "grpo" / "checkpoint-4", **twice)
    after, again = weights_of(tmp_path / "grpo"), weights_of(tmp_path / "again")
    assert all(torch.equal(after[name], again[name]) for name in after)


@pytest.mark.full
def test_rows_of_every_shape_that_can_be_trained_on(folder, tmp_path, monkeypatch):
    """Renamed where both names are there, labels of a CSV, keys that the first row lacks, dates beside, a source left
    without rows."""
    monkeypatch.chdir(folder)
    (tmp_path / "kto.csv").write_text("prompt,completion,label\n" + "a,b,true\nc,d,False\n" * 8)
    swapped = [{"chosen": str(n), "rejected": str(n + 1)} for n in range(16)]
    (tmp_path / "swapped.jsonl").write_text("\n".join(map(json.dumps, swapped)))
    (tmp_path / "one.jsonl").write_text(json.dumps(swapped[0] | {"rejected": "x"}))
    late = [{"prompt": "1"}, *({"prompt": str(n), "source": "s"} for n in range(15))]
    (tmp_path / "late.jsonl").write_text("\n".join(map(json.dumps, late)))
    dated = pyarrow.table({"chosen": ["a"] * 8, "rejected": ["b"] * 8, "when": [datetime(2026, 1, 1)] * 8})
    pyarrow.parquet.write_table(dated, tmp_path / "dated.parquet")
    (tmp_path / "sources.py").write_text(
        "def reward(completions, source, **columns):\n    return [float(len(source))] * 4"
    )
    cases = {
        "csv": ("kto", {"dataset_name": tmp_path / "kto.csv"}, "completion"),
        "renamed": ("dpo", {"dataset_name": tmp_path / "swapped.jsonl"}, "chosen: "),
        "late": ("grpo", {"dataset_name": tmp_path / "late.jsonl", "reward_funcs": tmp_path / "sources.py"}, "source"),
        "dated": ("reward", {"dataset_name": tmp_path / "dated.parquet"}, "8 examples"),
    }
    for name, (task, changes, expected) in cases.items():
        flags = flags_of(task, tmp_path / name, **changes, max_steps=1)
        if name == "late":
            at = flags.index("--dataset_columns")
            del flags[at : at + 2]
        if name == "renamed":
            flags += ["--dataset_columns", "chosen=rejected", "rejected=chosen", "--dataset_name"]
            flags += [str(tmp_path / "swapped.jsonl"), str(tmp_path / "one.jsonl"), "--eval_rows", "8"]
        status, said = run_alone(flags, tmp_path / "said.txt")
        assert status == 0, said[-3000:]
        assert expected in said
        if name == "renamed":
            better, worse = (
                int(re.search(rf"^ +{column}: (\d+)$", said, re.M)[1]) for column in ("chosen", "rejected")
            )
            assert better == worse + 1


@pytest.mark.full
def test_several_rewards_of_a_file_and_of_trl(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    flags = flags_of("grpo", tmp_path / "out", max_steps=2)
    at = flags.index("rewards.py")
    flags[at : at + 1] = ["rewards.py", "rewards.py:awaited", "think_format_reward"]
    turns = [row | {"prompt": [{"role": "user", "content": row["question"]}]} for row in ROWS["questions"]]
    (tmp_path / "turns.jsonl").write_text("\n".join(map(json.dumps, turns)))
    (tmp_path / "rewards.py").write_text(REWARDS.replace("set(one)", 'set(one[0]["content"])'))
    flags = [word.replace("rewards.py", str(tmp_path / "rewards.py")) for word in flags]
    flags += ["--dataset_name", str(tmp_path / "turns.jsonl")]
    flags.remove("prompt=question")
    flags.remove("--dataset_columns")
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 0, said[-3000:]
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]
    assert {name for name in logged if name.startswith("rewards/") and name.endswith("/mean")} == {
        "rewards/reward/mean",
        "rewards/awaited/mean",
        "rewards/think_format_reward/mean",
    }


@pytest.mark.parametrize(("max_length", "code"), [(24, 0), (4, 2)])
def test_rows_that_are_too_long_for_a_reward_model_are_counted(folder, tmp_path, monkeypatch, max_length, code):
    monkeypatch.chdir(folder)
    rows = [{"chosen": f"{n} is less", "rejected": f"{n} is more"} for n in range(8)]
    rows += [{"chosen": "less " * 20, "rejected": "more " * 20}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = flags_of("reward", tmp_path / "out", dataset_name=tmp_path / "rows.jsonl", max_length=max_length)
    status, said = run_alone([*flags, "--max_steps", "1"], tmp_path / "said.txt")
    assert status == code, said[-3000:]
    assert ("1 of 9 rows are too long, and left out" if code == 0 else "--max_length 4: every one of 9 rows is") in said


@pytest.mark.full
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("task", ["dpo", "kto", "orpo", "reward"])
def test_a_plan_of_a_task_is_what_a_step_takes(tmp_path, monkeypatch, cpu_ops, task, stage):
    """Of rows of several lengths, as plans have them, to 5%; activations are the most of it."""
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    generator = random.Random(0)
    rows = [
        {"prompt": "a" * 8, "chosen": "b" * generator.randint(40, 150), "rejected": "c" * generator.randint(40, 150)}
        | ({"completion": "d" * generator.randint(40, 150), "label": n % 2 == 0} if task == "kto" else {})
        for n in range(64)
    ]
    rows = [{name: row[name] for name in ROWS["kto"][0]} for row in rows] if task == "kto" else rows
    if task == "reward":  # which leaves out what is too long
        rows = [row | {"chosen": "b" * 55, "rejected": "c" * generator.randint(30, 55)} for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = flags_of(task, tmp_path / "out", deepspeed=stage, dataset_name="rows.jsonl", max_length=64)
    flags += [
        "--checkpointed_layers",
        "auto",
        "--gpu_memory",
        "1GiB",
        "--max_steps",
        "2",
        "--lisa_activated_layers",
        "2",
    ]
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 0, said[-3000:]
    memory = json.loads((tmp_path / "out" / "lisa_memory.json").read_text())
    measured, of_run = memory["measured"], memory["planned"]
    if task == "orpo":  # its batch is of other tensors, whose shape a run does not look at
        assert "not planned" in said
    else:
        assert of_run["peak"] == pytest.approx(measured["peak"], rel=0.03)
        assert of_run["buffers"] == pytest.approx(measured["buffers"], rel=0.01, abs=30_000)
    asked = PlanArguments(
        "model", task=task, reserve="0", seq_length=64, micro_batch_size=4, precision="fp32", checkpointed_layers="0"
    )
    planner = Planner(AutoConfig.from_pretrained("model"), asked, LisaConfig(), on_cpu=True)
    planned = planner.cheapest(stage).gpu
    assert planned.reference == (0 if task in ("orpo", "reward") else measured["weights"])
    assert planned.peak == pytest.approx(measured["peak"], rel=0.05)


SLIPS = [
    (["--task", "dop"], "--task dop: unknown; choose one of sft, dpo, kto, orpo, reward, grpo."),
    (["--task", "grpo"], "--reward_funcs is missing: give a file with a function of completions, such as rewards.py."),
    (["--task", "dpo", "--reward_funcs", "rewards.py"], "--reward_funcs rewards.py with --task dpo: it is for --task"),
    (["--task", "grpo", "--reward_funcs", "none.py"], "--reward_funcs none.py: no such file."),
    (
        ["--task", "grpo", "--reward_funcs", "rewards.py:other"],
        "--reward_funcs rewards.py:other: has no function other; it has reward, awaited, nan, fewer, raises, nothing, "
        "late; name one as rewards.py:reward.",
    ),
    (["--task", "grpo", "--reward_funcs", "broken.py"], "--reward_funcs broken.py: is not Python ("),
    (["--task", "dpo", "--dataset_name", "none.jsonl"], "--dataset_name none.jsonl: no such file."),
    (["--task", "grpo", "--reward_funcs", "rewards.py", "--loss", "logits"], "--loss logits with --task grpo: it is f"),
    (["--task", "dpo", "--packing", "true"], "--packing: no such flag;"),
    (
        ["--task", "grpo", "--reward_funcs", "fixed.py"],
        "fixed.py: reward must take all columns of the rows: def reward",
    ),
    (["--task", "grpo", "--reward_funcs", "local.py"], "local.py: has no function reward; it has other; name one as"),
]
# What is wrong with rows is found by the run, before a model is loaded.
SLIPS_OF_ROWS = [
    (
        ["--task", "dpo", "--dataset_name", "questions.jsonl"],
        "--dataset_name questions.jsonl: its columns question, answer are none of --task dpo, which takes chosen, "
        "rejected; rename them, as --dataset_columns chosen=COLUMN.",
    ),
    (
        ["--task", "dpo", "--dataset_name", "kto.jsonl"],
        "--dataset_name kto.jsonl: its columns prompt, completion, label are none of --task dpo, which takes chosen, "
        "rejected; rename them, as --dataset_columns chosen=COLUMN, or give --task kto or grpo.",
    ),
    (["--task", "orpo", "--dataset_name", "equal.jsonl"], "equal.jsonl, line 2 has the same answer as chosen and rej"),
    (["--task", "reward", "--dataset_name", "mixed.jsonl"], "mixed.jsonl, line 1 has texts and lists of turns among"),
    (["--task", "kto", "--dataset_name", "labels.jsonl"], "labels.jsonl, line 1 has the label 'yes'; it is true or fa"),
    (
        ["--task", "dpo", "--dataset_name", "late.jsonl"],
        "line 2 has prompt (a text), chosen (a text), rejected (a text);",
    ),
    (
        ["--task", "dpo", "--dataset_name", "kinds.jsonl"],
        "kinds.jsonl, line 65 has prompt (turns), chosen (turns), rej",
    ),
    (
        ["--task", "orpo", "--dataset_name", "user.jsonl"],
        "line 1 has a chosen that does not end with a turn of the ass",
    ),
    (["--task", "kto", "--dataset_name", "unsaid.jsonl"], "unsaid.jsonl, line 2 has no completion"),
    (["--task", "kto", "--dataset_name", "equal_labelled.jsonl"], "line 1 has the same answer as chosen and rejected"),
    (["--task", "dpo", "--dataset_name", "half.jsonl"], "line 2 has half of a character (a lone surrogate) in chosen"),
    (
        ["--task", "dpo", "--dataset_name", "pairs.jsonl", "--dataset_columns", "chosen=better"],
        "there is no better; its",
    ),
    (["--task", "grpo", "--reward_funcs", "rewards.py", "--dataset_name", "no_prompt.jsonl"], "has an empty prompt"),
]


@pytest.fixture(scope="module")
def bad_files(folder) -> Path:
    (folder / "broken.py").write_text("def reward(:\n")
    files = {
        "equal": [ROWS["pairs"][0], ROWS["pairs"][1] | {"rejected": "2"}],
        "mixed": [ROWS["turns"][0] | {"rejected": "0"}],
        "labels": [ROWS["kto"][0] | {"label": "yes"}],
        "late": [{"chosen": "b", "rejected": "c"}, *ROWS["pairs"]],
        "kinds": [*ROWS["pairs"], ROWS["turns"][0] | {"prompt": [{"role": "user", "content": "x"}]}],
        "user": [{name: ROWS["turns"][0][name][:1] for name in ("chosen", "rejected")}],
        "unsaid": [ROWS["kto"][0], ROWS["kto"][1] | {"completion": None}],
        "equal_labelled": [ROWS["pairs"][0] | {"rejected": "1", "label": True}],
        "no_prompt": [{"prompt": " "}],
        "half": [ROWS["pairs"][0], ROWS["pairs"][1] | {"chosen": "\ud800"}],
    }
    (folder / "fixed.py").write_text("def reward(completions):\n    return [1.0]\n")
    (folder / "local.py").write_text("def other(**columns):\n    reward = 1\n")
    (folder / "empty.jsonl").write_text("\n")
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize(("words", "problem"), SLIPS, ids=[" ".join(words)[7:50] for words, _ in SLIPS])
def test_a_slip_is_told_without_torch(bad_files, tmp_path, words, problem):
    """Before any of the large packages is imported, which -X importtime shows."""
    given = [*words, "--model_name_or_path", "model", "--output_dir", str(tmp_path / "out")]
    given += [] if "--dataset_name" in given else ["--dataset_name", "questions.jsonl"]
    given += ["--dataset_columns", "prompt=question"] if "questions.jsonl" in given and "grpo" in given else []
    command = [sys.executable, "-X", "importtime", str(BIN / "lisa-dist"), "train", *given]
    asked = {"cwd": bad_files, "env": clean_environment(), "capture_output": True, "text": True}
    finished = subprocess.run(command, **asked, timeout=100)
    imported = [line for line in finished.stderr.splitlines() if line.startswith("import time:")]
    assert finished.returncode == 2, finished.stdout
    assert problem in finished.stdout
    assert "Traceback" not in finished.stderr
    names = {line.split("|")[-1].strip() for line in imported}
    assert "yaml" in names, "the list is one of imports"
    assert not names & {"torch", "transformers", "trl", "datasets"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "problem"), SLIPS_OF_ROWS, ids=[" ".join(words)[7:50] for words, _ in SLIPS_OF_ROWS])
def test_rows_that_serve_no_run_of_a_task_are_named(bad_files, monkeypatch, words, problem):
    monkeypatch.chdir(bad_files)
    given = parser_of("train", task_of(words)).given(words)
    arguments = DataArguments(given["dataset_name"], dataset_columns=given.get("dataset_columns"))
    with pytest.raises(UserError) as error:
        load_task_data(arguments, given["task"], seed=0)
    assert problem in str(error.value)
