"""What DeepSpeed's C++ ops leave behind."""

import fcntl
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from deepspeed.ops.op_builder.builder import OpBuilder
from models import save_tiny_llama, tiny_llama
from ranks import PATIENCE, free_port, run_ranks
from runs import TRAIN, Alone, flags_for
from torch import distributed as dist

import lisa_dist
from lisa_dist.distributed import signals
from lisa_dist.zero.cpu_ops import built_alone, guard_builds


def names_left() -> list[str]:
    port = os.environ["MASTER_PORT"]  # which DeepSpeed has in the name
    # Ranks of the tests have released DeepSpeed's at their start: a file of that name takes its place.
    run = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{port}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{run}_{dist.get_rank()}").touch()
    engine, _ = lisa_dist.initialize(tiny_llama(), "zero2", lisa_dist.LisaConfig.plain())
    dist.barrier()
    left = [path.name for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")]
    dist.barrier()
    engine.destroy()
    return left


@pytest.mark.usefixtures("cpu_ops")
def test_no_shared_memory_outlives_the_ranks():
    """Its names are gone while the ranks still use it, so that a killed rank leaves none of it."""
    assert run_ranks(names_left, 2) == [[], []]


KILLED = """
import os, signal
from lisa_dist.commands.train import main
from lisa_dist.run import run

run.load_processing = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main()
"""


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("end", ["refused", "killed"])
def test_a_run_that_ends_before_its_first_step_leaves_no_shared_memory(tmp_path, end):
    save_tiny_llama(tmp_path / "model")
    (tmp_path / "killed.py").write_text(KILLED)
    port = free_port()
    meet = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    script = TRAIN if end == "refused" else tmp_path / "killed.py"
    words = flags_for(tmp_path, tmp_path / "out")  # whose rows are not there
    ranks = [Alone(words, tmp_path / f"{rank}.txt", script, RANK=rank, LOCAL_RANK=rank, **meet) for rank in ("0", "1")]
    codes = [rank.wait() for rank in ranks]
    said = "".join(rank.said for rank in ranks)
    assert codes == ([2, 2] if end == "refused" else [-9, -9]), said
    if end == "refused":
        assert [line for line in said.splitlines() if line.startswith("lisa-dist")] == [
            f"lisa-dist: --dataset_name {tmp_path / 'rows.jsonl'}: no such file."
        ]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


class Op(OpBuilder):
    """Looks around where it would be compiled."""

    def __init__(self, folder: Path):
        super().__init__("some_op")
        self._folder = folder

    def is_compatible(self, verbose: bool = False) -> bool:
        assert not (self._folder / "some_op" / "lock").exists(), "torch would wait for it without end"
        with (self._folder / "some_op.lisa_dist_lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "nothing is there to save"
        return False

    def absolute_name(self) -> str:
        return self.name

    def sources(self) -> list[str]:
        return []


def test_a_build_that_was_cut_is_taken_over(tmp_path, monkeypatch):
    """Once no compiler works there any more, which may outlive its process."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some_op").mkdir()
    (tmp_path / "some_op" / "lock").touch()
    ninja = shutil.copy(str(shutil.which("sleep")), tmp_path / "ninja")
    compiler = subprocess.Popen([ninja, "1"], cwd=tmp_path / "some_op")
    other = subprocess.Popen(["sleep", str(PATIENCE)], cwd=tmp_path / "some_op")  # which builds nothing
    before = signals.catch_stop_signals()
    try:
        guard_builds()
        with pytest.raises(RuntimeError, match="Unable to JIT load the some_op op"):
            Op(tmp_path).load(verbose=False)
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        other.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert compiler.poll() == 0


def test_it_is_said_what_is_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    said, deadline = "", time.monotonic() + PATIENCE
    with built_alone("some_op", silent=0):
        while not said and time.monotonic() < deadline:
            said = capsys.readouterr().out
    assert said == f"compiling some_op of DeepSpeed in {tmp_path}, here or elsewhere, once: a minute or two\n"
    assert capsys.readouterr().out.startswith("some_op was there after ")
    with built_alone("some_op"):
        pass
    assert not capsys.readouterr().out, "it was there"
