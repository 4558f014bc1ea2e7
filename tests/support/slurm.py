"""A SLURM cluster of two nodes on this machine: the real daemons, without systemd, munge, a database or cgroups.

Each daemon has process and mount namespaces of its own, each node a host name and a /dev/shm too. So names resolve that
this machine does not know, nothing outside the folder is written, and killing a namespace ends every process in it.
"""

import itertools
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ranks import OF_RANKS, PATIENCE, free_port

NODES = {"node1": "127.0.0.1", "node2": "127.0.0.2"}
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "unshare", "setpriv")
# cred_expire: a job waits that long before it starts again; 5 s is the least, two minutes the default.
# config_overrides: nodes have what this file says, however small the machine is.
# send_user_signal: a preempted job gets the signal that its script asks for with --signal, as before its time limit.
_CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/slurm
CredType=cred/slurm
AuthInfo=cred_expire=5
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
GresTypes=gpu
NodeName=node1 NodeHostname=node1 NodeAddr={nodes[node1]} Port={ports[1]} CPUs=64 Gres=gpu:8
NodeName=node2 NodeHostname=node2 NodeAddr={nodes[node2]} Port={ports[2]} CPUs=64 Gres=gpu:8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=600
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None where there can."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm"
    if os.geteuid() != 0:
        return "SLURM's daemons are started by root only"
    if subprocess.run(["unshare", "--mount", "--pid", "--uts", "--fork", "true"], capture_output=True).returncode != 0:
        return "no namespaces may be made here"
    return None


class Cluster:
    """`with Cluster(folder) as cluster: ...`; the folder takes its files, and its logs for when something fails."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._daemons: list[subprocess.Popen] = []
        self._job_logs: list[Path] = []
        # Jobs have this environment: without a rank, which a process of tests may have set for itself.
        self.environment = {name: os.environ[name] for name in os.environ if not re.match("SLURM_|SBATCH_", name)}
        for name in OF_RANKS:
            self.environment.pop(name, None)
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def __enter__(self) -> "Cluster":
        folder = self._folder
        ports = [free_port() for _ in range(3)]
        # The port of a run comes from the number of its job: two clusters on one machine must not have the same.
        first_job = ports[0] % 18_000 + 1
        config = _CONFIG.format(folder=folder, ports=ports, first_job=first_job, nodes=NODES)
        (folder / "slurm.conf").write_text(config.lstrip())
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        # Null devices, which SLURM gives out as GPUs to the scripts that ask for some.
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        for number in range(8):
            os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        hosts = {"localhost": "127.0.0.1"} | NODES
        (folder / "hosts").write_text("".join(f"{ip} {name}\n" for name, ip in hosts.items()))
        for name in ("state", "run-slurmctld", *(f"{what}-{node}" for what in ("spool", "run") for node in NODES)):
            (folder / name).mkdir()
        key = folder / "slurm.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        try:
            self._start("slurmctld", "slurmctld -D -i", "true")
            for node in NODES:
                self._start(node, f"slurmd -D -N {node}", f"hostname {node}; mount -t tmpfs tmpfs /dev/shm")
            idle = ["idle"] * 4  # each node in both partitions
            self.until(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == idle, PATIENCE, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for daemon in self._daemons:
            daemon.kill()  # unshare, which takes its namespace with it
        for daemon in self._daemons:
            daemon.wait()

    def run(self, *command: str, **options: str) -> str:
        """What a command of SLURM prints."""
        # Commands ask the controller's socket in /run who they are.
        inside = f"mount --bind '{self._folder}/run-slurmctld' /run; exec \"$@\""
        words = ["unshare", "--mount", "bash", "-ec", inside, "bash", *command]
        finished = subprocess.run(
            words, env=self.environment | options, capture_output=True, text=True, timeout=PATIENCE
        )
        assert finished.returncode == 0, f"{' '.join(command)}: {finished.stderr}\n{self.logs()}"
        return finished.stdout

    def submit(self, *command: str, **variables: str) -> str:
        """sbatch with these words, and these variables in its environment; the number of the job."""
        self._job_logs += [Path(path) for word, path in itertools.pairwise(command) if word == "--output"]
        return re.search(r"\d+", self.run("sbatch", "--parsable", *command, **variables)).group()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows about a job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, timeout: float) -> dict[str, str]:
        """The job once it has ended for good; where it does not, it is cancelled, for other jobs to have its nodes."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL")
        try:
            self.until(lambda: self.job(number)["JobState"] in ended, timeout, f"end of job {number}")
        except AssertionError:
            self.run("scancel", number)
            raise
        return self.job(number)

    def until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait for a condition; an AssertionError with all logs where it does not come."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in {timeout} s\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        """The last lines of every daemon, and of the newest job with --output."""
        paths = [*sorted(self._folder.glob("*.log")), *self._job_logs[-1:]]
        return "\n".join(f"{path}: {path.read_text(errors='replace')[-2000:]}" for path in paths if path.is_file())

    def _start(self, name: str, daemon: str, prepare: str) -> None:
        # bash is the first process of the namespace: it takes over what loses its parent, and reaps it.
        inside = f"mount --bind '{self._folder}/hosts' /etc/hosts; mount --bind '{self._folder}/run-{name}' /run"
        inside += f"; {prepare}; {daemon} & wait"
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--pid", "--mount-proc", "--fork"]
        command += ["--kill-child", "bash", "-ec", inside]
        with (self._folder / f"{name}.log").open("w") as log:
            started = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._daemons.append(started)
