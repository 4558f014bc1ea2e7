"""Which rank a process is, by what each launcher sets; contradictions between them; the network between hosts."""

import os
import socket
from types import SimpleNamespace

import pytest
from torch import distributed as dist

from lisa_dist.distributed.ranks import (
    bind_gloo,
    check_port,
    expand_hosts,
    forget_rank_of_parent,
    interface_to,
    set_rank,
)
from lisa_dist.errors import UserError

# As seen in processes that these started: two nodes of two ranks, the last of them.
MASTER = {"MASTER_ADDR": "gpu01", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "lo"}  # or gpu01 would be looked up
TORCHRUN = MASTER | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = MASTER | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = BATCH | {
    "SLURM_STEP_ID": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[01-02]",
    "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip
TASK_A_NODE = SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
TASK_A_NODE |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NTASKS": "2"}
LAST_OF_FOUR = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "gpu01"}


@pytest.mark.parametrize(
    ("environment", "started_by", "expected"),
    [
        (TORCHRUN, "torchrun", LAST_OF_FOUR | {"MASTER_PORT": "29500"}),
        (DEEPSPEED, "deepspeed", LAST_OF_FOUR | {"MASTER_PORT": "29500"}),
        (SRUN, "srun", LAST_OF_FOUR | {"MASTER_PORT": "15006"}),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "0,1"}, "srun", LAST_OF_FOUR),
        (SRUN | MASTER, "srun", LAST_OF_FOUR | {"MASTER_PORT": "29500"}),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, "srun", LAST_OF_FOUR | {"LOCAL_SIZE": "1"}),
        (TASK_A_NODE | TORCHRUN, "srun torchrun", LAST_OF_FOUR),
        (TASK_A_NODE | DEEPSPEED, "srun deepspeed", LAST_OF_FOUR),
        (SRUN | MASTER | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "RANK and WORLD_SIZE", {"RANK": "3"}),
        ({}, "python", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}),
        (BATCH | {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "1"}, "python", {"RANK": "0", "WORLD_SIZE": "1"}),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "python", {"MASTER_ADDR": "127.0.0.1"}),
    ],
)
def test_each_way_of_starting(environment, started_by, expected):
    environment = dict(environment)
    assert set_rank(environment) == started_by
    assert environment | expected == environment
    assert all(name in environment for name in (*LAST_OF_FOUR, "MASTER_PORT"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set, though others are. Seen: RANK=0."),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4, and 1 of 2 on this node, cannot be. Seen: RANK=4 WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "rank 3 of 4, and 2 of 2 on this node, cannot be"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE is no number"),
        (SRUN | TORCHRUN | {"RANK": "0"}, "srun started 4 tasks on 2 nodes, which are not the ranks"),
        (SRUN | MASTER | {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "unset RANK"),
        (
            TASK_A_NODE | TORCHRUN | {"RANK": "1", "WORLD_SIZE": "2"},
            "srun started a launcher on each of 2 nodes, and each would train alone; give torchrun --nnodes",
        ),
        (BATCH, "SLURM_NTASKS is 4, but nothing says which of them this process is"),
        (
            SRUN | {"CUDA_VISIBLE_DEVICES": "1"},
            "CUDA_VISIBLE_DEVICES=1 shows 1 GPUs to task 1 of this node",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but nothing says which"),
    ],
)
def test_contradictions_are_shown(environment, said):
    with pytest.raises(ValueError, match="Seen: ") as error:
        set_rank(dict(environment))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("gpu[03-05,09],login1", "gpu03 gpu04 gpu05 gpu09 login1"),
        ("node1", "node1"),
        ("a1,b[2-3]", "a1 b2 b3"),
        ("rack[1-2]n[07-08]", "rack1n07 rack1n08 rack2n07 rack2n08"),
        ("n[4]-ib", "n4-ib"),
        ("n[98-101]", "n98 n99 n100 n101"),
        ("", ""),
    ],
)
def test_the_hosts_of_a_list(nodelist, hosts):
    assert expand_hosts(nodelist) == hosts.split()


def test_a_port_at_which_the_ranks_cannot_meet(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # another test may have begun it
    with socket.create_server(("", 0)) as other:
        busy = {"RANK": "0", "MASTER_PORT": str(other.getsockname()[1])}
        with pytest.raises(UserError, match=r"MASTER_PORT \d+: rank 0 cannot listen there \(Address already in use\)"):
            check_port(busy)
        check_port(busy | {"RANK": "1"})  # for which rank 0 listens there
        check_port(busy | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    check_port(busy)
    for port in ("0", "65536", "-1"):
        with pytest.raises(UserError, match=f"MASTER_PORT {port}: a port is from 1 to 65535"):
            check_port({"RANK": "1", "MASTER_PORT": port})


@pytest.mark.parametrize(
    ("changes", "is_forgotten"),
    [
        ({}, True),
        ({"MASTER_PORT": "7"}, False),  # a launcher has set another
        ({"WORLD_SIZE": "2"}, False),
        ({"LISA_DIST_ALONE": "this process"}, False),
    ],
    ids=str,
)
def test_what_a_process_that_trains_alone_has_started_is_not_its_rank(changes, is_forgotten):
    """As `!lisa-dist train --gpus 2` in a notebook that has trained."""
    environment: dict[str, str] = {}
    assert set_rank(environment) == "python"
    port = environment["MASTER_PORT"]
    assert environment["LISA_DIST_ALONE"] == f"{os.getpid()}:{port}"
    environment["LISA_DIST_ALONE"] = f"1:{port}"  # it was another process
    named = {"this process": f"{os.getpid()}:{port}"}
    environment |= {name: named.get(value, value) for name, value in changes.items()}
    before = dict(environment)
    forget_rank_of_parent(environment)
    assert environment == ({} if is_forgotten else before)


# The second of two hosts, which torchrun has started; the address is as a host's own name resolves on many hosts.
SECOND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500"}
SECOND |= {"MASTER_ADDR": "127.0.1.1"}


@pytest.fixture
def interfaces(monkeypatch):
    """A host's: the loopback, one without an address of IPv4, two networks and a bridge."""
    of_ipv6 = SimpleNamespace(family=socket.AF_INET6, address="fe80::1")
    found = {"lo": "127.0.0.1", "wan": None, "eth0": "192.0.2.1", "ib0": "192.0.2.9", "docker0": "172.17.0.1"}
    found = {
        name: [of_ipv6, *([SimpleNamespace(family=socket.AF_INET, address=address)] if address else [])]
        for name, address in found.items()
    }
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)
    return found


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, "eth0"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, None),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, "ib0"),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "wan"}, "wan"),
        ({"LOCAL_WORLD_SIZE": "2"}, None),  # one host
    ],
    ids=str,
)
def test_the_interface_between_hosts(interfaces, changes, taken):
    environment = SECOND | changes
    set_rank(environment)
    assert environment.get("GLOO_SOCKET_IFNAME") == taken


def test_the_interface_that_leads_to_rank_0(interfaces):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.3", 9))
        except OSError:
            pytest.skip("this host has no route to others")
        own = probe.getsockname()[0]
    interfaces["ib0"].append(SimpleNamespace(family=socket.AF_INET, address=own))
    environment = SECOND | {"MASTER_ADDR": "192.0.2.3"}
    bind_gloo(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


def test_an_address_without_an_interface_ends_no_run():
    assert interface_to("::1") is None
    assert interface_to("127.0.0.1") == ("lo", "127.0.0.1")
