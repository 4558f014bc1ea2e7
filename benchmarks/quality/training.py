"""Question/answer examples as batches, and the loop that trains on them: what the benchmarks of losses share."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import PreTrainedTokenizerBase

import lisa_dist

Batch = dict[str, torch.Tensor]


def read_tokens(tokenizer: PreTrainedTokenizerBase, path: str, count: int, length: int) -> list[list[int]]:
    """The first examples of a file, question and answer in one text, cut to `length` tokens."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()[:count]
    texts = [f"{row['question']} {row['answer']}" for row in map(json.loads, lines)]
    return [tokenizer(text)["input_ids"][:length] for text in texts]


def padded(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    """Rows of one length."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def on_device(engine, inputs: Batch) -> Batch:
    """A batch where the engine's model is."""
    return {name: value.to(engine.device) for name, value in inputs.items()}


def mean_of_ranks(loss: torch.Tensor) -> float:
    total = loss.detach().float().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train(
    engine,
    lisa: lisa_dist.LisaController | None,
    batches: Iterable[Batch],
    rates: Iterable[float | None] = itertools.repeat(None),
) -> list[float]:
    """The losses of a step on each batch, of all ranks, as long as there are rates; at None the learning rate stays."""
    losses = []
    for inputs, rate in zip(batches, rates, strict=False):
        for group in engine.optimizer.param_groups:
            group["lr"] = group["lr"] if rate is None else rate
        if lisa is not None:
            lisa.on_step_begin()
        loss = engine(**on_device(engine, inputs)).loss
        engine.backward(loss)
        engine.step()
        losses.append(mean_of_ranks(loss))
    return losses


def held_out_losses(engine, batches: Iterable[Batch]) -> list[float]:
    """The loss of each batch, of all ranks, without training."""
    engine.eval()
    with torch.no_grad():
        losses = [mean_of_ranks(engine(**on_device(engine, inputs)).loss) for inputs in batches]
    engine.train()
    return losses
