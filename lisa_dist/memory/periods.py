"""The periods that may need most memory."""

from collections.abc import Sequence

from lisa_dist.config import OUTER_BLOCKS, LisaConfig
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.sampling import SampledBlock
from lisa_dist.memory.trace import Trained


def widest_periods(
    config: LisaConfig, blocks: Blocks, sampled: Sequence[SampledBlock], checkpointed_layers: int = 0
) -> list[Trained]:
    """The periods that may need most memory: with the lowest layers, and with each outer block that is sampled.

    Where only some layers are checkpointed, an active one of the others, higher up, stores more.
    """
    gamma, num_layers = config.lisa_activated_layers, len(blocks.layers)
    always_on = tuple(name for name in OUTER_BLOCKS if name in config.always_on and blocks.outer(name).parameters)
    by_size = sorted(range(num_layers), key=lambda layer: -blocks.layers[layer].numel)

    def candidates(count: int) -> list[tuple[int, ...]]:
        low, high = tuple(range(count)), tuple(range(num_layers - count, num_layers))
        mixed = [(0, *high[1:]), high] if count and 0 < checkpointed_layers < num_layers else []
        return list(dict.fromkeys([low, tuple(sorted(by_size[:count])), *mixed]))

    periods = [Trained(layers, always_on) for layers in candidates(gamma)]
    for block in sampled:
        periods += [Trained(layers, always_on, (block.name,)) for layers in candidates(gamma - block.places)]
    return periods
