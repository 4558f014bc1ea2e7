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
from cases import full
from eval_files import write_lines
from models import save_tiny_llama
from ranks import PATIENCE
from runs import BIN, clean_environment, on_two_ranks, run_alone, run_well
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lisa_dist import cli
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
NUMBERS = range(64)
ASKED = [{"role": "user", "content": "1 + 1?"}]
ROWS = {
    "pairs": [{"prompt": f"{n} + 1? ", "chosen": str(n + 1), "rejected": str(n)} for n in NUMBERS],
    "turns": [
        {name: [*ASKED, {"role": "assistant", "content": str(m)}] for name, m in (("chosen", n + 1), ("rejected", n))}
        for n in NUMBERS
    ],
    "kto": [{"prompt": f"{n} + 1? ", "completion": str(n + n % 2), "label": bool(n % 2)} for n in NUMBERS],
    "questions": [{"question": f"{n} + 1? ", "answer": str(n + 1)} for n in NUMBERS],
}
OF_TASK = {
    "dpo": {"dataset_name": "pairs.jsonl"},
    "kto": {"dataset_name": "kto.jsonl"},
    "orpo": {"dataset_name": "turns.jsonl"},
    "reward": {"dataset_name": "turns.jsonl"},
    "grpo": {"dataset_name": "questions.jsonl", "dataset_columns": "prompt=question", "reward_funcs": "rewards.py"},
}
OF_TASK["grpo"] |= {"num_generations": 4, "max_completion_length": 8}
SETTINGS = {"model_name_or_path": "model", "per_device_train_batch_size": 4, "max_steps": 6, "report_to": "none"}
SETTINGS |= {"lisa_activated_layers": 1, "lisa_interval_steps": 2, "lisa_sampler": "reshuffle", "lisa_debug": True}
SETTINGS |= {"learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cpu_ops) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    save_tiny_llama(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    for name, rows in ROWS.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


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
def test_the_task_is_that_of_the_words_or_of_their_recipe(folder, words, task):
    (folder / "of_grpo.yaml").write_text("task: grpo\n")
    assert task_of(words) == task


def test_there_is_a_case_for_each_task():
    assert {SFT, *OF_TASK} == set(TASKS)


@pytest.mark.parametrize(
    ("task", "stage", "changes"),
    [
        ("dpo", "zero2", {}),
        full("dpo", "zero3", {"lisa_adapters": 4}),  # beside a reference model, since the weights below them change
        *(full("grpo", stage, {}) for stage in ("zero2", "zero3")),
        *(full("kto", "zero3", {}), full("orpo", "zero2", {}), full("reward", "zero3", {"lisa_adapters": 4})),
    ],
)
def test_a_task_trains_switches_and_resumes_on_two_ranks(folder, tmp_path, task, stage, changes):
    changes |= {"deepspeed": stage}
    said = on_two_ranks(flags_of(task, tmp_path / "out", **changes), tmp_path, report=True)
    assert f"{task}: {TASKS[task].what}" in said
    periods = [json.loads(line) for line in (tmp_path / "out" / "lisa_log.jsonl").read_text().splitlines()]
    assert [period["step"] for period in periods] == [0, 2, 4]
    layers = [period["layers"] for period in periods]
    assert len({layer for period in layers for layer in period}) == 3

    assert ("a model of its own: the weights below --lisa_adapters" in said) == (task == "dpo" and len(changes) > 1)
    if task == "dpo":  # what trains is the reference at first
        first = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    start, after = weights_of(folder / "model"), weights_of(tmp_path / "out")
    assert set(start) - set(after) <= ({"lm_head.weight"} if task == "reward" else set())
    for name in start.keys() & after.keys():
        layer = re.search(r"layers\.(\d+)\.", name)
        trains = layer is None or [int(layer[1])] in layers or ("lisa_adapters" in changes and "norm" not in name)
        assert torch.equal(start[name], after[name]) != trains, name

    resume = {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-3"}  # in the middle of a period
    said = on_two_ranks(flags_of(task, tmp_path / "again", **changes, **resume), tmp_path, report=True)
    assert "resumed from" in said
    again = weights_of(tmp_path / "again")
    assert after.keys() == again.keys()
    assert all(torch.equal(after[name], again[name]) for name in after)
    model_class = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    model, loading = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert task != "reward" or model.config.num_labels == 1


@pytest.mark.parametrize("task", [full(task) if task != "grpo" else task for task in OF_TASK])
@pytest.mark.parametrize("method", [full("full"), "lora"])
def test_other_methods_train_it_too(folder, tmp_path, task, method):
    run_well(flags_of(task, tmp_path / "out", method=method, max_steps=2), tmp_path)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    saved = tmp_path / "out" / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    names = load_file(saved).keys()
    assert task != "reward" or any("score" in name for name in names)


@pytest.mark.full
def test_pairs_serve_kto_and_a_text_and_turns_serve_all(folder, tmp_path):
    for task, rows in (("kto", "pairs"), ("dpo", "turns"), ("reward", "pairs"), ("orpo", "pairs")):
        flags = flags_of(task, tmp_path / task, dataset_name=f"{rows}.jsonl", eval_rows=8, eval_strategy="epoch")
        said = run_well([*flags, "--max_steps", "1"], tmp_path)
        assert "held out: 8 of these examples" in said


@pytest.mark.full
def test_a_loss_that_trl_does_not_have_ends_the_run_in_one_line(folder, tmp_path):
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
def test_a_reward_that_is_none_ends_the_run_in_one_line(folder, tmp_path, function, problem):
    flags = flags_of("grpo", tmp_path / "out", reward_funcs=f"rewards.py:{function}")
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 2
    assert said.splitlines()[-1].startswith(f"lisa-dist: --reward_funcs rewards.py:{function}: {problem}")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("task", "flag", "problem"),
    [
        ("dpo", "--label_smoothing_factor 0.5", "the loss of this task has"),
        ("dpo", "--sync_ref_model True", "a checkpoint has no reference model, and"),
        ("kto", "--per_device_train_batch_size 1", "it compares the"),
        ("grpo", "--lisa_activated_layers auto", "no step of it can be planned"),
        ("grpo", "--checkpointed_layers auto", "no step of it can be planned"),
        ("reward", "--sample_prompt x", "a reward model gives scores, not answers;"),
    ],
)
def test_what_a_task_does_not_take_is_said_before_a_model_is_loaded(tmp_path, task, flag, problem):
    with pytest.raises(UserError) as refused:
        check_config(parse_arguments([*flags_of(task, tmp_path / "out"), *flag.split()]))
    assert str(refused.value).startswith(f"{flag.removesuffix(' x')} with --task {task}: {problem}")


@pytest.mark.full
def test_a_resume_knows_its_task_its_reference_and_its_answers(folder, tmp_path):
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
def test_answers_of_layers_on_the_host_are_those_of_layers_on_the_device(folder, tmp_path):
    for name, changes in {"device": {}, "host": {"lisa_offload": "frozen"}}.items():
        status, said = run_alone(flags_of("grpo", tmp_path / name, bf16=True, **changes), tmp_path / "said.txt")
        assert status == 0, said[-3000:]
        assert ("two layers at a time" in said) == (name == "host")
    device, host = weights_of(tmp_path / "device"), weights_of(tmp_path / "host")
    assert all(torch.equal(device[name], host[name]) for name in device)


@pytest.mark.full
def test_rows_of_every_shape_that_can_be_trained_on(folder, tmp_path):
    """Renamed where both names are there, labels of a CSV, keys that the first row lacks, dates beside, a source left
    without rows."""
    (tmp_path / "kto.csv").write_text("prompt,completion,label\n" + "a,b,true\nc,d,False\n" * 8)
    swapped = [{"chosen": str(n), "rejected": str(n + 1)} for n in range(16)]
    write_lines(tmp_path / "swapped.jsonl", swapped)
    write_lines(tmp_path / "one.jsonl", [swapped[0] | {"rejected": "x"}])
    write_lines(tmp_path / "late.jsonl", [{"prompt": "1"}, *({"prompt": str(n), "source": "s"} for n in range(15))])
    dated = pyarrow.table({"chosen": ["a"] * 8, "rejected": ["b"] * 8, "when": [datetime(2026, 1, 1)] * 8})
    pyarrow.parquet.write_table(dated, tmp_path / "dated.parquet")
    sources = "def reward(completions, source, **columns):\n    return [float(len(source))] * 4"
    (tmp_path / "sources.py").write_text(sources)
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
        said = run_well(flags, tmp_path)
        assert expected in said
        if name == "renamed":
            better, worse = (re.search(rf"^ +{column}: (\d+)$", said, re.M)[1] for column in ("chosen", "rejected"))
            assert int(better) == int(worse) + 1


@pytest.mark.full
def test_several_rewards_of_a_file_and_of_trl(folder, tmp_path):
    write_lines(tmp_path / "turns.jsonl", [{"prompt": ASKED, "answer": "2"} for _ in NUMBERS])
    rewards = tmp_path / "rewards.py"
    rewards.write_text(REWARDS.replace("set(one)", 'set(one[0]["content"])'))
    flags = flags_of("grpo", tmp_path / "out", dataset_name=tmp_path / "turns.jsonl", max_steps=2)
    del flags[(at := flags.index("--dataset_columns")) : at + 2]
    flags += ["--reward_funcs", str(rewards), f"{rewards}:awaited", "think_format_reward"]
    run_well(flags, tmp_path)
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]
    names = {name.split("/")[1] for name in logged if name.startswith("rewards/") and name.endswith("/mean")}
    assert names == {"reward", "awaited", "think_format_reward"}


