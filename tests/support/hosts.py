"""Two hosts on this machine that share nothing but a network, and files as nodes of a cluster do.

Each is a set of namespaces: a network with one interface, which a cable joins to that of the other, a host name,
processes, and mounts of its own over /dev/shm, /etc/hosts, /etc/ssh and /run; an sshd lets each into the other. Its own
name resolves to 127.0.1.1 on it, as Debian has it. The cable is made between the two networks, so nothing is changed
outside them, and killing a host's first process ends all that it had.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from ranks import PATIENCE

ADDRESSES = {"node1": "10.0.0.1", "node2": "10.0.0.2"}
_PROGRAMS = ("ip", "mount", "nsenter", "setpriv", "unshare", "pdsh", "ssh", "ssh-keygen", "sshd", "hostname")
_SSHD_FLAGS = "-D -e"
_SSHD = """
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PidFile none
UsePAM no
# The folder is the test's, and may lie below one that everybody writes to.
StrictModes no
ClientAliveInterval 3
"""
_SSH = """
Host *
    IdentityFile /etc/ssh/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    BatchMode yes
    # Without it ssh waits for ever for a host that is lost, and so does pdsh.
    ServerAliveInterval 3
"""


def why_not() -> str | None:
    """Why there can be no hosts here; None where there can."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install iproute2 util-linux hostname pdsh openssh-server"
    if os.geteuid() != 0:
        return "namespaces are made by root only"
    cable = "ip link add cable1 type veth peer name cable2"
    words = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", *cable.split()]
    if subprocess.run(words, capture_output=True).returncode != 0:
        return "no namespaces, or no cables between them (veth), may be made here"
    return None


class Host:
    """One of them; `Hosts` makes it."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self._log = folder / f"{name}.log"
        own = {"/etc/hosts": f"hosts of {name}", "/etc/ssh": "ssh"}
        inside = [f"hostname {name}", "mount -t tmpfs tmpfs /dev/shm", "mount -t tmpfs tmpfs /run", "mkdir /run/sshd"]
        inside += [f"mount --bind {shlex.quote(str(folder / file))} {path}" for path, file in own.items()]
        inside += ["ip link set lo up", f"touch {shlex.quote(str(folder / name))}"]
        # bash stays the first process: it takes over what loses its parent, and reaps it.
        inside += [f"{shutil.which('sshd')} {_SSHD_FLAGS} & wait"]
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--pid", "--mount-proc"]
        command += ["--fork", "--kill-child", "bash", "-ec", "; ".join(inside)]
        with self._log.open("w") as log:
            self._daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._started = [self._daemon]
        self._ready = folder / name

    def wait_until_ready(self) -> None:
        """Wait until it has all that is its own but the cable."""
        deadline = time.monotonic() + PATIENCE
        while not self._ready.exists():
            is_coming = self._daemon.poll() is None and time.monotonic() < deadline
            assert is_coming, f"{self.name} has not come up: {self._log.read_text()}"
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """Its first process, as the machine numbers it."""
        return int(self._children())

    def start(self, command: Sequence[str], output: Path, environment: dict[str, str], cwd: Path) -> subprocess.Popen:
        """Start a command on the host; what it prints goes to a file."""
        words = self._inside("env", "--chdir", str(cwd), *command)
        with output.open("w") as file:
            process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self._started.append(process)
        return process

    def run(self, *command: str) -> str:
        """What a short command prints on the host."""
        finished = subprocess.run(self._inside(*command), capture_output=True, text=True, timeout=PATIENCE)
        assert finished.returncode == 0, f"{self.name}: {' '.join(command)}: {finished.stderr}{self._log.read_text()}"
        return finished.stdout

    def processes(self) -> list[str]:
        """Command lines of what runs on the host beside its first process and its sshd."""
        lines = []
        for path in self._seen_from_inside("proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_text().replace("\0", " ") or (path / "comm").read_text()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            if path.name != "1" and _SSHD_FLAGS not in line:
                lines.append(line.strip())
        return lines

    def shared_memory(self) -> list[str]:
        """Names in the host's /dev/shm."""
        return sorted(path.name for path in self._seen_from_inside("dev", "shm").iterdir())

    def end(self) -> None:
        """End everything on the host, and with it the host."""
        first = self._children()
        if first:
            os.kill(int(first), signal.SIGKILL)  # it is gone when all others of its namespace are
        else:
            self._daemon.kill()
        for process in self._started:
            process.wait(timeout=PATIENCE)

    def _inside(self, *command: str) -> list[str]:
        # The working directory does not come along into other mounts.
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--pid", *command]

    def _seen_from_inside(self, *names: str) -> Path:
        """A folder as the host has it mounted."""
        return Path("/proc", str(self.pid), "root", *names)

    def _children(self) -> str:
        """The child of the process that made the namespaces: one number, or nothing once it has ended."""
        if self._daemon.poll() is not None:
            return ""
        return Path(f"/proc/{self._daemon.pid}/task/{self._daemon.pid}/children").read_text()


class Hosts:
    """`with Hosts(folder) as (node1, node2): ...`; the folder takes their files and logs."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._hosts: list[Host] = []

    def __enter__(self) -> list[Host]:
        ssh, names = self._folder / "ssh", {"localhost": "127.0.0.1", **ADDRESSES}
        ssh.mkdir()
        (ssh / "sshd_config").write_text(_SSHD.lstrip())
        (ssh / "ssh_config").write_text(_SSH.lstrip())
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "key")]
        subprocess.run(words, check=True, capture_output=True)
        for own in ADDRESSES:
            lines = [f"{address} {name}\n" for name, address in (names | {own: "127.0.1.1"}).items()]
            (self._folder / f"hosts of {own}").write_text("".join(lines))
        try:
            for name in ADDRESSES:
                self._hosts.append(Host(name, self._folder))
            for host in self._hosts:
                host.wait_until_ready()
            self._plug_in()
        except BaseException:
            self.__exit__()
            raise
        return self._hosts

    def __exit__(self, *_) -> None:
        for host in self._hosts:
            host.end()

    def _plug_in(self) -> None:
        first, second = self._hosts
        # From inside the first network, so that neither end is ever in the machine's own.
        into = ["nsenter", "--target", str(first.pid), "--net"]
        cable = f"ip link add eth0 type veth peer name eth0 netns {second.pid}"
        subprocess.run([*into, *cable.split()], check=True, capture_output=True)
        for host, address in zip(self._hosts, ADDRESSES.values(), strict=True):
            host.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
