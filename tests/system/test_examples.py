"""The examples on two CPU ranks, the loop of one's own started as its reader would."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import save_tiny_llama
from ranks import PATIENCE, free_port
from runs import BIN, ROOT, on_two_ranks, run_well, said_by
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = ROOT / "examples"
# Three periods of one layer each, no two alike: two layers or more of the model never train.
LISA = {"lisa_activated_layers": 1, "lisa_interval_steps": 4, "lisa_sampler": "reshuffle", "lisa_debug": True}
LISA |= {"learning_rate": 3e-3}
STEPS = 12

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("cpu_ops")]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> SimpleNamespace:
    """A small real model, or without the real data a tiny one; a text of long documents and of short ones; pairs of
    which the rejected is in capitals."""
    folder = tmp_path_factory.mktemp("examples")
    data = Path(os.environ.get("LISA_DIST_DATA") or ROOT.parent / "shared" / "data")
    model = data / "models" / "stories260k-hf"
    if not model.is_dir():
        model = folder / "model"
        save_tiny_llama(model)
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))).split()
    words = [word for word in words if len(word) < 16]  # so that three of them are short
    long, short = cut(words[:3000], 1000), cut(words[3000:3600], 3)
    text = folder / "text.txt"
    text.write_text("\n".join(map(" ".join, long + short)), encoding="utf-8")
    rows = [
        {"prompt": " ".join(line[:8]), "chosen": f" {rest.lower()}", "rejected": f" {rest.upper()}"}
        for line in cut(words[:2400], 24)
        for rest in [" ".join(line[8:])]
    ]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return SimpleNamespace(model=model, text=text, pairs=pairs, rows=rows, num_long=len(long), num_short=len(short))


def cut(words: list[str], length: int) -> list[list[str]]:
    return [words[begin : begin + length] for begin in range(0, len(words), length)]


def words(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def start(launcher: list[str], flags: dict) -> str:
    """Run the loop on two ranks, as a user would, and return all that it said."""
    program, *of_launcher = launcher
    return said_by(
        [str(BIN / program), *of_launcher, str(free_port()), str(EXAMPLES / "own_loop.py"), *words(flags)], ROOT
    )


def check_what_trained(before: Path, after: Path, log: Path) -> None:
    """The saved model differs from the first one in all that the log's periods and the always-on blocks hold, only."""
    periods = [json.loads(line) for line in (log / "lisa_log.jsonl").read_text().splitlines()]
    assert [period["step"] for period in periods] == [0, 4, 8]
    active = {layer for period in periods for layer in period["layers"]}
    assert len(active) == 3
    old, new = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (before, after))
    assert old.config.num_hidden_layers > len(active)
    for (name, first), last in zip(old.named_parameters(), new.parameters(), strict=True):
        layer = re.search(r"layers\.(\d+)\.", name)
        trains = layer is None or int(layer[1]) in active
        assert torch.equal(first, last) != trains, f"{name}: {'did not move' if trains else 'moved'}; active {active}"


