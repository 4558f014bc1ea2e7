"""`lisa-dist info`: what is installed, and which kernels and attention would run, and why."""

import os
import sys
from types import SimpleNamespace

import pytest

from lisa_dist.cli import main
from lisa_dist.commands import info
from lisa_dist.optim import ops as backend


def say(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["lisa-dist", *words])
    main()
    return capsys.readouterr().out


def lines_of(said: str) -> list[str]:
    return [" ".join(line.split()) for line in said.splitlines()]


def test_kernels_and_attention_come_with_reasons(monkeypatch, capsys):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    lines = {line[:24].strip(): line[24:].strip() for line in say(monkeypatch, capsys, "info").splitlines()}
    assert lines["kernels of lisa_adamw"] == "torch (no CUDA device)"
    assert lines["attention of a Llama"] == "sdpa (no CUDA device)"
    assert lines["devices"] == f"{os.cpu_count()} CPU cores"
    assert lines["deepspeed"][0].isdigit()
    assert lines["flash-attn"] == "not installed" or lines["flash-attn"][0].isdigit()


def test_what_is_missing_comes_with_the_way_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(info.shutil, "which", lambda name: None if name in ("pdsh", "c++") else f"/bin/{name}")
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    said = lines_of(say(monkeypatch, capsys, "info"))
    missing = [line for line in said if line.startswith("missing")]
    assert missing == [
        "missing: c++ for building DeepSpeed's operators; apt install g++",
        "missing: pdsh for deepspeed --hostfile on several hosts; apt install pdsh",
    ]


def test_a_gpu_has_more_uses(monkeypatch, capsys):
    monkeypatch.setattr(info.torch.cuda, "is_available", lambda: True)
    gpu = SimpleNamespace(name="a GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(info.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(info.torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(info, "choose_kernels", lambda device: ("triton", "a GPU"))
    monkeypatch.setattr(info, "choose_attention", lambda *args, **kwargs: ("sdpa", "a GPU"))
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    said = "\n".join(lines_of(say(monkeypatch, capsys, "info")))
    for name in ("flash-attn for attention of packed rows", "triton for", "wandb for"):
        assert f"missing: {name}" in said
    assert "devices a GPU (80.00 GiB), a GPU (80.00 GiB)" in said
    monkeypatch.setattr(info.shutil, "which", lambda name: f"/bin/{name}")
    assert lines_of(say(monkeypatch, capsys, "info"))[-1] == "missing nothing that a run could use"


def test_what_is_forced_is_said_and_in_vain_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert "torch (LISA_DIST_KERNELS=torch)" in say(monkeypatch, capsys, "info")
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(SystemExit, match="2"):
        say(monkeypatch, capsys, "info")
    assert "lisa-dist info: LISA_DIST_KERNELS=cuda: unknown" in capsys.readouterr().out
