"""The periods that may need most memory."""

from collections.abc import Sequence

from lisa_dist.config import OUTER_BLOCKS, LisaConfig
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.sampling import SampledBlock, fill
from lisa_dist.core.selection import unit_budget
from lisa_dist.memory.workload import Trained


def widest_periods(
    config: LisaConfig, blocks: Blocks, sampled: Sequence[SampledBlock], checkpointed_layers: int = 0
) -> list[Trained]:
    """The periods that may need most memory: with the lowest layers, and with each outer block that is sampled.

    Where only some layers are checkpointed, an active one of the others, higher up, stores more. Of modules: with the
    lowest, the largest and the highest that fill the budget.
    """
    gamma, num_layers = config.lisa_activated_layers, len(blocks.layers)
    always_on = tuple(name for name in OUTER_BLOCKS if name in config.always_on and blocks.outer(name).parameters)
    by_size = sorted(range(num_layers), key=lambda layer: -blocks.layers[layer].numel)
    if config.by_module:
        sizes = [module.numel for module in blocks.layers]
        orders = (range(num_layers), by_size, reversed(range(num_layers)))
        filled = [tuple(sorted(fill(order, sizes, unit_budget(config, sizes)))) for order in orders]
        return [Trained(modules, always_on) for modules in dict.fromkeys(filled)]

    def candidates(count: int) -> list[tuple[int, ...]]:
        low, high = tuple(range(count)), tuple(range(num_layers - count, num_layers))
        mixed = [(0, *high[1:]), high] if count and 0 < checkpointed_layers < num_layers else []
        return list(dict.fromkeys([low, tuple(sorted(by_size[:count])), *mixed]))

    periods = [Trained(layers, always_on) for layers in candidates(gamma)]
    for block in sampled:
        periods += [Trained(layers, always_on, (block.name,)) for layers in candidates(gamma - block.places)]
    return periods