@torch.no_grad()
def text_loss(model: Path, text: Path) -> float:
    """The mean loss of rows of 64 tokens, with nothing of the library."""
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8")[:20_000])["input_ids"]
    rows = torch.tensor(tokens[: len(tokens) // 64 * 64]).view(-1, 64)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(input_ids=rows, labels=rows).loss.item()


@torch.no_grad()
def preference(model: Path, rows: list[dict]) -> float:
    """By how much the chosen answers are likelier than the rejected, as the mean of log-probabilities."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    total = 0.0
    for row in rows:
        for answer, sign in (("chosen", 1), ("rejected", -1)):
            tokens = tokenizer(row["prompt"] + row[answer], return_tensors="pt")["input_ids"]
            total -= sign * network(input_ids=tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
    return total / len(rows)


def own_loop_flags(given: SimpleNamespace, output_dir: Path) -> dict:
    flags = {"model": given.model, "data": given.text, "output_dir": output_dir, "batch_size": 4, "length": 64}
    return LISA | flags | {"steps": STEPS, "save_steps": 6}  # in the middle of a period


@pytest.fixture(scope="module")
def own_loop(given, tmp_path_factory) -> SimpleNamespace:
    """A whole run of the loop: its folder and the lines of its steps."""
    output_dir = tmp_path_factory.mktemp("own_loop")
    said = start(["deepspeed", "--num_gpus", "2", "--master_port"], own_loop_flags(given, output_dir))
    return SimpleNamespace(output_dir=output_dir, steps=re.findall(r"^step \d+  loss .*$", said, flags=re.MULTILINE))


@pytest.mark.xdist_group("own_loop")  # one run
def test_own_loop_trains_what_it_says(given, own_loop):
    assert len(own_loop.steps) == STEPS
    saved = own_loop.output_dir / f"checkpoint-{STEPS}"
    check_what_trained(given.model, saved, own_loop.output_dir)
    assert text_loss(saved, given.text) < text_loss(given.model, given.text) - 1.0


@pytest.mark.xdist_group("own_loop")
def test_own_loop_resumes_to_the_same_bits(given, own_loop, tmp_path):
    middle = {"resume": own_loop.output_dir / "checkpoint-6"}
    said = start(["torchrun", "--nproc-per-node", "2", "--master-port"], own_loop_flags(given, tmp_path) | middle)
    assert re.findall(r"^step \d+  loss .*$", said, flags=re.MULTILINE) == own_loop.steps[6:]
    saved, again = (sorted((path / f"checkpoint-{STEPS}").glob("model-*")) for path in (own_loop.output_dir, tmp_path))
    assert [path.read_bytes() for path in saved] == [path.read_bytes() for path in again]


def test_dpo_prefers_what_was_chosen(given, tmp_path):
    flags = LISA | {"model_name_or_path": given.model, "dataset_name": given.pairs, "output_dir": tmp_path}
    flags |= {"deepspeed": ROOT / "ds_configs" / "zero2.json", "use_cpu": True, "bf16": False, "report_to": "none"}
    flags |= {"learning_rate": 1e-4, "per_device_train_batch_size": 4, "max_length": 192, "max_steps": STEPS}
    flags |= {"logging_steps": 1, "save_strategy": "no"}
    on_two_ranks(words(flags), tmp_path, EXAMPLES / "dpo.py")
    check_what_trained(given.model, tmp_path, tmp_path)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "rewards/margins" in entry and "loss" in entry]
    assert len(steps) == STEPS
    # The reference is the model that training began with, and stays it: no margin at first, and then there is one.
    assert steps[0]["rewards/margins"] == 0
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert sum(step["rewards/margins"] for step in steps[-3:]) / 3 > 0.3
    assert sum(step["loss"] for step in steps[-3:]) / 3 < 0.6
    before, after = (preference(model, given.rows[:32]) for model in (given.model, tmp_path))
    assert after > before + 3


def test_continued_pretraining_splits_packs_and_learns(given, tmp_path):
    flags = LISA | {"config": EXAMPLES / "continued_pretraining" / "recipe.yaml", "model_name_or_path": given.model}
    flags |= {"dataset_name": given.text, "output_dir": tmp_path, "gpu_memory": "4GiB", "bf16": False}
    flags |= {"max_length": 64, "global_batch_size": 8, "max_steps": STEPS, "eval_rows": 8, "report_to": "none"}
    flags |= {"logging_steps": 1, "save_strategy": "no"}
    said = on_two_ranks(words(flags), tmp_path)
    assert f"text.txt: text (text), {given.num_long + given.num_short} examples" in said
    assert re.search(rf"examples have more than 64 tokens .*: {given.num_long} split into \d+", said), said[-5000:]
    check_what_trained(given.model, tmp_path, tmp_path)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    tokens = max(entry.get("num_tokens", 0) for entry in history)
    assert tokens > 0.8 * STEPS * 8 * 64
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert held_out[-1] < held_out[0] - 0.5
    assert text_loss(tmp_path, given.text) < text_loss(given.model, given.text) - 0.5


@pytest.mark.parametrize(
    ("place", "said"), [(0, "step     4  period    1  active layers"), (1, "step 5 layers")], ids=["trainer", "loop"]
)
def test_what_the_readme_prints_runs_as_it_stands(tmp_path, given, place, said):
    """Under plain python, in a shell that knows of no rank."""
    (tmp_path / ".quickstart").mkdir()
    (tmp_path / ".quickstart" / "model").symlink_to(given.model)
    (tmp_path / "pairs.jsonl").symlink_to(given.pairs)
    (tmp_path / "text.txt").write_text("\n".join(f"Once there were {n} friends." for n in range(20)), encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "script.py").write_text(snippets[place], encoding="utf-8")
    kept = ("PATH", "HOME", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONPATH")
    environment = {name: os.environ[name] for name in (*kept, "TORCH_EXTENSIONS_DIR") if name in os.environ}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": PATIENCE}
    ran = subprocess.run([sys.executable, "script.py"], **options)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert said in ran.stdout
    saved = tmp_path / ("model" if place == 0 else "runs/loop/checkpoint")
    trained = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    begun = AutoModelForCausalLM.from_pretrained(given.model).state_dict()
    moved = [name for name, value in trained.items() if not torch.equal(value, begun[name])]
    assert any("embed_tokens" in name for name in moved)
    assert any(".layers." in name for name in moved)


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    """As a script, with nothing to display; `make release` runs it cell by cell, from the wheel."""
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    save_tiny_llama(tmp_path / "model")
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells[0].startswith('MODEL = "')
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    shown = "import sys, types\nsys.modules['IPython'] = sys.modules['IPython.display'] = types.SimpleNamespace("
    shown += "HTML=lambda text: text[:20], Image=lambda path: path.stat().st_size, display=print)"
    (tmp_path / "cells.py").write_text("\n".join([shown, f'MODEL = "{tmp_path / "model"}"', *cells[1:]]))
    monkeypatch.chdir(tmp_path)
    all_of_it = run_well([], tmp_path, tmp_path / "cells.py")
    for said in ("lisa-dist train --gpus 1", "layers by period: [[", "held-out loss: [", "<iframe", "'assistant'"):
        assert said in all_of_it, said
