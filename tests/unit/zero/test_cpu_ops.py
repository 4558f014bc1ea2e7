"""What DeepSpeed's C++ ops leave behind."""

import os
from pathlib import Path

import pytest
from models import save_tiny_llama, tiny_llama
from ranks import free_port, run_ranks
from runs import TRAIN, Alone, flags_for
from torch import distributed as dist

import lisa_dist
from lisa_dist.zero.cpu_ops import forget_cut_builds


def names_left() -> list[str]:
    port = os.environ["MASTER_PORT"]  # which DeepSpeed has in the name
    # Ranks of the tests have released DeepSpeed's at their start: a file of that name takes its place.
    run = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{port}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{run}_{dist.get_rank()}").touch()
    engine, _ = lisa_dist.initialize(tiny_llama(), "zero2", lisa_dist.LisaConfig())
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
from lisa_dist.train import run

run.set_chat_template = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
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


def test_a_lock_of_a_build_that_was_cut_goes_and_a_younger_one_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cut, younger = (tmp_path / name / "lock" for name in ("cpu_adam", "deepspeed_shm_comm"))
    for lock in (cut, younger):
        lock.parent.mkdir()
        lock.touch()
    an_hour_ago = younger.stat().st_mtime - 3600
    os.utime(cut, (an_hour_ago, an_hour_ago))
    forget_cut_builds()
    assert not cut.exists()
    assert younger.exists()
    assert capsys.readouterr().out == (f"waiting for another build of it to end; if there is none, remove {younger}\n")
