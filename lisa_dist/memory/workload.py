"""What a planned step is of: a micro-batch, the blocks that train, their parameter groups, and DeepSpeed's settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import OUTER_BLOCKS, StateBits
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.sampling import SampledBlock, fill
from lisa_dist.core.selection import unit_budget
from lisa_dist.optim.build import LISA_ADAMW

# How a step computes its loss.
CHUNKED, LOGITS, LIGER, OWN, SCORE, RATIO = "chunked", "logits", "liger", "own", "score", "ratio"


@dataclass(frozen=True)
class Workload:
    """The shape of one micro-batch of a rank, and how the model computes it."""

    seq_length: int
    micro_batch_size: int = 1
    dtype: torch.dtype = torch.bfloat16
    checkpointed_layers: int = 0  # so many of the lowest layers store only their inputs
    attention: str = "sdpa"
    # TRL's in chunks, of LOGITS of the positions with a label, LIGER's, the model's OWN, of a reward model's SCORE, or
    # of a RATIO: as the model's own, and whoever computes it keeps the logits.
    loss: str = CHUNKED
    labels: int | None = None  # positions with a label, where LOGITS are not of all that can have one
    triton: bool = False  # TRL's loss by its Triton kernels, as on a GPU
    padded: bool = False  # examples of several lengths: the attention has a mask
    frozen_bits: int = 16  # of the matrices of frozen decoder layers
    by_module: bool = False  # linear modules are sampled in the place of layers

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch of a rank."""
        return self.micro_batch_size * self.seq_length


@dataclass(frozen=True)
class Trained:
    """The blocks that one period trains: layers, or modules, by number, outer blocks by name."""

    layers: tuple[int, ...]
    always_on: tuple[str, ...]
    sampled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """One parameter group: its parameters, the bits of its moments or "factored", whether it trains in every period.

    `on_host`: its states are on the host (--lisa_offload). `by_rows`: an embedding whose gradient is of the rows that
    occur (`zero/embedding_rows.py`).
    """

    params: tuple[torch.nn.Parameter, ...]
    bits: StateBits = 32
    always_on: bool = True
    on_host: bool = False
    by_rows: bool = False

    @property
    def numels(self) -> list[int]:
        """Elements of each parameter."""
        return [parameter.numel() for parameter in self.params]

    @property
    def widths(self) -> list[int]:
        """Elements of a row of each parameter."""
        return [parameter.shape[-1] for parameter in self.params]

    @property
    def named_numels(self) -> list[tuple[str, int]]:
        """The same for `zero.layout`, which names pieces: here by the parameter's number in the group."""
        return [(str(number), numel) for number, numel in enumerate(self.numels)]


# DeepSpeed's defaults, where a config leaves them to it. Elements.
_REDUCE_BUCKET = 500_000_000
_PERSISTENCE_THRESHOLD = 100_000
_MAX_REUSE_DISTANCE = 1_000_000_000
# Keys of a config by which gradients are added up otherwise.
_OTHER_SUMS = ("prescale_gradients", "gradient_predivide_factor", "communication_data_type")


@dataclass(frozen=True)
class StageSettings:
    """The settings of a DeepSpeed config that decide on memory. Sizes in elements."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    pins: bool  # what is offloaded of the optimizer
    reduce_bucket: int
    overlap_comm: bool
    persistence_threshold: int
    max_reuse_distance: int
    plain_sums: bool = True  # gradients are added up in the dtype of the weights, and divided by the ranks afterwards

    @classmethod
    def of(cls, ds_config: dict[str, Any], hidden_size: int) -> "StageSettings":
        """Read a config, with "auto" as the Hugging Face integration fills it in."""
        zero, data_types = ds_config["zero_optimization"], ds_config.get("data_types") or {}

        def elements(key: str, auto: int, default: int) -> int:
            value = zero.get(key, default)
            return auto if value == "auto" else int(value)

        def offloads(section: str) -> bool:
            return (zero.get(section) or {}).get("device", "none") != "none"

        return cls(
            stage=zero["stage"],
            offload_optimizer=offloads("offload_optimizer"),
            offload_param=offloads("offload_param"),
            pins=bool((zero.get("offload_optimizer") or {}).get("pin_memory")),
            reduce_bucket=elements("reduce_bucket_size", hidden_size**2, _REDUCE_BUCKET),
            overlap_comm=bool(zero.get("overlap_comm")),
            persistence_threshold=elements(
                "stage3_param_persistence_threshold", 10 * hidden_size, _PERSISTENCE_THRESHOLD
            ),
            plain_sums=not any(ds_config.get(key) for key in _OTHER_SUMS) and not data_types.get("grad_accum_dtype"),
            max_reuse_distance=elements("stage3_max_reuse_distance", _MAX_REUSE_DISTANCE, _MAX_REUSE_DISTANCE),
        )

    def reduces_rows(self, optim: str, method: str = "lisa") -> bool:
        """Whether the gradient of an embedding is of the rows that occur (`zero/embedding_rows.py`)."""
        fits = self.stage < 3 and not self.offload_optimizer and self.plain_sums
        return method == "lisa" and optim == LISA_ADAMW and fits


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
