"""The store of originals: one copy on each host, pinned, and refused where there is no room."""

import resource
import types

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


def test_what_a_container_has_read_of_files_is_free(tmp_path):
    """The kernel lets go of page cache where memory is wanted."""
    for name, text in {"max": "1000", "current": "900", "stat": "anon 250\ninactive_file 600\nfile 650"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert available_memory(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 1000


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
