"""The device of a rank: its memory as CUDA tells it, and the allocator's settings."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import tiny_llama

from lisa_dist.config import LisaConfig
from lisa_dist.core.controller import LisaController
from lisa_dist.distributed.allocator import use_expandable_segments
from lisa_dist.distributed.devices import free_gpu_bytes, gpu_bytes_for_tensors
from lisa_dist.train.step_memory import bytes_of_any_gpu

ROOT = Path(__file__).parents[3]
GIB = 2**30
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GROWING = "expandable_segments:True"
BEGUN = """
import os, runpy, sys
import torch
from simulated_gpu import cuda
def begin():
    print("CUDA begins with", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    sys.stdout.flush()
    os._exit(0)
torch.version.cuda = "13.0"
cuda.CONTEXT.begin = cuda._ANSWERS["_lazy_init"] = begin
cuda.answer()
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.fixture
def memory(monkeypatch):
    """Set what CUDA has free, in GiB, of how much, and what torch has reserved and allocated."""

    def set_to(free: float, total: float, reserved: float, allocated: float = 0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, total * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * GIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated * GIB)

    return set_to


@pytest.mark.parametrize(
    ("free", "total", "reserved", "expected"), [(20, 24, 2, 20.5), (70, 80, 5, 70.2), (1, 24, 0, 0)]
)
def test_before_a_step_a_reserve_is_kept_back(memory, free, total, reserved, expected):
    memory(free, total, reserved)
    assert bytes_of_any_gpu(torch.device("cuda", 0)) == pytest.approx(expected * GIB)


def test_what_others_hold_of_a_gpu_is_not_for_tensors(memory):
    """Of 80 GiB 10 are free; 60 are torch's own, in use or not; 10 are the context's, NCCL's and other processes'."""
    memory(10, 80, 60)
    assert gpu_bytes_for_tensors(torch.device("cuda", 0)) == pytest.approx(68.4 * GIB)


def test_a_pynvml_without_a_driver_is_not_asked(memory, monkeypatch):
    """As DeepSpeed's `available_memory` asks it."""

    def init():
        raise RuntimeError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=init, NVMLError=RuntimeError))
    memory(10, 80, 8, 5)
    assert free_gpu_bytes(0) == 13 * GIB


@pytest.fixture
def unset(monkeypatch):
    """No setting of the allocator in the environment, before and after."""
    for one in SETTINGS:
        monkeypatch.setenv(one, "")  # for the test's end to take away what is set
        monkeypatch.delenv(one)


@pytest.mark.parametrize("name", [None, *SETTINGS])
def test_settings_of_the_allocator_are_the_users_where_there_are_any(monkeypatch, unset, name):
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:256")
    use_expandable_segments()
    found = {one: os.environ[one] for one in SETTINGS if one in os.environ}
    assert found == ({SETTINGS[0]: GROWING} if name is None else {name: "max_split_size_mb:256"})


@pytest.mark.parametrize("of_torch_2_9", [False, True])
def test_an_allocator_that_runs_is_told(monkeypatch, unset, of_torch_2_9):
    """As a loop of one's own has it, whose model may be on the GPU; torch has had two functions for it."""
    model, told = tiny_llama(), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    if of_torch_2_9:
        monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings", raising=False)
        monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", told.append)
    else:
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    LisaController(model, LisaConfig.plain())
    LisaController(model, LisaConfig.plain())  # whoever sets it, once is enough
    assert told == [GROWING]


def test_a_run_has_set_them_when_cuda_begins(unset):
    """What launch/train.py imports begins it; in a new process, which ends there."""
    folders = os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": folders, "CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cuda"}
    environment |= {"RANK": "0"}  # whose words nobody looks at before
    command = [sys.executable, "-c", BEGUN, str(ROOT / "launch" / "train.py"), "--output_dir", "out"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.stdout == f"CUDA begins with {GROWING}\n", finished.stderr
