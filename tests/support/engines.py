"""Steps and weights of a DeepSpeed engine, on every rank."""

import deepspeed
import torch
from torch import distributed as dist


def full_weights(engine) -> dict[str, torch.Tensor]:
    """A copy of every parameter, gathered where ZeRO-3 has cut it."""
    parameters = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() == 3:
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: value.detach().clone() for name, value in parameters.items()}
    return {name: value.detach().clone() for name, value in parameters.items()}


def my_rows(tokens: torch.Tensor) -> torch.Tensor:
    """This rank's share of a global batch of rows."""
    return tokens.chunk(dist.get_world_size())[dist.get_rank()]


def train_step(engine, lisa, micro_batches) -> float:
    """One optimizer step, by LISA unless ``lisa`` is None; the loss of the global batch, averaged over its parts."""
    total = torch.zeros(())
    for tokens in micro_batches:
        if lisa is not None:
            lisa.on_step_begin()
        rows = my_rows(tokens)
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        engine.step()
        total += loss.detach() / len(micro_batches)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
