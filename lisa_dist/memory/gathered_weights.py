"""Weights that stage 3 holds whole in a step, as DeepSpeed's `stage3_max_reuse_distance` decides."""

from collections.abc import Callable, Sequence

import torch

from lisa_dist.core.blocks import Block, Blocks
from lisa_dist.memory.step_trace import Arrival
from lisa_dist.memory.trace import FakeRun


def gathered_weights(
    run: FakeRun, trained: Sequence[torch.nn.Parameter], persistence_threshold: int, max_reuse_distance: int
) -> Callable[[Arrival | None], int]:
    """Bytes of whole weights, as a function of the gradient that arrives.

    None, the end of the forward pass: those that the backward pass needs again within `max_reuse_distance` elements.
    When a gradient arrives: at most those that the backward pass has not passed. Parameters of up to
    `persistence_threshold` elements are whole all the time and not counted.
    """
    blocks, element = run.blocks, run.workload.dtype.itemsize
    order = _blocks_in_forward_order(run, {id(parameter) for parameter in trained})
    not_passed: dict[int, int] = {}  # by parameter: elements of its block and of the blocks before it
    numel_so_far = 0
    for block in order:
        numel_so_far += sum(
            parameter.numel() for parameter in block.parameters.values() if parameter.numel() > persistence_threshold
        )
        not_passed |= {id(parameter): numel_so_far for parameter in block.parameters.values()}
    if blocks.tied:  # the backward pass begins and ends with the tied matrix
        matrix = sum(parameter.numel() for parameter in blocks.embed.parameters.values())
        not_passed = {key: numel + matrix for key, numel in not_passed.items()}
        not_passed |= {id(parameter): matrix for parameter in blocks.embed.parameters.values()}
    gathered = distance = 0
    for parameter in reversed([parameter for block in order for parameter in block.parameters.values()]):
        if 2 * distance >= max_reuse_distance:
            break
        distance += parameter.numel()
        gathered += parameter.numel() if parameter.numel() > persistence_threshold else 0

    def gathered_at(arrival: Arrival | None) -> int:
        if arrival is None:
            return gathered * element
        return element * min(gathered, not_passed.get(id(arrival.parameter), gathered))

    return gathered_at


def _blocks_in_forward_order(run: FakeRun, trained: set[int]) -> list[Block]:
    """The blocks that the backward pass comes to. A tied matrix is used first and last: here it stands last."""
    blocks: Blocks = run.blocks

    def trains(block: Block) -> bool:
        return any(id(parameter) in trained for parameter in block.parameters.values())

    order = [*blocks.layers, blocks.rest, blocks.embed if blocks.tied else blocks.head]
    has_adapters = len(list(run.model.parameters())) > sum(len(block.parameters) for block in blocks)
    if not has_adapters and not trains(blocks.embed) and not run.workload.checkpointed_layers:
        lowest = next((index for index, layer in enumerate(blocks.layers) if trains(layer)), len(blocks.layers))
        return order[lowest:]
    if not blocks.tied and trains(blocks.embed):
        return [blocks.embed, *order]
    return order