@pytest.mark.parametrize(("max_length", "code"), [(24, 0), full(4, 2)])
def test_rows_that_are_too_long_for_a_reward_model_are_counted(folder, tmp_path, max_length, code):
    rows = [{"chosen": f"{n} is less", "rejected": f"{n} is more"} for n in range(8)]
    rows += [{"chosen": "less " * 20, "rejected": "more " * 20}]
    write_lines(tmp_path / "rows.jsonl", rows)
    flags = flags_of("reward", tmp_path / "out", dataset_name=tmp_path / "rows.jsonl", max_length=max_length)
    status, said = run_alone([*flags, "--max_steps", "1"], tmp_path / "said.txt")
    assert status == code, said[-3000:]
    assert ("1 of 9 rows are too long, and left out" if code == 0 else "--max_length 4: every one of 9 rows is") in said


@pytest.mark.full
@pytest.mark.parametrize(
    ("task", "stage"), [("dpo", "zero2"), ("dpo", "zero3"), ("kto", "zero3"), ("orpo", "zero2"), ("reward", "zero2")]
)
def test_a_plan_of_a_task_is_what_a_step_takes(tmp_path, task, stage):
    """Rows have several lengths, as plans have them; it agrees to 5%, and activations are the most of it."""
    generator = random.Random(0)
    rows = [
        {"prompt": "a" * 8, "chosen": "b" * generator.randint(40, 150), "rejected": "c" * generator.randint(40, 150)}
        | ({"completion": "d" * generator.randint(40, 150), "label": n % 2 == 0} if task == "kto" else {})
        for n in range(64)
    ]
    rows = [{name: row[name] for name in ROWS["kto"][0]} for row in rows] if task == "kto" else rows
    if task == "reward":  # which leaves out what is too long
        rows = [row | {"chosen": "b" * 55, "rejected": "c" * generator.randint(30, 55)} for row in rows]
    write_lines(tmp_path / "rows.jsonl", rows)
    changes = {"dataset_name": tmp_path / "rows.jsonl", "max_length": 64, "checkpointed_layers": "auto"}
    changes |= {"gpu_memory": "1GiB", "max_steps": 2, "lisa_activated_layers": 2}
    said = run_well(flags_of(task, tmp_path / "out", deepspeed=stage, **changes), tmp_path)
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
    planner = Planner(AutoConfig.from_pretrained("model"), asked, LisaConfig.plain(), on_cpu=True)
    planned = planner.cheapest(stage).gpu
    assert planned.reference == (0 if task in ("orpo", "reward") else measured["weights"])
    assert planned.peak == pytest.approx(measured["peak"], rel=0.05)


