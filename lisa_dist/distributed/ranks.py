"""Which rank is this process, of how many, over which network? What launchers and schedulers set is read here alone.

    deepspeed, torchrun                RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun, deepspeed --launcher slurm   SLURM_*: a task is a rank
    python                             nothing: the only rank

Whichever it was, the variables of the first row are set in the end, which torch, DeepSpeed and Accelerate read.
"""

import contextlib
import io
import itertools
import os
import re
import socket
from collections.abc import Callable, MutableMapping
from datetime import timedelta

import deepspeed
import psutil
from torch import distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lisa_dist.errors import UserError

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"

_GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Of a process in a step, which srun starts. The script of a job has SLURM_PROCID too, but is in no step.
_OF_STEP = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_ALONE = "LISA_DIST_ALONE"  # the process that `set_rank` has made the only rank, and its port
_OTHERS = {"SLURM_NTASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
_SHOWN = [*_GIVEN, "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID"]
_SHOWN += [*_OF_STEP.values(), "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE", *_OTHERS]


def set_rank(environment: MutableMapping[str, str] = os.environ) -> str:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT, and gloo's interface between hosts.

    Returns who started the ranks.

    Raises ValueError, with everything that was seen, where some are missing or contradict each other.
    """
    forget_rank_of_parent(environment)
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        started_by = _check_launched(environment)
    elif _count(environment, "SLURM_STEP_NUM_TASKS") > 1:
        started_by = "srun"
        environment.update({name: environment[variable] for name, variable in _OF_STEP.items()})
        environment.setdefault("MASTER_ADDR", expand_hosts(environment["SLURM_STEP_NODELIST"])[0])
        environment.setdefault("MASTER_PORT", str(_port_of_step(environment)))
        visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        if 0 < len(visible) <= _count(environment, "LOCAL_RANK"):  # a rank takes the GPU of its number on the node
            raise _contradiction(
                environment,
                f"CUDA_VISIBLE_DEVICES={','.join(visible)} shows {len(visible)} GPUs to task "
                f"{environment['LOCAL_RANK']} of this node; give --gpus-per-node in place of --gpus-per-task, and no "
                "--gpu-bind",
            )
    else:
        started_by = "python"
        for name, starter in _OTHERS.items():
            in_own_step = name == "SLURM_NTASKS" and "SLURM_STEP_ID" in environment  # of one task
            if _count(environment, name) > 1 and not in_own_step:
                raise _contradiction(
                    environment,
                    f"{name} is {environment[name]}, but nothing says which of them this process is, and each would "
                    f"train alone; start the ranks with {'srun, ' if starter == 'srun' else ''}torchrun or deepspeed",
                )
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
        environment.update({name: str(value) for name, value in alone.items()})
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(free_port()))
        environment[_ALONE] = f"{os.getpid()}:{environment['MASTER_PORT']}"
    if "LOCAL_WORLD_SIZE" in environment:
        environment.setdefault("LOCAL_SIZE", environment["LOCAL_WORLD_SIZE"])  # DeepSpeed's word for torchrun's
    elif "SLURM_STEP_TASKS_PER_NODE" in environment:
        environment.setdefault("LOCAL_SIZE", str(_tasks_of_this_node(environment)))
    bind_gloo(environment)
    return started_by


def join_ranks() -> None:
    """A process group for a script that has begun none: of the ranks of its launcher, or of this process alone.

    Those of mpirun are DeepSpeed's to find.
    """
    if dist.is_initialized():
        return
    of_mpi = "RANK" not in os.environ and any(
        _count(os.environ, name) > 1 for name, by in _OTHERS.items() if by == "mpirun"
    )
    if not of_mpi:
        set_rank()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has built an operator
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=of_mpi)


def leave_ranks(destroy: Callable[[], object], patience: timedelta = timedelta(minutes=1)) -> None:
    """Destroy the process group by `destroy`. Rank 0 returns last, or after `patience`. Collective.

    Rank 0 hosts the store in which the ranks have met. If its process ended first, a rank that is slower would print a
    warning with a stack of C++.
    """
    store, rank, world_size = _get_default_store(), dist.get_rank(), dist.get_world_size()
    destroy()
    store.set(f"lisa_dist/left/{rank}", "")
    if rank == 0 and world_size > 1:
        with contextlib.suppress(dist.DistError):  # a rank has died, and has said so
            store.wait([f"lisa_dist/left/{other}" for other in range(world_size)], patience)


def forget_rank_of_parent(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where a process that trains alone has started this one, its rank is not this one's."""
    process, _, port = environment.get(_ALONE, "").partition(":")
    inherited = process not in ("", str(os.getpid())) and environment.get("WORLD_SIZE") == "1"
    if inherited and environment.get("MASTER_PORT") == port:  # a launcher would have set another
        for name in (*_GIVEN, "LOCAL_SIZE", _ALONE):
            environment.pop(name, None)


def check_port(environment: MutableMapping[str, str] = os.environ) -> None:
    """Raise UserError on rank 0 where the ranks cannot meet at MASTER_PORT, as another program listens there."""
    if dist.is_initialized():  # they have met
        return
    port, shown = _count(environment, "MASTER_PORT"), f"MASTER_PORT {environment['MASTER_PORT']}"
    if not 0 < port < 2**16:
        raise UserError(f"{shown}: a port is from 1 to 65535.")
    of_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun listens there itself
    if of_agent or environment["RANK"] != "0":
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
        try:
            probe.bind(("", port))  # and listens to nobody, so that no rank takes it for rank 0
        except OSError as error:
            raise UserError(
                f"{shown}: rank 0 cannot listen there ({error.strerror}); give another port, by --master_port of the "
                "launcher or by the variable."
            ) from error


def expand_hosts(nodelist: str) -> list[str]:
    """The hosts of a SLURM list: gpu[03-05,09],login1 is gpu03, gpu04, gpu05, gpu09, login1."""
    hosts = []
    for entry in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodelist):
        texts, ranges = re.split(r"\[[^\]]*\]", entry), re.findall(r"\[([^\]]*)\]", entry)
        numbers = [[number for part in one.split(",") for number in _numbers(part)] for one in ranges]
        for chosen in itertools.product(*numbers):
            hosts.append("".join(itertools.chain.from_iterable(zip(texts, [*chosen, ""], strict=True))))
    return hosts


