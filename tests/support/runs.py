"""Training runs as a user starts them, by any launcher or in a forked process, and what each leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_tiny_llama
from ranks import OF_RANKS, PATIENCE, free_port, start_script
from transformers import AutoModelForCausalLM

from lisa_dist.errors import UserError

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TRAIN = ROOT / "launch" / "train.py"


def clean_environment() -> dict[str, str]:
    """Without what a parse in this process has set to make it the only rank."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    return environment | {"PATH": f"{BIN}:{environment['PATH']}"}


def said_by(command: list[str], folder: Path | None = None, **variables: str) -> str:
    """What a command said that a user starts in a folder, and that ends well."""
    options = {"cwd": folder, "env": clean_environment() | variables, "text": True, "timeout": PATIENCE}
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert finished.returncode == 0, finished.stdout[-6000:]
    return finished.stdout


def start_deepspeed(flags: list[str]) -> str:
    """Run launch/train.py on two ranks as a user would; what it said."""
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    return said_by([*launcher, str(TRAIN), *flags])


def save_tiny_run(folder: Path) -> Path:
    """A tiny model with a byte tokenizer and a chat template, and some rows, where `flags_for` has them."""
    save_tiny_llama(folder / "model")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(64)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


class Alone:
    """A run in a process of its own that has all imports already, for what a run does once it has begun.

    Without `report` it writes none, which takes matplotlib longer than all else of a tiny run.
    """

    def __init__(self, words: list[str], output: Path, script: Path, report: bool = False, **variables: str):
        output.touch()
        self._output = output
        variables |= {} if report else {"WITHOUT_REPORT": "1"}
        self.process = start_script(script, words, output, clean_environment() | variables, Path.cwd())

    @property
    def said(self) -> str:
        return self._output.read_text()

    def wait(self) -> int | None:
        """Its exit code."""
        self.process.join(timeout=PATIENCE)
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def run_alone(flags: list[str], output: Path, script: Path = TRAIN, report: bool = False) -> tuple[int, str]:
    """The exit code of a run of one rank, and what it said."""
    run = Alone(flags, output, script, report)
    return run.wait(), run.said


def run_well(flags: list[str], folder: Path, script: Path = TRAIN, report: bool = False) -> str:
    """What a run of one rank said that ends well."""
    status, said = run_alone(flags, folder / "said.txt", script, report)
    assert status == 0, said[-3000:]
    return said


def on_two_ranks(flags: list[str], folder: Path, script: Path = TRAIN, report: bool = False, status: int = 0) -> str:
    """A run of two ranks to its end, with this exit code; what rank 0 said."""
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    outputs = {str(rank): folder / f"{rank}.txt" for rank in range(2)}
    meet |= {"LOCAL_WORLD_SIZE": "2"}
    ranks = [Alone(flags, at, script, report, RANK=rank, LOCAL_RANK=rank, **meet) for rank, at in outputs.items()]
    codes = [rank.wait() for rank in ranks]
    assert codes == [status] * 2, "".join(
        f"{code}: {rank.said[-3000:]}" for code, rank in zip(codes, ranks, strict=True)
    )
    return ranks[0].said


def flags_for(folder: Path, output_dir: Path, **changes) -> list[str]:
    values = {"model_name_or_path": folder / "model", "dataset_name": folder / "rows.jsonl", "output_dir": output_dir}
    values |= {"eval_rows": 8, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 5, "max_steps": 5}
    values |= {"lisa_preset": "none", "lisa_interval_steps": 2, "lisa_debug": True, "per_device_train_batch_size": 2}
    values |= {"max_length": 32, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    values |= changes
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def refused(call, *arguments) -> str:
    """The message of what is refused, which is one line."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def check_run(said: str, out: Path, periods_begin: list[int]) -> None:
    """What every run says and leaves behind."""
    lines = ["sdpa (no CUDA device)", "active at a time", "held-out loss", "period    2  active layers:"]
    for line in (*lines, "logits of the positions with a label, computed once (auto: "):
        assert line in said, line
    periods = [json.loads(line) for line in (out / "lisa_log.jsonl").read_text().splitlines()]
    assert [period["step"] for period in periods] == periods_begin
    assert json.loads((out / "lisa_run.json").read_text())["loss"] in said
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert held_out[-1] < held_out[0]
    AutoModelForCausalLM.from_pretrained(out)
    saved = {path.name for path in out.iterdir()}
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json", "model.safetensors"} <= saved
    assert "lisa_run.lock" not in saved, "the folder is released"
    assert {"report.html", "report", "lisa_run.json", "lisa_memory.json", "lisa_movement.jsonl"} <= saved


def python_files(folder: Path) -> list[Path]:
    """Return the modules below a folder, without those behind links to other folders of the project."""
    return [path for path in sorted(folder.rglob("*.py")) if not any(parent.is_symlink() for parent in path.parents)]