SLIPS = [
    ("--task dop", "--task dop: unknown; choose one of sft, dpo, kto, orpo, reward, grpo."),
    ("--task grpo", "--reward_funcs is missing: give a file with a function of completions, such as rewards.py."),
    ("--task dpo --reward_funcs rewards.py", "--reward_funcs rewards.py with --task dpo: it is for --task"),
    ("--task grpo --reward_funcs none.py", "--reward_funcs none.py: no such file."),
    (
        "--task grpo --reward_funcs rewards.py:other",
        "--reward_funcs rewards.py:other: has no function other; it has reward, awaited, nan, fewer, raises, nothing, "
        "late; name one as rewards.py:reward.",
    ),
    ("--task grpo --reward_funcs broken.py", "--reward_funcs broken.py: is not Python ("),
    ("--task dpo --dataset_name none.jsonl", "--dataset_name none.jsonl: no such file."),
    ("--task grpo --reward_funcs rewards.py --loss logits", "--loss logits with --task grpo: it is f"),
    ("--task dpo --packing true", "--packing: no such flag;"),
    ("--task grpo --reward_funcs fixed.py", "fixed.py: reward must take all columns of the rows: def reward"),
    ("--task grpo --reward_funcs local.py", "local.py: has no function reward; it has other; name one as"),
]
# What is wrong with rows is found by the run, before a model is loaded.
NONE_OF_DPO = "are none of --task dpo, which takes chosen, rejected; rename them, as --dataset_columns chosen=COLUMN"
SLIPS_OF_ROWS = [
    ("dpo", "questions", f"--dataset_name questions.jsonl: its columns question, answer {NONE_OF_DPO}."),
    ("dpo", "kto", f"its columns prompt, completion, label {NONE_OF_DPO}, or give --task kto or grpo."),
    ("orpo", "equal", "equal.jsonl, line 2 has the same answer as chosen and rej"),
    ("reward", "mixed", "mixed.jsonl, line 1 has texts and lists of turns among"),
    ("kto", "labels", "labels.jsonl, line 1 has the label 'yes'; it is true or fa"),
    ("dpo", "late", "line 2 has prompt (a text), chosen (a text), rejected (a text);"),
    ("dpo", "kinds", "kinds.jsonl, line 65 has prompt (turns), chosen (turns), rej"),
    ("orpo", "user", "line 1 has a chosen that does not end with a turn of the ass"),
    ("kto", "unsaid", "unsaid.jsonl, line 2 has no completion"),
    ("kto", "equal_labelled", "line 1 has the same answer as chosen and rejected"),
    ("dpo", "half", "line 2 has half of a character (a lone surrogate) in chosen"),
    ("dpo", "pairs", "there is no better; its"),
    ("grpo", "no_prompt", "has an empty prompt"),
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
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


def with_a_slip(slip: str, output_dir: Path) -> list[str]:
    """A command line with it."""
    words = ["lisa-dist", "train", *slip.split(), "--model_name_or_path", "model", "--output_dir", str(output_dir)]
    words += [] if "--dataset_name" in words else ["--dataset_name", "questions.jsonl"]
    return words + (["--dataset_columns", "prompt=question"] if "grpo" in words else [])


@pytest.mark.parametrize(("slip", "problem"), SLIPS, ids=[slip for slip, _ in SLIPS])
def test_a_slip_is_told_before_the_verb_is_imported(bad_files, tmp_path, monkeypatch, capsys, slip, problem):
    monkeypatch.setattr(cli, "import_verb", None)
    monkeypatch.setattr(sys, "argv", with_a_slip(slip, tmp_path / "out"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert problem in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("slip", [full(SLIPS[0][0]), full(SLIPS[6][0]), SLIPS[9][0]])
def test_no_large_package_is_imported_for_it(bad_files, tmp_path, slip):
    program, *words = with_a_slip(slip, tmp_path / "out")
    command = [sys.executable, "-X", "importtime", str(BIN / program), *words]
    asked = {"cwd": bad_files, "env": clean_environment(), "capture_output": True, "text": True}
    finished = subprocess.run(command, **asked, timeout=PATIENCE)
    assert finished.returncode == 2, finished.stdout
    assert "Traceback" not in finished.stderr
    imported = [line for line in finished.stderr.splitlines() if line.startswith("import time:")]
    names = {line.split("|")[-1].strip() for line in imported}
    assert "yaml" in names, "the list is one of imports"
    assert not names & {"torch", "transformers", "trl", "datasets"}


@pytest.mark.parametrize(
    ("task", "rows", "problem"), SLIPS_OF_ROWS, ids=[f"{one} {two}" for one, two, _ in SLIPS_OF_ROWS]
)
def test_rows_that_serve_no_run_of_a_task_are_named(bad_files, task, rows, problem):
    columns = ["chosen=better"] if rows == "pairs" else None
    with pytest.raises(UserError) as error:
        load_task_data(DataArguments([f"{rows}.jsonl"], dataset_columns=columns), task, seed=0)
    assert problem in str(error.value)
