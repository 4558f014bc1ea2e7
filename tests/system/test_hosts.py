"""Runs on two hosts, a rank on each: the losses of a run on one host, and an end when the cable between them is cut."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import ADDRESSES, Host, Hosts, why_not
from ranks import PATIENCE
from runs import BIN, TRAIN, clean_environment, flags_for, on_two_ranks

CHANGES = {"deepspeed": "zero3", "max_steps": 4, "eval_steps": 4, "disable_tqdm": True}
HANG_TIMEOUT = 15  # seconds
# What deepspeed does not pass on by itself. PATH is for ninja: another one than at the last build builds all anew.
FOR_EVERY_HOST = ("PATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME", "TORCH_EXTENSIONS_DIR")
FOR_EVERY_HOST += ("CUDA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM")

_absent = why_not()
pytestmark = [
    pytest.mark.full,
    pytest.mark.xdist_group("hosts"),
    pytest.mark.skipif(_absent is not None, reason=f"two hosts: {_absent}"),
    pytest.mark.usefixtures("cpu_ops"),
]


@pytest.fixture(scope="module")
def on_one_host(folder) -> list[dict]:
    """What two ranks on one host log."""
    on_two_ranks(flags_for(folder, folder / "one", **CHANGES), folder)
    return losses(folder / "one")


@pytest.fixture
def hosts(tmp_path):
    (tmp_path / "hosts").mkdir()
    with Hosts(tmp_path / "hosts") as hosts:
        yield hosts


def losses(output_dir: Path) -> list[dict]:
    """All that the training computed, step by step."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    computed = ("step", "loss", "grad_norm", "eval_loss")
    found = [{name: entry[name] for name in computed if name in entry} for entry in history]
    assert len([entry for entry in found if "loss" in entry]) == CHANGES["max_steps"]
    return found


def start_torchrun(hosts: list[Host], flags: list[str], folder: Path) -> list[subprocess.Popen]:
    """torchrun by hand on every host, which meet at the first one's address."""
    command = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", hosts[0].name]
    environment = clean_environment()
    return [
        host.start(
            [*command, "--node-rank", str(rank), str(TRAIN), *flags], folder / f"{host.name}.out", environment, folder
        )
        for rank, host in enumerate(hosts)
    ]


def start_deepspeed(hosts: list[Host], flags: list[str], folder: Path) -> list[subprocess.Popen]:
    """deepspeed on the first host, which goes to both by pdsh and ssh."""
    (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    environment = clean_environment()
    told = {name: environment[name] for name in FOR_EVERY_HOST if name in environment}
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in told.items()))
    # What a rank says goes to a file on its own host: over ssh it would be lost with the cable.
    command = [str(BIN / "deepspeed"), "--hostfile", str(folder / "hostfile")]
    command += ["--enable_each_rank_log", str(folder), str(TRAIN), *flags]
    return [hosts[0].start(command, folder / "node1.out", environment, folder)]


def said(folder: Path) -> str:
    """All that launchers and ranks have printed."""
    paths = sorted([*folder.glob("*.out"), *folder.glob("*.log")])
    return "\n".join(f"{path.name}: {path.read_text()}" for path in paths)


def comes(condition: Callable[[], bool], within: float = PATIENCE) -> bool:
    """Whether a condition comes to hold."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def networks_in_use() -> set[str]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        # It has just ended, or may not be looked into.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            found.add(os.readlink(process / "ns" / "net"))
    return found


def test_they_share_files_and_a_network_and_leave_nothing(tmp_path):
    interfaces = socket.if_nameindex()
    with pytest.raises(RuntimeError, match="of a test"), Hosts(tmp_path) as (node1, node2):
        networks = {os.readlink(f"/proc/{host.pid}/ns/net") for host in (node1, node2)}
        assert len(networks & networks_in_use()) == 2
        assert node1.run("ssh", "node2", "hostname") == "node2\n"
        assert node2.run("ssh", "node1", "hostname") == "node1\n"
        node1.run("touch", f"/dev/shm/{tmp_path.name}")
        assert [node1.shared_memory(), node2.shared_memory()] == [[tmp_path.name], []]
        node2.start(["sleep", "100"], tmp_path / "sleep", dict(os.environ), tmp_path)
        assert comes(lambda: node2.processes() == ["sleep 100"])
        assert comes(lambda: node1.processes() == [])  # ssh's take a moment to end
        raise RuntimeError("of a test")
    assert not networks & networks_in_use()
    assert socket.if_nameindex() == interfaces
    assert socket.gethostname() not in ADDRESSES
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert not Path(f"/dev/shm/{tmp_path.name}").exists()


def test_two_hosts_compute_what_one_does(hosts, folder, on_one_host, tmp_path):
    """Their own names resolve to 127.0.1.1, so that gloo's choice of an interface, the one of that name, is lo."""
    own = [host.run("getent", "hosts", host.name).split() for host in hosts]
    assert own == [["127.0.1.1", name] for name in ADDRESSES]
    for launcher in start_torchrun(hosts, flags_for(folder, tmp_path / "out", **CHANGES), tmp_path):
        assert launcher.wait(timeout=PATIENCE) == 0, said(tmp_path)
    assert "node1: rank 0; node2: rank 1; CPU" in said(tmp_path)
    assert "gloo over eth0 (GLOO_SOCKET_IFNAME)" in said(tmp_path)  # which no host has set
    assert losses(tmp_path / "out") == on_one_host
    assert comes(lambda: [host.processes() for host in hosts] == [[], []])
    assert [host.shared_memory() for host in hosts] == [[], []]


def test_both_hosts_end_when_the_cable_is_cut(hosts, folder, tmp_path):
    """Under deepspeed, whose launcher has lost the host too."""
    changes = {"max_steps": 100_000, "eval_strategy": "no", "learning_rate": 1e-6, "hang_timeout": HANG_TIMEOUT}
    launchers = start_deepspeed(hosts, flags_for(folder, tmp_path / "out", **CHANGES | changes), tmp_path)
    running = [None] * len(launchers)
    assert comes(lambda: "%  loss " in said(tmp_path) or [one.poll() for one in launchers] != running)
    assert [one.poll() for one in launchers] == running, said(tmp_path)
    hosts[1].run("ip", "link", "set", "eth0", "down")
    cut_at = time.monotonic()
    for launcher in launchers:
        assert launcher.wait(timeout=PATIENCE) != 0
    assert comes(lambda: [host.processes() for host in hosts] == [[], []])
    seconds = time.monotonic() - cut_at
    print(f"both hosts have ended {seconds:.1f} s after the cut")
    assert seconds < 10 * HANG_TIMEOUT  # gloo itself would wait for half an hour
    for rank in range(2):
        assert f"lisa-dist, rank {rank}: rank(s) [{1 - rank}] " in said(tmp_path)
    assert "--resume_from_checkpoint true" in said(tmp_path)
