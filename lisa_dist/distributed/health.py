"""Which hosts and devices a run has, how fast its ranks talk to each other, and which of them is slow."""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib import metadata
from itertools import groupby
from statistics import median_low
from typing import Any

import torch
from torch import distributed as dist

from lisa_dist.distributed.collectives import gather
from lisa_dist.distributed.ranks import GLOO_INTERFACE, gloo_group, interface_to
from lisa_dist.errors import UserError

_SLOW = 1.2  # times the median of all ranks
_SLOW_LOGS = 3  # in so many logs one after another a rank must be slow to be named
_MANY_SPANS = 8192


def host_name() -> str:
    """This host, as its scheduler calls it if there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def ranks_of_hosts() -> list[int]:
    """How many ranks each host has, in the order of ranks; a host that comes twice is two. All ranks call it."""
    return [len(list(ranks)) for _, ranks in groupby(gather(host_name()))]


def first_ranks_of_hosts() -> list[int]:
    """The first rank of each host, in the order of ranks. All ranks call it."""
    first: dict[str, int] = {}
    for rank, host in enumerate(gather(host_name())):
        first.setdefault(host, rank)
    return list(first.values())


def version_of(package: str) -> str:
    """The installed version of a package, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def check_same_everywhere(about: Mapping[str, object], way_out: str) -> None:
    """Raise ValueError on every rank, naming hosts and what differs, unless all ranks have the same `about`."""
    reports = gather((host_name(), {name: str(value) for name, value in about.items()}))
    first_host, first = reports[0]
    for rank, (host, theirs) in enumerate(reports):
        differs = [name for name in {**first, **theirs} if theirs.get(name) != first.get(name)]
        if differs:
            differences = "; ".join(f"{name} is {theirs.get(name)}, not {first.get(name)}" for name in differs[:5])
            raise UserError(f"host {host}, rank {rank}: {differences}, as on host {first_host}, rank 0: {way_out}.")


def describe_ranks(device: torch.device) -> list[tuple[str, str]]:
    """Rows for the header of a run: ranks and devices by host, what they talk over, and how fast."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    hosts: dict[str, list[int]] = defaultdict(list)
    names = set()
    for rank, (host, theirs) in enumerate(gather((host_name(), name))):
        hosts[host].append(rank)
        names.add(theirs)
    placed = "; ".join(f"{host}: {_in_ranges(ranks)}" for host, ranks in hosts.items())
    rows = [("hosts", f"{placed}; {', '.join(sorted(names))}")]
    if dist.get_world_size() > 1:
        speed = all_reduce_speed(device)
        between = _interconnect() if len(hosts) > 1 else f"{dist.get_backend()} within the host"
        rows.append(("interconnect", f"{between}; all-reduce {speed / 1e9:.2f} GB/s a rank"))
    return rows


def _in_ranges(ranks: list[int]) -> str:
    """Rank 3, or ranks 0-3,8."""
    parts = []
    for _, pairs in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in pairs]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {','.join(parts)}"


def all_reduce_speed(device: torch.device) -> float:
    """Bytes a second that a rank sends in a short all-reduce: 2 (n - 1) / n of the tensor's bytes, once warm."""
    world_size = dist.get_world_size()
    tensor = torch.zeros(1 << (24 if device.type == "cuda" else 20), device=device)
    seconds = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return 2 * (world_size - 1) / world_size * tensor.nbytes / min(seconds[1:])


class ComputeTime:
    """Seconds of each rank's own computing in forward passes, for the slowest rank to be named.

    Where forward passes wait for no other rank (`waits` false: ZeRO-1 and 2) it is the whole pass; under ZeRO-3 the
    linear layers in it, each after its weights have come. On CUDA by events, which no kernel waits for. What a rank
    does elsewhere is not in it: waiting for data, backward passes, an optimizer on the host.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, waits: bool):
        self._on_gpu = device.type == "cuda"
        self._group = gloo_group() if dist.get_backend() != "gloo" else None
        self._hosts = gather(host_name())
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []  # since the last log, not yet in _seconds
        self._seconds = 0.0
        self._slow_rank, self._times_in_a_row = -1, 0
        timed = [module for module in model.modules() if isinstance(module, torch.nn.Linear)] if waits else [model]
        self._hooks = [module.register_forward_pre_hook(self._begin) for module in timed]
        self._hooks += [module.register_forward_hook(self._end, prepend=True) for module in timed]

    def close(self) -> None:
        """Leave the model without hooks."""
        for hook in self._hooks:
            hook.remove()

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            self._begun = self._now()

    def _end(self, module: torch.nn.Module, args: tuple[Any, ...], output: object) -> None:
        if module.training and self._begun is not None:
            self._spans.append((self._begun, self._now()))
            self._begun = None
            if len(self._spans) >= _MANY_SPANS:  # however seldom there is a log
                self._add_up()

    def _add_up(self) -> None:
        if self._on_gpu and self._spans:
            self._spans[-1][1].synchronize()
        for begun, ended in self._spans:
            self._seconds += begun.elapsed_time(ended) / 1e3 if self._on_gpu else ended - begun
        self._spans.clear()

    def slowest(self) -> tuple[int, float, str]:
        """The rank that computed longest since the last call, its time by the median, and its host; all ranks call it.

        The median of two ranks is the faster one.
        """
        self._add_up()
        mine, self._seconds = self._seconds, 0.0
        every = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(every, torch.tensor([mine], dtype=torch.float64), group=self._group)
        times = torch.cat(every).tolist()
        typical = median_low(times)
        slowest = max(range(len(times)), key=times.__getitem__)
        return slowest, times[slowest] / typical if typical else 1.0, self._hosts[slowest]

    def metrics(self) -> tuple[dict[str, float], str | None]:
        """`slowest` for a log, and a warning where a rank is slow for the third time in a row."""
        rank, ratio, host = self.slowest()
        self._times_in_a_row = (self._times_in_a_row + 1 if rank == self._slow_rank else 1) if ratio > _SLOW else 0
        self._slow_rank = rank if ratio > _SLOW else -1
        warning = None
        if self._times_in_a_row >= _SLOW_LOGS:
            warning = f"rank {rank} on host {host} computes {ratio:.2f} times as long as the median rank"
        return {"lisa/slowest_rank": rank, "lisa/slowest_rank_times_median": ratio}, warning


def _interconnect() -> str:
    """The backend and its way between hosts: InfiniBand adapters, or the interface that is set or leads there.

    These are available and asked for; NCCL_DEBUG=INFO prints which of them NCCL takes in the end.
    """
    backend = dist.get_backend()
    folder = "/sys/class/infiniband"
    adapters = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if backend == "nccl" and adapters and os.environ.get("NCCL_IB_DISABLE", "0") != "1":
        return f"{backend}, InfiniBand adapters {os.environ.get('NCCL_IB_HCA') or ', '.join(adapters)}"
    variable = GLOO_INTERFACE if backend == "gloo" else "NCCL_SOCKET_IFNAME"
    if variable in os.environ:
        return f"{backend} over {os.environ[variable]} ({variable})"
    found = interface_to(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    return f"{backend} over {f'{found[0]} ({found[1]})' if found else 'an unknown interface'}"
