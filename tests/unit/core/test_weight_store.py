"""The store of originals: one copy on each host, pinned, and refused where there is no room."""

import contextlib
import io
import resource
import types
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist

from lisa_dist.core.weight_store import WeightStore, available_memory, check_store


def share_a_store(place: str) -> list:
    like = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7)}
    store = WeightStore(like, place, torch.device("cpu"))
    store.write("a", torch.arange(15).view(3, 5))  # on the host's first rank alone
    store.write("b", torch.full((7,), dist.get_rank() + 1.0))
    dist.barrier()
    found = [store["a"].tolist(), store["b"].tolist(), store["a"].dtype]
    dist.barrier()
    return found


@pytest.mark.parametrize("where", ["host", "folder"])
def test_ranks_of_a_host_share_one_copy(tmp_path, where):
    found = run_ranks(share_a_store, 3, "host" if where == "host" else str(tmp_path))
    assert found == [[torch.arange(15.0).view(3, 5).tolist(), [1.0] * 7, torch.bfloat16]] * 3
    assert list(tmp_path.iterdir()) == [], "nothing stays behind"


def test_a_store_without_room_is_refused(small_disk, monkeypatch):
    folder, largest_file = small_disk
    like = {"a": torch.zeros(1 << 24, dtype=torch.bfloat16)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
    with pytest.raises(ValueError, match=r"cannot hold 32.0 MiB of layers there \((No|File)"):
        WeightStore(like, str(folder), torch.device("cpu"))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(ValueError, match="No such file or directory"):
        WeightStore(like, str(folder / "missing"), torch.device("cpu"))
    available = type("Memory", (), {"available": 1 << 20})
    monkeypatch.setattr("psutil.virtual_memory", lambda: available)
    with pytest.raises(ValueError, match=r"--lisa_frozen_store host: .* \(1.0 MiB of its memory are free\)"):
        WeightStore(like, "host", torch.device("cpu"))
    WeightStore(like, "host", torch.device("cpu"), freed=1 << 25)


def write_group(folder: Path, version: int, limit: str, usage: int, cached: int) -> None:
    """Write the files of a control group's memory."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, text in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{text}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 250\n{prefix}inactive_file {cached}\n{prefix}active_file 7\nfile 650\n")


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_limited_by_every_control_group_above_the_process(tmp_path, version):
    """The kernel frees page cache when memory is wanted."""
    unlimited = "max" if version == 2 else "9223372036854771712"
    top = tmp_path / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    (tmp_path / "proc/self").mkdir(parents=True)
    groups = tmp_path / "proc/self/cgroup"
    groups.write_text("0::/pod/job\n" if version == 2 else "5:cpu:/\n4:hugetlb,memory:/pod/job\n0::/\n")
    write_group(top / "pod/job", version, unlimited, 900, 0)
    assert available_memory(tmp_path) > 10_000
    write_group(top / "pod", version, "10000", 9000, 1993)
    assert available_memory(tmp_path) == 3000
    write_group(top / "pod/job", version, "1000", 900, 593)
    assert available_memory(tmp_path) == 700
    # In a container the host's path leads nowhere, and the container's own group is at the top.
    groups.write_text(groups.read_text().replace("pod/job", "docker/1234"))
    assert available_memory(tmp_path) > 10_000
    write_group(top, version, "500", 400, 0)
    assert available_memory(tmp_path) == 107
    groups.unlink()
    assert available_memory(tmp_path) > 10_000


def fail_to_pin() -> str:
    runtime = types.SimpleNamespace(cudaHostRegister=lambda address, nbytes, flags: 2 * dist.get_rank())
    store, said = WeightStore({"a": torch.zeros(3)}, "host", torch.device("cuda")), io.StringIO()
    runtime.cudaHostUnregister = lambda address: 0
    repeats = patch.object(torch, "zeros", side_effect=RuntimeError)  # the next kernel meets the same error
    with repeats, patch.object(torch.cuda, "cudart", lambda: runtime), contextlib.redirect_stdout(said):
        store.pin()
    dist.barrier()
    return said.getvalue()


def test_each_rank_that_cannot_pin_warns():
    assert run_ranks(fail_to_pin, 2) == [
        "",
        "warning: rank 1 could not pin the frozen layers (CUDA error 2): a switch takes longer\n",
    ]


def test_a_store_is_pinned_until_it_goes(monkeypatch):
    pinned = []
    register = lambda address, nbytes, flags: pinned.append(nbytes) or 0  # noqa: E731
    runtime = types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: pinned.append(0))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    store = WeightStore({"a": torch.zeros(3)}, "host", torch.device("cuda"))
    assert pinned == []
    store.pin()
    assert pinned == [store.nbytes]
    del store
    assert pinned[1:] == [0]


def test_a_store_on_another_hosts_disk_is_refused(tmp_path, monkeypatch):
    check_store(str(tmp_path))
    mount = types.SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")
    monkeypatch.setattr(
        "psutil.disk_partitions", lambda all: [types.SimpleNamespace(mountpoint="/", fstype="ext4"), mount]
    )
    with pytest.raises(ValueError, match=r"--lisa_frozen_store .*: is on another host's disk \(nfs4\)"):
        check_store(str(tmp_path))
    with pytest.raises(ValueError, match="is no folder; give another"):
        check_store(str(tmp_path / "absent"))
