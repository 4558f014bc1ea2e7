"""Questions and answers as batches whose labels are the answers, and the loop that trains on them."""

import functools
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

import lisa_dist

Batch = dict[str, torch.Tensor]
LENGTH = 256  # tokens of the longest row


@dataclass(frozen=True)
class Data:
    """Examples: their tokens, and how many of these are the question's."""

    tokenizer: object
    rows: list[tuple[list[int], int]]

    @classmethod
    @functools.cache
    def read(cls, model_path: str, path: str, count: float) -> "Data":
        """The first examples of a file in which something of the answer is left, or with a negative count the last."""
        tokenizer, rows = AutoTokenizer.from_pretrained(model_path), []
        for asked, answered in read_pairs(path):
            question = tokenizer(asked + "\n")["input_ids"]
            answer = [*tokenizer(answered, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            tokens = (question + answer)[:LENGTH]
            if len(tokens) > len(question):
                rows.append((tokens, len(question)))
            if len(rows) == count:
                break
        return cls(tokenizer, rows[int(count) :] if count < 0 else rows)

    def batch(self, places: list[int]) -> Batch:
        """Examples side by side, as wide as the longest; labels are the answers."""
        rows = [self.rows[place] for place in places]
        width = max(len(tokens) for tokens, _ in rows)
        ids = torch.full((len(rows), width), self.tokenizer.eos_token_id)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for at, (tokens, asked) in enumerate(rows):
            ids[at, : len(tokens)], mask[at, : len(tokens)] = torch.tensor(tokens), 1
            labels[at, asked : len(tokens)] = torch.tensor(tokens[asked:])
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def read_pairs(path: str) -> list[tuple[str, str]]:
    """Questions and answers of a .jsonl, instructions and outputs of a .json in Alpaca's format, or PubMedQA's file.

    Of PubMedQA's contexts the last words, which leave room for the question.
    """
    text = Path(path).read_text(encoding="utf-8")
    if path.endswith(".jsonl"):
        return [(row["question"], row["answer"]) for row in map(json.loads, text.splitlines())]
    if isinstance(found := json.loads(text), dict):
        contexts = {key: " ".join(" ".join(one["CONTEXTS"]).split()[-100:]) for key, one in found.items()}
        return [(f"{contexts[key]}\n{one['QUESTION']}", one["final_decision"]) for key, one in found.items()]
    return [("\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in found]


def evaluate(engine, data: Data, rows: int) -> tuple[float, float]:
    """Loss and next-token accuracy over the answers' tokens."""
    engine.eval()
    loss = hits = count = 0.0
    for start in range(0, len(data.rows), rows):
        inputs = on_device(engine, data.batch(range(start, min(start + rows, len(data.rows)))))
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = engine(**inputs).logits[:, :-1]
        counted = labels != -100
        loss += torch.nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="sum").item()
        hits += (logits[counted].argmax(-1) == labels[counted]).sum().item()
        count += counted.sum().item()
    return loss / count, hits / count


def on_device(engine, inputs: Batch) -> Batch:
    """A batch where the engine's model is."""
    return {name: value.to(engine.device) for name, value in inputs.items()}


def train(
    engine,
    lisa: lisa_dist.LisaController | None,
    batches: Iterable[Batch],
    rates: Iterable[float | None] = itertools.repeat(None),
) -> list[float]:
    """The losses of a step on each batch, as long as there are rates; at None the learning rate stays."""
    losses = []
    for inputs, rate in zip(batches, rates, strict=False):
        for group in engine.optimizer.param_groups:
            group["lr"] = group["lr"] if rate is None else rate
        if lisa is not None:
            lisa.on_step_begin()
        loss = engine(**on_device(engine, inputs)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
