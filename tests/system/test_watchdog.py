"""Real processes that are killed, stopped or raise: the others end soon and name the rank; signals are agreed on."""

import itertools
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from cases import full
from ranks import PATIENCE, free_port


def rank_main(how: str, victim: int) -> None:
    """A training loop without a model: what this file starts two of."""
    import torch
    from torch import distributed as dist

    from lisa_dist.distributed import signals as stop_signals
    from lisa_dist.distributed.watchdog import Watchdog

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test run in the background ignores
    if how == "fork, signalled at once":  # before the library's hook: after a fork they run as they were registered
        os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
    dist.init_process_group("gloo")
    mine = dist.get_rank() == victim
    hang_timeout = {"off": 0, "twice": 60, "stop late": 10, "at end": 60}.get(how, 3)
    if how == "stall" and mine:
        hang_timeout = 60  # else it may end first, and is named for that
    if how == "slow store" and mine:
        ask = dist.TCPStore.set
        dist.TCPStore.set = lambda *given: (time.sleep(2), ask(*given))
    if how in ("command", "twice"):
        stop_signals.catch_stop_signals()
    with stop_signals.StopSignals() as stop, Watchdog(hang_timeout) as watchdog:
        for step in range(40):
            if how == "slow store" and mine and step == 5:
                time.sleep(1.5)  # a sign of life is on its way when the block ends
            if how == "slow store" and step == 6:
                break
            if how == "nothing":  # in a script or a notebook Ctrl-C is an exception, as ever
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            watchdog.beat()
            dist.all_reduce(torch.ones(1))
            stopped_by = stop.agree()
            if stopped_by is not None:
                print(f"{stopped_by} after step {step}", flush=True)
                break
            if step == 5 and how == "twice" and not mine:
                time.sleep(100)
            if step == 5 and mine:
                print("now", flush=True)
                if how in ("SIGKILL", "SIGSTOP"):
                    os.kill(os.getpid(), getattr(signal, how))
                elif how == "stop late":
                    time.sleep(4)  # after 10 seconds without a step it has then been silent for 5 to 8
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif how == "raise":
                    raise ValueError("a bad row")
                elif how == "stall":
                    time.sleep(100)
                elif how == "fork":
                    with multiprocessing.get_context("fork").Pool(1) as pool:  # ends by SIGTERM to its worker
                        pool.apply(int)  # so that the worker has begun; the case below is of one that has not
                        pool.apply_async(time.sleep, (100,))
                elif how == "command":  # Ctrl-C reaches workers too, whose rows the last steps need
                    child = os.fork()
                    if not child:
                        os.kill(os.getpid(), signal.SIGINT)
                        os._exit(3)
                    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
                    os.kill(os.getpid(), signal.SIGINT)
                elif how == "fork, signalled at once":
                    for _ in range(2):
                        child = os.fork()
                        if not child:
                            os._exit(3)
                        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
                        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "blocked for ever"
                elif how == "fork, and train":
                    stop_signals._received.append((signal.SIGUSR1, 0.0))  # which is the parent's, and long ago
                    child = os.fork()
                    if not child:
                        os._exit(train_in_child())
                    stop_signals._received.clear()
                    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
                elif how == "twice":
                    dist.barrier()  # alone: the main thread does not come back
            time.sleep(0.05)
        if how == "at end" and mine:
            time.sleep(2)  # for the other rank to wait at the end of the block
            os.kill(os.getpid(), signal.SIGKILL)
    if how == "slow store" and mine:
        time.sleep(2.5)  # for a request that is on its way
    dist.barrier()
    dist.destroy_process_group()
    print("ended", flush=True)


def train_in_child() -> int:
    """What a signal does in a forked process that catches it too."""
    from lisa_dist.distributed import signals as stop_signals

    stop_signals.catch_stop_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while not stop_signals._received and time.monotonic() < deadline:
        time.sleep(0.01)
    if os.fork() == 0:
        os._exit(0)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return 4 if stop_signals._received and not blocked else 5


def start(how: str, victim: int, tmp_path: Path) -> list:
    from runs import Alone  # not for the ranks, which are this file too

    tmp_path.mkdir(exist_ok=True)
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(2):
        (tmp_path / f"{rank}.err").touch()
        words = [how, str(victim), str(tmp_path / f"{rank}.err")]
        ranks.append(Alone(words, tmp_path / f"{rank}.out", Path(__file__), RANK=str(rank), **meet))
    return ranks