def _numbers(part: str) -> list[str]:
    """Of 08-11, or of one number; as wide as they are written."""
    first, _, last = part.partition("-")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]


def _check_launched(environment: MutableMapping[str, str]) -> str:
    """Who set RANK and the rest; all of it must be there, and fit a SLURM step that it is in."""
    missing = [name for name in _GIVEN if name not in environment]
    if missing:
        raise _contradiction(environment, f"{', '.join(missing)} not set, though others are")
    rank, world_size, local_rank = (_count(environment, name) for name in _GIVEN[:3])
    local_size = _count(environment, "LOCAL_SIZE", _count(environment, "LOCAL_WORLD_SIZE", world_size))
    if not (0 <= rank < world_size and 0 <= local_rank < local_size <= world_size):
        raise _contradiction(
            environment, f"rank {rank} of {world_size}, and {local_rank} of {local_size} on this node, cannot be"
        )
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment
    started_by = "torchrun" if by_torchrun else "deepspeed" if "LOCAL_SIZE" in environment else "RANK and WORLD_SIZE"
    if "SLURM_STEP_ID" not in environment:
        return started_by
    tasks, nodes = _count(environment, "SLURM_STEP_NUM_TASKS", 1), _count(environment, "SLURM_STEP_NUM_NODES", 1)
    of_step = [_count(environment, name) for name in _OF_STEP.values()]
    if of_step == [rank, world_size, local_rank]:  # srun's ranks, mapped by the job itself
        return started_by
    if tasks > nodes:
        raise _contradiction(
            environment,
            f"srun started {tasks} tasks on {nodes} nodes, which are not the ranks that RANK and WORLD_SIZE say; give "
            "--ntasks-per-node=1 for a launcher on each node, or let the tasks be the ranks and unset RANK",
        )
    if nodes > 1 and world_size == local_size:
        raise _contradiction(
            environment,
            f"srun started a launcher on each of {nodes} nodes, and each would train alone; give torchrun --nnodes and "
            "--node-rank, or deepspeed --no_ssh, --node_rank and a host file",
        )
    return f"srun {started_by}"


def _contradiction(environment: MutableMapping[str, str], what: str) -> UserError:
    seen = " ".join(f"{name}={environment[name]}" for name in _SHOWN if name in environment)
    return UserError(f"{what}. Seen: {seen}.")


def _count(environment: MutableMapping[str, str], name: str, default: int = 0) -> int:
    value = environment.get(name, "")
    if value and not re.fullmatch(r"-?\d+", value):
        raise _contradiction(environment, f"{name} is no number")
    return int(value) if value else default


def _tasks_of_this_node(environment: MutableMapping[str, str]) -> int:
    """Of SLURM_STEP_TASKS_PER_NODE, such as 4(x2),3: the entry of SLURM_NODEID."""
    counts = []
    for entry in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = entry.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[_count(environment, "SLURM_NODEID")]


def _port_of_step(environment: MutableMapping[str, str]) -> int:
    """The same for all tasks of a step, another for other jobs, and below the ports that the kernel gives out."""
    # Steps of one job seldom run at once, and jobs often do: a prime keeps the steps of one off the next job's.
    return 10_000 + (_count(environment, "SLURM_JOB_ID") + 4_999 * _count(environment, "SLURM_STEP_ID")) % 20_000


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def interface_to(address: str) -> tuple[str, str] | None:
    """The network interface by which packets to an address of IPv4 leave, and its own address; None of another one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if own in [one.address for one in addresses]:
                return name, own
    return None


def bind_gloo(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have gloo's groups, of ranks on several hosts, take NCCL's interface, or else the one that leads to MASTER_ADDR.

    By default gloo takes that of the host's own name, which on many hosts is 127.0.1.1, where no other host comes. On
    rank 0's host MASTER_ADDR may be just that: there it is the first interface that is not the loopback.
    """
    local_size = environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE"))
    if GLOO_INTERFACE in environment or local_size in (None, environment.get("WORLD_SIZE")):
        return
    interfaces, of_nccl = psutil.net_if_addrs(), environment.get("NCCL_SOCKET_IFNAME", "")
    if of_nccl in interfaces:  # and no list or prefix
        environment[GLOO_INTERFACE] = of_nccl
        return
    found = interface_to(environment["MASTER_ADDR"])
    if found is None:  # of an address that is not IPv4's gloo may know more
        return
    others = (
        name
        for name, addresses in interfaces.items()
        for one in addresses
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    )
    if name := next(others, None) if found[1].startswith("127.") else found[0]:
        environment[GLOO_INTERFACE] = name


def gloo_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    """A group of all ranks over gloo, for what no GPU is to wait for; all ranks call it."""
    bind_gloo()
    return dist.new_group(backend="gloo", timeout=timeout)
