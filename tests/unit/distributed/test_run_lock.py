"""One run has a folder: another one is refused, and takes it over once the first is no more, whatever clocks say."""

import json
import multiprocessing
import os
import signal
import threading
from unittest.mock import ANY

import pytest
import torch
from ranks import PATIENCE

from lisa_dist.distributed.run_lock import LOCK_NAME, is_held, one_run_in
from lisa_dist.errors import UserError

AT_ONCE = 0.3  # seconds to wait for a sign of life of what gives none


def hold(folder, connection) -> None:
    """In a process of its own: whether it could take the folder, which it then has until it is told to end."""
    try:
        with one_run_in(folder, AT_ONCE):
            connection.send(True)
            connection.recv()
    except UserError:
        connection.send(False)


@pytest.fixture
def start(monkeypatch):
    """Start processes that hold a folder; they are gone at the end."""
    # Another test of this process may have begun it, and a fork knows nothing of its threads.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    context, begun = multiprocessing.get_context("fork"), []

    def begin(folder):
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(folder, theirs))
        process.start()
        begun.append(process)
        return process, ours

    yield begin
    for process in begun:
        process.kill()
        process.join()


def write_lock(folder, **changes) -> None:
    """The lock of a run on another host."""
    content = {"run": "0123abcd", "host": "node7", "process": 1, "since": "Monday", "machine": "its", "started": "1"}
    (folder / LOCK_NAME).write_text(json.dumps(content | changes))


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, start):
    process, other = start(tmp_path)
    assert other.recv()
    holder = json.loads((tmp_path / LOCK_NAME).read_text())
    for received in (signal.SIGSTOP, signal.SIGCONT):  # one that was stopped still has it
        os.kill(process.pid, received)
        with pytest.raises(UserError) as error, one_run_in(tmp_path, AT_ONCE):
            pass
        said = str(error.value)
        has = f"run {holder['run']} on host {holder['host']}, process {process.pid}, has it since {holder['since']}"
        assert has in said
        assert "\n" not in said
    other.send("end")
    process.join(PATIENCE)
    assert not list(tmp_path.iterdir()), "it is released at the end"


def test_a_killed_run_is_taken_over_at_once(tmp_path, start):
    """Also where another process has its number, by when that one began."""
    process, other = start(tmp_path)
    assert other.recv()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    with one_run_in(tmp_path, silence=PATIENCE):
        holder = json.loads((tmp_path / LOCK_NAME).read_text())
        assert holder["process"] == os.getpid()
    assert not list(tmp_path.iterdir())
    write_lock(tmp_path, **holder | {"run": "0123abcd", "started": str(int(holder["started"]) - 1)})
    with one_run_in(tmp_path, silence=PATIENCE):
        assert json.loads((tmp_path / LOCK_NAME).read_text()) == holder | {"since": ANY}


@pytest.mark.parametrize("hours", [-24, 0, 24])
def test_a_run_elsewhere_lives_as_long_as_its_heartbeat_changes(tmp_path, hours, capsys):
    """By whichever clock, and where that is put back."""
    write_lock(tmp_path)
    path, now = tmp_path / LOCK_NAME, (tmp_path / LOCK_NAME).stat().st_mtime_ns + hours * 3600 * 10**9
    os.utime(path, ns=(now, now))
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(0.01):
            count += 1
            os.utime(path, ns=(now, now - count * 10**9))

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    said = "run 0123abcd on host node7, process 1, has it since Monday"
    with pytest.raises(UserError, match=said), one_run_in(tmp_path, PATIENCE):
        pass
    done.set()
    beating.join()
    assert "waiting up to" in capsys.readouterr().out
    with one_run_in(tmp_path, AT_ONCE):
        assert json.loads(path.read_text())["run"] != "0123abcd"


def test_a_run_that_was_killed_as_it_began_is_taken_over(tmp_path):
    (tmp_path / LOCK_NAME).touch()
    with one_run_in(tmp_path, AT_ONCE):
        assert is_held(tmp_path)


def test_of_many_runs_one_takes_over(tmp_path, start):
    write_lock(tmp_path)
    others = [start(tmp_path)[1] for _ in range(5)]
    assert sorted(other.recv() for other in others) == [False] * 4 + [True]


def test_a_process_may_hold_a_folder_twice(tmp_path):
    with one_run_in(tmp_path):
        with one_run_in(tmp_path / "."):
            pass
        assert (tmp_path / LOCK_NAME).is_file()
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_run_stays(tmp_path):
    with one_run_in(tmp_path):
        write_lock(tmp_path)
    assert json.loads((tmp_path / LOCK_NAME).read_text())["run"] == "0123abcd"


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_NAME).symlink_to(tmp_path / "outside")
    with one_run_in(tmp_path / "out"):
        assert not (tmp_path / "out" / LOCK_NAME).is_symlink()
    assert not (tmp_path / "outside").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(UserError, match=f"--output_dir {out} cannot be written"), one_run_in(out):
        pass
