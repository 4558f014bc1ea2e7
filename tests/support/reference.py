"""LISA on one process in plain torch: the independent reference that the library is held against.

It shares no code with `lisa_dist` and knows nothing of DeepSpeed: AdamW is written out, one parameter at a time, in
fp32. It is told which layers train in which period, since how they are drawn is another test's business.
"""

import math
from collections.abc import Callable, Sequence

import torch


def train_reference(
    model: torch.nn.Module,
    layers: Sequence[torch.nn.Module],
    layers_of_period: Sequence[Sequence[int]],
    period_steps: int,
    batches: Sequence[Sequence[torch.Tensor]],
    *,
    lr: float | Callable[[int], float],
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float = 1.0,
    frozen_of_period: Sequence[Sequence[torch.nn.Parameter]] = (),
    states: str = "reset",
    factored: Sequence[torch.nn.Parameter] = (),
    lr_scale: Callable[[torch.nn.Parameter], float] = lambda parameter: 1.0,
) -> list[float]:
    """Train `model` in place and return each step's loss.

    `batches[s]` holds the micro-batches of step s (token ids, labels the same), each the whole global batch.
    `frozen_of_period` are parameters outside the layers that do not train in a period. What becomes inactive loses its
    moments ("reset"), every parameter does at every switch ("reset_all"), or none ever does ("keep").
    Each parameter's rate is `lr_scale` of it times the rate.
    """
    layer_of = {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}
    moments: dict[int, list] = {}
    losses = []
    for step, micro_batches in enumerate(batches):
        period = step // period_steps
        active = set(layers_of_period[period])
        frozen = {id(p) for p in frozen_of_period[period]} if frozen_of_period else set()
        trained = [p for p in model.parameters() if id(p) not in frozen and layer_of.get(id(p)) in active | {None}]
        if step % period_steps == 0:
            active = {id(p) for p in trained}
            if states == "reset_all":
                moments = {}
            elif states == "reset":
                moments = {key: value for key, value in moments.items() if key in active}

        for p in model.parameters():
            p.grad = None
        total = 0.0
        for tokens in micro_batches:
            loss = model(input_ids=tokens, labels=tokens).loss / len(micro_batches)
            loss.backward()
            total += loss.item()
        losses.append(total)

        trained = [p for p in trained if p.grad is not None]  # an expert may have no token
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in trained))
        shrink = min(1.0, max_grad_norm / (norm + 1e-6))
        rate = lr(step) if callable(lr) else lr
        with torch.no_grad():
            for p in trained:
                step_lr = rate * lr_scale(p)
                gradient = p.grad * shrink
                if any(p is matrix for matrix in factored):
                    rows, columns, count = moments.get(id(p), [torch.zeros(len(p)), torch.zeros(p.shape[1]), 0])
                    squares = gradient * gradient
                    touched = squares[squares.sum(1) > 0]
                    rows = betas[1] * rows + (1 - betas[1]) * squares.mean(1)
                    columns = betas[1] * columns + (1 - betas[1]) * touched.mean(0)
                    moments[id(p)] = [rows, columns, count + 1]
                    second = rows[:, None] * columns[None, :] / rows.mean() / (1 - betas[1] ** (count + 1))
                    p -= step_lr * weight_decay * p
                    p -= step_lr * gradient / (second.sqrt() + eps)
                    continue
                first, second, count = moments.get(id(p), [torch.zeros_like(p), torch.zeros_like(p), 0])
                count += 1
                first = betas[0] * first + (1 - betas[0]) * gradient
                second = betas[1] * second + (1 - betas[1]) * gradient * gradient
                moments[id(p)] = [first, second, count]
                if p.ndim > 1:
                    p -= step_lr * weight_decay * p
                first_hat = first / (1 - betas[0] ** count)
                second_hat = second / (1 - betas[1] ** count)
                p -= step_lr * first_hat / (second_hat.sqrt() + eps)
    return losses


class Adapted(torch.nn.Module):
    """A linear module and its adapter: W x + scale B A x, where B begins as 0."""

    def __init__(self, linear: torch.nn.Module, of_inputs: torch.Tensor, scale: float):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.of_inputs = torch.nn.Parameter(of_inputs.clone())
        width = linear.weight.shape[0 if isinstance(linear, torch.nn.Linear) else 1]  # GPT-2 has it the other way
        self.of_outputs = torch.nn.Parameter(torch.zeros(width, len(of_inputs)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs) + self.scale * (inputs @ self.of_inputs.T) @ self.of_outputs.T


def train_reference_by_blocks(
    model: torch.nn.Module,
    blocks_of_period: Sequence[Sequence[int | str]],
    always_on: str,
    *arguments,
    layers: Sequence[torch.nn.Module] | None = None,
    **settings,
) -> list[float]:
    """`train_reference` where periods train layers by number, and of embed, head and rest those named and always on."""
    body = model.get_submodule(model.base_model_prefix)
    of_body, norm = (body.h, body.ln_f) if hasattr(body, "h") else (body.layers, body.norm)
    outer = {"embed": model.get_input_embeddings(), "head": model.get_output_embeddings(), "rest": norm}
    frozen = []
    for blocks in blocks_of_period:
        names = [name for name in (*always_on.split(","), *blocks) if name in outer]
        active = {id(value) for name in names for value in outer[name].parameters()}
        frozen.append([value for module in outer.values() for value in module.parameters() if id(value) not in active])
    layers_of_period = [[block for block in blocks if isinstance(block, int)] for blocks in blocks_of_period]
    settings |= {"frozen_of_period": frozen}
    return train_reference(model, list(layers or of_body), layers_of_period, *arguments, **settings)