def wait_for(tmp_path: Path, rank: int, words: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while words not in (tmp_path / f"{rank}.out").read_text():
        assert time.monotonic() < deadline, (tmp_path / f"{rank}.err").read_text()
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGKILL", "rank(s) [{}] no longer answer: they were killed or have stopped"),
        full("SIGSTOP", "rank(s) [{}] have given no sign of life for 3 s"),
        full("stop late", "rank(s) [{}] have given no sign of life for 3 s"),
        full("at end", "rank(s) [{}] no longer answer: they were killed or have stopped"),
        ("raise", "rank {} has failed: ValueError: a bad row"),
        full("stall", "no step for 3 s (--hang_timeout); furthest behind: rank(s) [{}]"),
    ],
)
def test_the_other_rank_ends_and_names_it(tmp_path, how, said):
    runs = []
    try:
        for victim in range(2):  # at once: most of it is waiting
            runs.append(start(how, victim, tmp_path / str(victim)))
        for victim, ranks in enumerate(runs):
            wait_for(tmp_path / str(victim), victim, "now")
            assert ranks[1 - victim].wait() == 1
            if how == "raise":
                assert ranks[victim].wait() == 1, "by itself"
    finally:
        for rank in itertools.chain(*runs):
            rank.process.kill()
    for victim in range(2):
        errors = (tmp_path / str(victim) / f"{1 - victim}.err").read_text()
        assert f"lisa-dist, rank {1 - victim}: {said.format(victim)}" in errors
        assert "--resume_from_checkpoint true" in errors


@pytest.mark.parametrize("how", ["nothing", full("off")])
def test_without_a_fault_both_end_well(tmp_path, how):
    assert [rank.wait() for rank in start(how, 0, tmp_path)] == [0, 0]
    assert [(tmp_path / f"{rank}.out").read_text().split()[-1] for rank in range(2)] == ["ended"] * 2


@pytest.mark.parametrize("how", ["fork", full("fork, signalled at once"), full("fork, and train")])
def test_a_worker_ends_by_sigterm_and_the_run_goes_on(tmp_path, how):
    ranks = start(how, 0, tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0], (tmp_path / "0.err").read_text()
    assert "SIGTERM" not in (tmp_path / "0.out").read_text()


@pytest.mark.parametrize(("number", "victim"), [full(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_a_signal_to_one_rank_ends_all_after_the_same_step(tmp_path, number, victim):
    ranks = start("nothing", victim, tmp_path)
    wait_for(tmp_path, victim, "now")
    for _ in range(2):  # passed on twice
        os.kill(ranks[victim].process.pid, number)
    assert [rank.wait() for rank in ranks] == [0, 0]
    said = [(tmp_path / f"{rank}.out").read_text().replace("now\n", "") for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith(f"{number.name} after step ")


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_sigterm_that_stands_for_ctrl_c_is_called_sigint(tmp_path, monkeypatch, is_interrupted):
    """As the process that was given --gpus passes Ctrl-C on."""
    monkeypatch.setenv("LISA_DIST_INTERRUPT_FILE", str(tmp_path / "interrupted"))
    ranks = start("nothing", 1, tmp_path)
    wait_for(tmp_path, 1, "now")
    if is_interrupted:
        (tmp_path / "interrupted").touch()
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [0, 0]
    said = (tmp_path / "0.out").read_text()
    assert said.startswith("SIGINT after step " if is_interrupted else "SIGTERM after step ")


def test_no_rank_asks_a_store_that_is_gone(tmp_path):
    """Its warning would have a stack of C++."""
    ranks = start("slow store", 1, tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert "TCPStore" not in (tmp_path / "1.err").read_text()


LEAVE = """
import sys, time
from torch import distributed as dist
from lisa_dist.distributed.ranks import leave_ranks

dist.init_process_group("gloo")
rank, said = dist.get_rank(), sys.argv[1]


def destroy():
    if rank == 1:
        time.sleep(2)
        open(said, "w").close()
    dist.destroy_process_group()


leave_ranks(destroy)
assert rank == 1 or __import__("os").path.exists(said)
"""


def test_rank_0_leaves_last(tmp_path):
    from runs import Alone

    (tmp_path / "leave.py").write_text(LEAVE)
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words, script = [str(tmp_path / "left")], tmp_path / "leave.py"
    ranks = [Alone(words, tmp_path / f"{rank}.txt", script, RANK=str(rank), **meet) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said


def test_an_interrupt_of_the_command_line_is_a_signal_to_stop(tmp_path):
    ranks = start("command", 1, tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert (tmp_path / "0.out").read_text().startswith("SIGINT after step ")


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path, number):
    ranks = start("twice", 1, tmp_path)
    wait_for(tmp_path, 1, "now")
    try:
        os.kill(ranks[1].process.pid, number)
        time.sleep(4)  # two at once are one, however late they come
        assert ranks[1].process.exitcode is None
        os.kill(ranks[1].process.pid, number)
        assert ranks[1].wait() == 128 + number
    finally:
        for rank in ranks:
            rank.process.kill()


if __name__ == "__main__":
    with open(sys.argv[3], "wb") as errors:
        os.dup2(errors.fileno(), 2)
    rank_main(sys.argv[1], int(sys.argv[2]))
