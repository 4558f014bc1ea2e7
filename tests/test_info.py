"""`lisa-dist info`: what is installed, and which kernels and attention would run, and why."""

import sys

import pytest

from lisa_dist import backend
from lisa_dist.cli import main


def say(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["lisa-dist", *words])
    main()
    return capsys.readouterr().out


def test_kernels_and_attention_come_with_reasons(monkeypatch, capsys):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    lines = {line[:24].strip(): line[24:].strip() for line in say(monkeypatch, capsys, "info").splitlines()}
    assert lines["kernels of lisa_adamw"] == "torch (no CUDA device)"
    assert lines["attention of a Llama"] == "sdpa (no CUDA device)"
    assert lines["device"] == "CPU"
    assert lines["deepspeed"][0].isdigit()
    assert lines["flash-attn"] == "not installed" or lines["flash-attn"][0].isdigit()


def test_what_is_forced_is_said_and_in_vain_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert "torch (LISA_DIST_KERNELS=torch)" in say(monkeypatch, capsys, "info")
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(SystemExit, match="2"):
        say(monkeypatch, capsys, "info")
    assert "lisa-dist info: LISA_DIST_KERNELS=cuda: unknown" in capsys.readouterr().out
