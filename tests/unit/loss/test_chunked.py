"""TRL's loss in chunks: the head's gradient by chunks of words, to the bit of the weights, in a third of its bytes."""

import pytest
import torch
from models import model_with_head
from torch.nn.functional import cross_entropy
from transformers import Trainer
from trl import DPOTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils

from lisa_dist.core.live_bytes import AllocationTracker
from lisa_dist.loss import chunked as head_gradient
from lisa_dist.loss.chunked import LogProbsInChunks, use_chunks
from lisa_dist.train.monitoring import MonitoredMixin

WHY = "there is no C compiler, which Triton needs"
WORDS = 48  # of a chunk; of the 128 words the last chunk has 32


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    monkeypatch.setattr(LogProbsInChunks, "rows", WORDS)
    use_chunks()


def gradients(name: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """A fused head's loss, with the mean entropy added so that it has a gradient, and the gradients by name."""
    model = model_with_head(name).to(dtype).train()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    tokens = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    found = model(input_ids=tokens, labels=tokens.masked_fill(torch.arange(16) < 4, -100), fused_lm_head=True)
    (found.loss + 0.1 * found.entropy.mean()).backward()
    return found.loss.item(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("at_once", [4096, 20])
@pytest.mark.parametrize("name", ["llama", "tied llama", "capped", "scaled", "biased"])
def test_the_gradient_of_a_bf16_head_is_that_of_all_words_at_once(monkeypatch, name, at_once):
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", at_once)  # tokens; of 48, so the last part has fewer
    loss, by_chunks = gradients(name, torch.bfloat16)
    monkeypatch.setattr(LogProbsInChunks, "rows", None)
    whole_loss, whole = gradients(name, torch.bfloat16)
    assert loss == whole_loss
    assert by_chunks.keys() == whole.keys()
    for parameter, gradient in whole.items():
        rtol, atol = (0.0, 0.0) if "lm_head" in parameter else (0.02, 1e-5)
        assert torch.allclose(by_chunks[parameter], gradient, rtol=rtol, atol=atol), parameter
    assert any("lm_head" in parameter for parameter in whole) is (name in ("llama", "biased"))


def test_gradients_are_those_of_plain_logits_in_fp32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 16), torch.randn(100, 16)
    targets = torch.randint(0, 100, (30,))
    found = [tensor.bfloat16().requires_grad_() for tensor in (hidden, weight)]
    LogProbsInChunks.apply(*found, None, targets, 1.0, 32, None, 1.0, ())[0].mean().neg().backward()
    exact = [tensor.detach().float().requires_grad_() for tensor in found]
    cross_entropy(exact[0] @ exact[1].T, targets).backward()
    for one, other in zip(found, exact, strict=True):
        assert torch.allclose(one.grad.float(), other.grad, atol=0.02 * other.grad.abs().max())


@pytest.mark.parametrize(("words", "copies"), [(None, 3), (WORDS, 1)])
def test_a_bf16_head_s_gradient_is_never_whole_in_fp32(monkeypatch, words, copies):
    """Its bytes at the backward pass's peak, in copies of the gradient; of the rest there is little beside it."""
    monkeypatch.setattr(LogProbsInChunks, "rows", words)
    hidden = torch.zeros(4, 512, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(4096, 512, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(4, dtype=torch.long)
    loss = LogProbsInChunks.apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, ())[0].sum()
    with AllocationTracker(lambda tensor: "all") as tracker:
        tracker.add([weight])
        loss.backward()
    assert copies <= tracker.peak / weight.nbytes - 1 < copies + 0.2


def test_frozen_and_fp32_heads_have_trl_s_own_pass(monkeypatch):
    """A frozen head has no gradient to cut; one in fp32 has its sum in fp32 as the gradient, and no copy."""
    monkeypatch.setattr(head_gradient, "rows_of", None)  # which chunks need
    for dtype, trains in ((torch.bfloat16, False), (torch.float32, True)):
        hidden = torch.randn(4, 8, dtype=dtype, requires_grad=True)
        weight = torch.randn(128, 8, dtype=dtype, requires_grad=trains)
        targets = torch.zeros(4, dtype=torch.long)
        LogProbsInChunks.apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, ())[0].sum().backward()
        assert hidden.grad is not None
        assert (weight.grad is not None) is trains


@pytest.mark.parametrize(("trainer", "has_chunks"), [(DPOTrainer, True), (Trainer, False)])
def test_every_trainer_of_trl_has_chunks_also_ones_own(monkeypatch, trainer, has_chunks):
    """As plans of its steps have them."""
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    own = type("Own", (MonitoredMixin, trainer), {})
    with pytest.raises((AttributeError, RuntimeError)):  # of a model that is not there
        own(model=None, args=None)
    assert (vars(utils)["_ChunkedLogProbFunction"] is LogProbsInChunks) == has_chunks


@pytest.mark.parametrize(("on_gpu", "missing", "by_torch"), [(True, WHY, True), (True, "", False), (False, WHY, False)])
def test_torch_computes_the_loss_where_triton_cannot_compile(monkeypatch, on_gpu, missing, by_torch):
    monkeypatch.setattr(head_gradient.torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(head_gradient, "why_no_compiler", lambda: missing)
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    said = head_gradient.choose_loss_kernels()
    assert said == (f"torch, slower than Triton ({WHY})" if by_torch else None)
    assert chunked_logprob._TRITON_AVAILABLE is not by_torch
