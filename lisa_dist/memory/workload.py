"""What a planned step is of: micro-batch, blocks that train, parameter groups, DeepSpeed's settings; and its parts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import ADAPTERS, OUTER_BLOCKS, Form, StateBits
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.sampling import SampledBlock, fill
from lisa_dist.core.selection import unit_budget
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.zero.embedding_rows import exchanges_rows

# How a step computes its loss.
CHUNKED, LOGITS, LIGER, OWN, SCORE, RATIO = "chunked", "logits", "liger", "own", "score", "ratio"
OF_TRL = (CHUNKED, LOGITS, LIGER)  # by TRL's head, of the model


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
    frozen_bits: Form = 16  # of the matrices of frozen decoder layers
    streams: bool = False  # which are on the host
    by_module: bool = False  # linear modules are sampled in the place of layers
    adapters: int | None = None  # the rank of those beside the layers
    activation_offloading: bool = False  # what the forward pass stores goes to the host
    sequence_parallel: int = 1  # ranks that share each row, of which `seq_length` is a rank's part

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch of a rank."""
        return self.micro_batch_size * self.seq_length


@dataclass(frozen=True)
class Lora:
    """The adapters of `--method lora`, and the modules that train whole next to them (peft's `modules_to_save`)."""

    rank: int
    modules_to_save: tuple[str, ...] = ()
    in_4_bits: bool = False  # bitsandbytes' Linear4bit instead of the linear modules (--load_in_4bit)
    is_nested: bool = False  # whose scales have 8 bits (--use_bnb_nested_quant)


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
_MAX_REUSE_DISTANCE = _MAX_LIVE = 1_000_000_000
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
    max_live: int
    by_layers: bool  # a decoder layer is gathered at once
    sharing_ranks: int = 1  # of a host, which have a copy of all weights between them
    plain_sums: bool = True  # gradients are added up in the dtype of the weights, and divided by the ranks afterwards

    @classmethod
    def of(cls, ds_config: dict[str, Any], hidden_size: int, by_layers: bool = False) -> "StageSettings":
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
            sharing_ranks=max(1, elements("zero_hpz_partition_size", 1, 1)),
            plain_sums=not any(ds_config.get(key) for key in _OTHER_SUMS) and not data_types.get("grad_accum_dtype"),
            by_layers=by_layers,
            max_live=elements("stage3_max_live_parameters", _MAX_LIVE, _MAX_LIVE),
            max_reuse_distance=elements("stage3_max_reuse_distance", _MAX_REUSE_DISTANCE, _MAX_REUSE_DISTANCE),
        )

    def reduces_rows(self, world_size: int, optim: str, method: str = "lisa") -> bool:
        """Whether the gradient of an embedding is of the rows that occur (`zero/embedding_rows.py`)."""
        fits = self.stage < 3 and not self.offload_optimizer and self.plain_sums and exchanges_rows(world_size)
        return method == "lisa" and optim == LISA_ADAMW and fits


def widest_periods(
    config: LisaConfig, blocks: Blocks, sampled: Sequence[SampledBlock], checkpointed_layers: int = 0
) -> list[Trained]:
    """The periods that may need most memory: with the lowest layers, and with each outer block that is sampled.

    Where only some layers are checkpointed, an active one of the others, higher up, stores more. Periods of modules
    have the lowest, the largest or the highest that fill the budget.
    """
    gamma, num_layers = config.lisa_activated_layers, len(blocks.layers)
    always_on = tuple(
        name for name in (*OUTER_BLOCKS, ADAPTERS) if name in config.always_on and blocks.outer(name).parameters
    )
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


