"""Which interface gloo takes between hosts."""

import socket
from types import SimpleNamespace

import pytest

from lisa_dist.distributed.network import bind_gloo, interface_to
from lisa_dist.distributed.ranks import set_rank

# The second of two hosts, which torchrun has started; the address is as a host's own name resolves on many hosts.
RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500"}
RANK |= {"MASTER_ADDR": "127.0.1.1"}


@pytest.fixture
def interfaces(monkeypatch):
    """Of a host: the loopback, one without an address of IPv4, two networks and a bridge."""
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
    environment = RANK | changes
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
    environment = RANK | {"MASTER_ADDR": "192.0.2.3"}
    bind_gloo(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


def test_an_address_without_an_interface_ends_no_run():
    assert interface_to("::1") is None
    assert interface_to("127.0.0.1") == ("lo", "127.0.0.1")
