"""The device of a rank: its memory as CUDA tells it, and the allocator's settings."""

import os

import pytest
import torch

from lisa_dist.distributed.devices import gpu_bytes_for_tensors, use_expandable_segments

GIB = 2**30


def test_what_others_hold_of_a_gpu_is_not_for_tensors(monkeypatch):
    """Of 80 GiB 10 are free; 60 are torch's own, in use or not; 10 are the context's, NCCL's and other processes'."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 * GIB)
    assert gpu_bytes_for_tensors(torch.device("cuda", 0)) == pytest.approx(68.4 * GIB)


@pytest.mark.parametrize("name", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_settings_of_the_allocator_are_the_users_where_there_are_any(monkeypatch, name):
    for one in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(one, "")  # for the test's end to take away what is set
        monkeypatch.delenv(one)
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:256")
    use_expandable_segments()
    found = {one: os.environ[one] for one in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF") if one in os.environ}
    expected = (
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if name is None else {name: "max_split_size_mb:256"}
    )
    assert found == expected
