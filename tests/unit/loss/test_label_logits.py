"""Logits of the positions with a label: the loss, its metrics and gradients of a plain loss on all logits."""

import pytest
import torch
from models import model_with_head, tiny_llama
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head, selective_log_softmax_and_entropy

from lisa_dist.loss.label_logits import _score, add_label_logits, why_no_label_logits


def with_label_logits(name: str):
    """A model, and how many hidden states its head was given in each pass."""
    model, rows = model_with_head(name).train(), []
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    add_label_logits(model)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: rows.append(logits.shape[:-1].numel()))
    return model, rows


def masked_batch() -> dict[str, torch.Tensor]:
    """Three rows of prompt and answer, one shorter than the others, one without an answer."""
    tokens = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    labels[:, :11], labels[1], labels[2, 14:], mask[2, 14:] = -100, -100, -100, 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("labels", "words"), [(0, 50), (1, 50), (7, 151_936), (200, 4096)])
def test_scores_by_rows_have_the_bits_of_trl(threads, dtype, labels, words):
    generator = torch.Generator().manual_seed(labels)
    logits = (3 * torch.randn(labels, words, generator=generator)).to(dtype)
    targets = torch.randint(words, (labels,), generator=generator)
    mine, trls = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        log_probs, entropies = _score(mine, targets)
        expected = selective_log_softmax_and_entropy(trls.float()[None], targets[None])
        log_probs.sum().div(7).backward()
        expected[0].sum().div(7).backward()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(log_probs, expected[0][0])
    assert torch.equal(mine.grad, trls.grad)
    torch.testing.assert_close(entropies, expected[1][0].detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2", "mixtral", "capped", "scaled"])
def test_loss_metrics_and_gradients_equal_those_of_all_logits(name):
    (model, rows), reference, batch = with_label_logits(name), model_with_head(name).train(), masked_batch()
    found = model(**batch, fused_lm_head=True)
    found.loss.backward()

    targets = batch.pop("labels")[:, 1:]
    outputs = reference(**batch)
    logits = outputs.logits[:, :-1][targets != -100]
    loss = cross_entropy(logits, targets[targets != -100])
    if name == "mixtral":
        assert found.aux_loss.item() == pytest.approx(outputs.aux_loss.item())
        loss = loss + 0.1 * outputs.aux_loss
    loss.backward()
    assert rows == [len(logits)] == [8], "the head has seen nothing else"
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-6)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    probabilities = log_softmax(logits, -1)
    assert torch.equal(found.label_mask[:, :-1], targets != -100)
    scores = -cross_entropy(logits, targets[targets != -100], reduction="none")
    assert torch.allclose(found.log_probs[found.label_mask], scores, atol=1e-5)
    assert not found.log_probs[~found.label_mask].any()
    assert found.entropy.sum().item() == pytest.approx(-(probabilities.exp() * probabilities).sum().item(), rel=1e-5)
    assert found.is_top1.sum() == (logits.argmax(-1) == targets[targets != -100]).sum()


def test_a_batch_without_labels_reaches_every_weight():
    model, rows = with_label_logits("llama")
    batch = masked_batch()
    batch["labels"].fill_(-100)
    loss = model(**batch, fused_lm_head=True).loss
    loss.backward()
    assert loss == 0
    assert rows == [0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_gradients_the_loss_in_chunks_stays():
    """It never has all logits, and without a backward pass it computes them once."""
    model, rows = with_label_logits("llama")
    loss = model(**masked_batch(), fused_lm_head=True).loss
    with torch.no_grad():
        assert model(**masked_batch(), fused_lm_head=True).loss == pytest.approx(loss.item(), abs=1e-6)
    assert rows == [8]
    assert model(**masked_batch()).logits.shape == (3, 16, 128)


class OfAllPositions(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None):
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        return type("Outputs", (), {"logits": hidden @ self.lm_head.weight.T})


def test_a_model_that_cannot_is_named():
    assert why_no_label_logits(LlamaForCausalLM) is None
    assert why_no_label_logits(OfAllPositions).startswith("OfAllPositions takes no logits_to_keep")
    assert "none of transformers'" in why_no_label_logits(None)
    model = OfAllPositions(tiny_llama().config)
    add_fused_lm_head(model)
    add_label_logits(model)
    with pytest.raises(ValueError, match="--loss logits: OfAllPositions does not call its head; give --loss chunked"):
        model(**masked_batch(), fused_lm_head=True)
