"""A driver that is older than torch's CUDA: one line before a model is loaded, and no run on CPUs unasked."""

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from models import tiny_llama
from ranks import free_port
from transformers import TrainingArguments

from lisa_dist.commands import check, train
from lisa_dist.commands.info import describe
from lisa_dist.config import LisaConfig
from lisa_dist.core.controller import LisaController
from lisa_dist.distributed.devices import why_no_gpu
from lisa_dist.errors import UserError
from lisa_dist.train.deepspeed_arguments import begin_deepspeed

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
SAID = f"the NVIDIA driver is for CUDA 12.4 at most, and torch {torch.__version__} has CUDA 13.0: update the driver"


@pytest.fixture
def torch_says(monkeypatch):
    """torch with CUDA 13 on a host with two GPUs, where CUDA cannot begin: NVML counts them, CUDA's runtime none."""
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.delenv(name, raising=False)

    def say(error: str, counted: int = 2) -> None:
        def begin() -> None:
            raise RuntimeError(error)

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "_cudart", object())
        monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: counted)
        monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 0, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_init", begin, raising=False)

    return say


NO_GPU, NAMED = "No CUDA GPUs are available", "this host has no such GPU, nvidia-smi -L lists those that it has"
NO_DRIVER = "Found no NVIDIA driver on your system. Please check"
NOT_BEGUN = "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"


@pytest.mark.parametrize(
    ("variables", "error", "counted", "said"),
    [
        ({}, TOO_OLD, 2, SAID),
        ({}, TOO_OLD, -1, SAID),  # NVML cannot be loaded
        ({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}, TOO_OLD, 2, SAID),  # torch counts GPUs alone, and says there are some
        ({"CUDA_VISIBLE_DEVICES": ""}, TOO_OLD, 2, ""),  # a run that wants no GPU, as is the next
        ({"DS_ACCELERATOR": "cpu"}, TOO_OLD, 2, ""),
        ({}, f"{NOT_BEGUN}\nat:", 2, f"torch cannot use the GPUs of this host ({NOT_BEGUN}): see that nvidia-smi"),
        ({}, NO_DRIVER, -1, ""),
        ({}, NO_GPU, 2, ""),  # for this job
        ({"CUDA_VISIBLE_DEVICES": "GPU-5a2e"}, NO_GPU, 0, f"CUDA_VISIBLE_DEVICES=GPU-5a2e: {NAMED}"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-77c1"}, NO_GPU, 0, f"CUDA_VISIBLE_DEVICES=MIG-77c1: {NAMED}"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, NO_GPU, 0, ""),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5a2e"}, NO_DRIVER, 0, ""),
    ],
)
def test_why_torch_does_not_begin(torch_says, monkeypatch, variables, error, counted, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    torch_says(error, counted)
    assert torch.cuda.is_available() == ("PYTORCH_NVML_BASED_CUDA_CHECK" in variables)
    assert why_no_gpu().startswith(said)
    assert "\n" not in why_no_gpu()
    assert bool(why_no_gpu()) == bool(said)


def test_a_run_ends_by_one_line_before_the_model_is_looked_for(torch_says, tmp_path, capsys):
    torch_says(TOO_OLD)
    words = ["--model_name_or_path", str(tmp_path / "absent"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        train.main([*words, "--dataset_name", "rows.jsonl"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"lisa-dist: {SAID}")
    assert line.endswith("; --use_cpu true trains on CPUs.")
    with pytest.raises(SystemExit, match="2"):
        train.main([*words, "--dataset_name", "rows.jsonl", "--use_cpu", "true"])
    assert SAID not in capsys.readouterr().out


def test_check_and_info_say_it(torch_says, tmp_path, monkeypatch, capsys):
    torch_says(TOO_OLD)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (ranks | {"MASTER_PORT": str(free_port()), "SLURMD_NODENAME": "node1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        check.main(["--output_dir", str(tmp_path / "out"), "--gpus_per_node", "2"])
    assert f"lisa-dist check: host node1: {SAID}" in capsys.readouterr().err
    said = [" ".join(line.split()) for line in describe().splitlines()]
    (line,) = [line for line in said if line.startswith("missing: GPU")]
    assert SAID in line


@pytest.mark.parametrize("kind", ["xpu", "npu", "hpu", "mps"])
def test_another_accelerator_is_told_before_a_model_is_looked_for(monkeypatch, tmp_path, capsys, kind):
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: kind)
    words = ["--model_name_or_path", str(tmp_path / "absent"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        train.main([*words, "--dataset_name", "rows.jsonl"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"lisa-dist: DeepSpeed has found an accelerator of the kind {kind} here, ")
    assert line.endswith(": export DS_ACCELERATOR=cpu.")
    with pytest.raises(UserError, match="export DS_ACCELERATOR=cpu"):
        LisaController(tiny_llama(), LisaConfig.plain())
    with pytest.raises(UserError, match="export DS_ACCELERATOR=cpu"):
        begin_deepspeed([TrainingArguments(output_dir=str(tmp_path), use_cpu=True)], "zero2")
