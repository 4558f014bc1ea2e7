"""What computes the loss and Liger's layers on a GPU where Triton can be imported and cannot compile."""

import pytest
from models import tiny_llama
from transformers import TrainingArguments
from trl.kernels import chunked_logprob

from lisa_dist import LisaConfig
from lisa_dist.train import chunked_loss, liger

WHY = "there is no C compiler, which Triton needs"


@pytest.mark.parametrize(("on_gpu", "missing", "by_torch"), [(True, WHY, True), (True, "", False), (False, WHY, False)])
def test_torch_computes_the_loss_where_triton_cannot_compile(monkeypatch, on_gpu, missing, by_torch):
    monkeypatch.setattr(chunked_loss.torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(chunked_loss, "why_no_compiler", lambda: missing)
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    said = chunked_loss.choose_loss_kernels()
    assert said == (f"torch, slower than Triton ({WHY})" if by_torch else None)
    assert chunked_logprob._TRITON_AVAILABLE is not by_torch


def test_liger_is_refused_where_triton_cannot_compile(monkeypatch):
    monkeypatch.setattr(liger.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "why_no_compiler", lambda: WHY)
    args = TrainingArguments(output_dir="unused", use_cpu=True, use_liger_kernel=True)
    with pytest.raises(ValueError, match="--use_liger_kernel True: there is no C compiler, which Triton needs; leave"):
        liger.check_liger(args, tiny_llama().config, LisaConfig())
