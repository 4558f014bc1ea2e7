"""Steps and weights of a DeepSpeed engine, on every rank."""

import contextlib
from collections.abc import Iterator

import deepspeed
import torch
from torch import distributed as dist

from lisa_dist.zero import stages
from lisa_dist.zero.parameters import naming_of

# Overrides of DeepSpeed that a run is right without: of gradients, whatever the optimizer; of an embedding's by rows.
GRADIENT_NAMES = (
    "has_overflow",
    "scaled_global_norm",
    "_get_norm_groups",
    "set_norm_for_param_grad_in_gpu",
    "async_inplace_copy_grad_to_fp32_buffer_from_gpu",
    "copy_grads_in_partition",
    "reduce_independent_p_g_buckets_and_remove_grads",
    "overlap_comm",
)
ROW_NAMES = ("get_all_grad_tensors", "get_flat_partition", "zero_grad")


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Leave DeepSpeed's own in place on optimizers that are built in the body."""
    stages.left_out.update(names)
    try:
        yield
    finally:
        stages.left_out.difference_update(names)


def full_weights(engine) -> dict[str, torch.Tensor]:
    """A copy of every parameter, gathered where ZeRO-3 has cut it, by the names of a checkpoint."""
    called = naming_of(engine.module)
    parameters = {called(name): value for name, value in engine.module.named_parameters()}
    with deepspeed.zero.GatheredParameters([*parameters.values()], enabled=engine.zero_optimization_stage() == 3):
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
