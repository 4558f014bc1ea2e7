"""Weights that a device has in fewer bits, or has not: their originals and their codes, once for all ranks of a host.

The first rank of each host makes a file without a name, in memory or in a folder, and the others map it through that
rank's descriptor: it is gone with the last of them, whatever ends the run. The first rank writes; the others read it
after a collective.
"""

import contextlib
import itertools
import mmap
import os
import tempfile
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import distributed as dist

from lisa_dist.core.live_bytes import shared_addresses
from lisa_dist.distributed.collectives import gather, raise_shared
from lisa_dist.distributed.health import host_name
from lisa_dist.errors import UserError
from lisa_dist.files import check_folder
from lisa_dist.text import format_bytes

HOST = "host"  # in the place of a folder: in the host's memory
_OF_OTHER_HOSTS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "gpfs", "ceph", "fuse.sshfs", "9p")
ROOM = "give a folder on a local disk with room for them"  # what to do where there is none
_ALIGNMENT = 256  # bytes, of each tensor's place


class WeightStore:
    """Tensors of the sizes of `like`, by name, in memory that the ranks of a host share; all ranks build it together.

    `place` is "host" or a folder, `freed` the bytes of this rank on the host that come free as the store is filled, and
    `way_out` what to do where it has no room. Raises
    SharedError, naming the host, where one has no room or a rank cannot see what the first has made.
    """

    def __init__(
        self, like: Mapping[Any, torch.Tensor], place: str, device: torch.device, freed: int = 0, way_out: str = ROOM
    ):
        sizes = {name: -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT for name, value in like.items()}
        self.nbytes = sum(sizes.values())
        found, rank = gather((host_name(), freed)), dist.get_rank() if dist.is_initialized() else 0
        hosts = [host for host, _ in found]
        first = hosts.index(hosts[rank])
        self.is_first_of_host = first == rank
        made, problem = None, None
        if self.is_first_of_host:
            try:
                made = _make_file(place, self.nbytes, sum(one for host, one in found if host == hosts[rank]))
            except OSError as error:
                problem = (
                    f"--lisa_frozen_store {place}: {hosts[rank]} cannot hold {format_bytes(self.nbytes)} of layers "
                    f"there ({error.strerror or error}); {way_out}."
                )
        raise_shared(problem)
        mine = None if made is None else (os.getpid(), made.fileno(), _identity(made.fileno()))
        of_first = gather(mine)[first]
        assert of_first is not None
        process, number, identity = of_first
        try:
            with open(f"/proc/{process}/fd/{number}", "r+b") as file:
                if _identity(file.fileno()) != identity:
                    raise OSError("another process has that number here")
                self._mapped = mmap.mmap(file.fileno(), self.nbytes)
        except (OSError, ValueError) as error:
            problem = (
                f"--lisa_frozen_store {place}: rank {rank} cannot see the memory of rank {first}, though both are on "
                f"{hosts[rank]} by its name ({error}); give containers other host names."
            )
        raise_shared(problem)
        if made is not None:
            made.close()
        self._whole = whole = torch.frombuffer(self._mapped, dtype=torch.uint8)
        self._device = device
        shared_addresses.add(whole.data_ptr())
        weakref.finalize(self, shared_addresses.discard, whole.data_ptr())
        self._tensors: dict[Hashable, torch.Tensor] = {}
        self._begins = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
        for name, value in like.items():
            memory = whole[self._begins[name] : self._begins[name] + value.nbytes]
            self._tensors[name] = memory.view(value.dtype).view(value.shape)

    def __getitem__(self, name: Hashable) -> torch.Tensor:
        """A tensor of the store, in the shape and dtype of what it was made for."""
        return self._tensors[name]

    def span(self, names: Sequence[Hashable]) -> tuple[torch.Tensor, dict[Hashable, tuple[int, torch.Tensor]]]:
        """The memory of tensors that are one after the other, and of each its first byte in that, and itself."""
        first, last = self._begins[names[0]], names[-1]
        memory = self._whole[first : self._begins[last] + self._tensors[last].nbytes]
        return memory, {name: (self._begins[name] - first, self._tensors[name]) for name in names}

    def write(self, name: Hashable, value: torch.Tensor) -> None:
        """Take a tensor over, on the host's first rank; a copy from a GPU is not waited for."""
        if self.is_first_of_host:
            self._tensors[name].copy_(value, non_blocking=True)

    def pin(self) -> None:
        """Pin it where there is a GPU, so that copies need not be waited for: then all of its memory is taken."""
        if self._device.type != "cuda":
            return
        cudart, address = torch.cuda.cudart(), self._whole.data_ptr()
        error = int(cudart.cudaHostRegister(address, self.nbytes, 0))
        if not error:
            weakref.finalize(self, cudart.cudaHostUnregister, address)
            return
        with contextlib.suppress(RuntimeError):  # CUDA tells of it once more, at the next kernel
            torch.zeros(1, device=self._device)
        rank = dist.get_rank() if dist.is_initialized() else 0
        print(
            f"warning: rank {rank} could not pin the frozen layers (CUDA error {error}): a switch takes longer",
            flush=True,
        )


def _make_file(place: str, nbytes: int, freed: int) -> IO[bytes]:
    """A file without a name; OSError where there is no room for it."""
    if place != HOST:
        file = tempfile.TemporaryFile(dir=Path(place))  # noqa: SIM115 - until it is mapped
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return file
    available = available_memory() + freed
    if nbytes > available:
        raise OSError(f"{format_bytes(available)} of its memory are free")
    memory = open(os.memfd_create("lisa_dist"), "r+b")  # noqa: SIM115
    memory.truncate(nbytes)  # memory is taken as it is written
    return memory


def _identity(descriptor: int) -> tuple[int, int, int]:
    """What file a descriptor is of."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still allocate, page cache included.

    The limit is the host's free memory, or that of the process's control group or of any group above it.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    return min([psutil.virtual_memory().available, *_free_in_control_groups(root)])


def _free_in_control_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left below the limit of each control group that this process belongs to (cgroup v1 and v2)."""
    mounted = root / "sys/fs/cgroup"
    groups = root / "proc/self/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, usage, prefix = mounted, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mount, limit, usage, prefix = mounted / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        # A container may see its own group mounted at the top, under the path that the host has for it.
        own = mount / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(mount) and (group / limit).is_file():
                allowed = (group / limit).read_text(encoding="ascii").strip()
                if allowed == "max":
                    continue
                stat = (group / "memory.stat").read_text(encoding="ascii")
                parts = dict(entry.split() for entry in stat.splitlines())
                cached = sum(int(parts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield int(allowed) - int((group / usage).read_text(encoding="ascii")) + cached


def check_store(place: str) -> None:
    """Raise UserError for a --lisa_frozen_store that is no folder to write in, or one that other hosts have."""
    if place == HOST:
        return
    folder = Path(place)
    check_folder("--lisa_frozen_store", folder, must_be_there=True)
    mounts = [(Path(one.mountpoint), one.fstype) for one in psutil.disk_partitions(all=True)]
    of_folder = [mount for mount in mounts if mount[0] in (folder.resolve(), *folder.resolve().parents)]
    kind = max(of_folder, key=lambda mount: len(mount[0].parts), default=(folder, ""))[1]
    if kind in _OF_OTHER_HOSTS:
        raise UserError(
            f"--lisa_frozen_store {place}: is on another host's disk ({kind}), which every switch would read; give a "
            "folder on a disk of this host, or host for its memory."
        )
