"""The network between hosts, and groups of ranks over gloo, which need to be told which one it is."""

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress
from datetime import timedelta

import psutil
from torch import distributed as dist

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def interface_to(address: str) -> tuple[str, str] | None:
    """The network interface by which packets to an address of IPv4 leave, and its own address; None of another one."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
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