# Parts of a host's memory that are parts of the device's too: titles by whether the blocks are always trained.
STATES = {True: "states, always on", False: "states, active blocks"}
WEIGHTS = "weights"
# On the host only while one group steps.
GROUP_GRADIENTS = "gradients of a group"


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of one rank's device, estimated or measured: what exists between steps, within a step, and the peaks."""

    weights: int
    always_on_states: int  # masters and moments of always-trained blocks
    active_states: int  # of the others
    buffers: int  # buckets, stage 3's gradient partitions and persistent parameters
    activations: int  # at the end of the forward pass
    logits: int
    gathered: int  # weights that stage 3 has whole at the end of the forward pass
    gradients: int  # at the end of the backward pass, beyond the buffers
    peak_backward: int  # of forward and backward, everything included
    peak_step: int  # of the optimizer's step, everything included
    # At the peak of the backward pass; estimated alone, since a measurement cannot tell what it sees.
    gradients_by_then: int = 0
    buckets_by_then: int = 0
    reference: int = 0  # the model as it was before, which some tasks compare with; estimated alone
    pool: int = 0  # beyond the peak, that a stream of copies has or waits for: reserved, and so not measured

    @property
    def static(self) -> int:
        """Bytes between two steps."""
        return self.weights + self.reference + self.always_on_states + self.active_states + self.buffers

    def with_more(self, name: str, nbytes: int) -> "MemoryParts":
        """The same with so many bytes more in one part that exists between steps."""
        peaks = {"peak_backward": self.peak_backward + nbytes, "peak_step": self.peak_step + nbytes}
        return replace(self, **{name: getattr(self, name) + nbytes}, **peaks)

    @property
    def peak(self) -> int:
        """The most at any time of a step."""
        return max(self.peak_backward, self.peak_step)

    @property
    def needed(self) -> int:
        """What a GPU must have for tensors."""
        return self.peak + self.pool

    @property
    def temporary(self) -> int:
        """The bytes of the peak that no other part has."""
        in_pass = self.activations + self.logits + self.gathered
        return max(0, self.peak - self.static - (in_pass if self.is_backward else self.gradients))

    @property
    def is_backward(self) -> bool:
        """Whether the peak is of the forward and backward pass, and not of the optimizer's step."""
        return self.peak_backward >= self.peak_step

    def beyond(self) -> dict[str, int]:
        """What an estimate has at the peak beside the other parts, by what has it.

        Of a backward pass the gradients that have arrived, their buckets, and what the passes allocate for a moment.
        """
        if not self.is_backward:
            return {"by_then": 0, "buckets_at_peak": 0, "passes": 0, "step": self.temporary}
        by_then, buckets = self.gradients_by_then, self.buckets_by_then
        passes = max(0, self.temporary - by_then - buckets)
        return {"by_then": by_then, "buckets_at_peak": buckets, "passes": passes, "step": 0}

    def at_peak(self) -> dict[str, int]:
        """All parts at the peak: those of a plan add up to it.

        Late in a backward pass fewer activations are left than the forward pass has stored.
        """
        parts = self.to_dict()
        if not self.is_backward:
            return parts | dict.fromkeys(("activations", "logits", "gathered"), 0)
        left = self.peak - self.static - sum(self.beyond().values())
        for name in ("gathered", "activations", "logits"):
            parts[name] = min(parts[name], left)
            left -= parts[name]
        return parts | {"gradients": 0}

    def with_host(self, host: dict[str, int], gradients_beside: int) -> "MemoryParts":
        """Device and host (the parts of `StepPlan`) as one, which is what they are on CPU.

        `gradients_beside` are those that wait while a group on the host steps.
        """
        lasting = sum(host.values()) - host.get(GROUP_GRADIENTS, 0)
        weights, always_on, active = (host.get(name, 0) for name in (WEIGHTS, STATES[True], STATES[False]))
        return replace(
            self,
            weights=self.weights + weights,
            always_on_states=self.always_on_states + always_on,
            active_states=self.active_states + active,
            buffers=self.buffers + lasting - weights - always_on - active,
            peak_backward=self.peak_backward + lasting,
            # The norm, or a group on the device, steps at another time than a group on the host.
            peak_step=max(self.peak_step + lasting, self.static + gradients_beside + sum(host.values())),
        )

    def to_dict(self) -> dict[str, int]:
        """All parts and what is derived from them."""
        derived = {"static": self.static, "temporary": self.temporary, "peak": self.peak}
        return asdict(self) | derived | self.beyond()
