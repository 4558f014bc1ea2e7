"""The settings of LISA, checked where they are defined.

Source: Algorithm 1 of Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
Fine-Tuning" (arXiv 2403.17919). Flag names follow the ones in use elsewhere.
"""

import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from lisa_dist.errors import UserError
from lisa_dist.text import format_by_block, parse_blocks, parse_by_block

SAMPLERS = ("uniform", "reshuffle", "cyclic", "fixed", "weighted", "adaptive")
IMPORTANCES = ("gradient", "update")
STATE_POLICIES = ("reset", "reset_all", "keep")
NONFINITE_POLICIES = ("stop", "skip")
MASTERS = ("fp32", "bf16_sr")
FROZEN_BITS = (16, 8, 4)
AUTO_LAYERS: Any = "auto"  # in the place of a number of layers, until one is planned
OUTER_BLOCKS = ("embed", "head", "rest")
FACTORED = "factored"  # in the place of bits: a second moment by row and column, and no first one
StateBits = int | str


@dataclass
class LisaConfig:
    """What LISA trains, for how long, and what happens to the optimizer states.

    Raises ValueError, naming the flag, the value and the rule, for every setting that cannot work. What depends on
    the model (more layers than it has, tied matrices) is checked when the model is known.
    """

    lisa_activated_layers: int = field(
        default=2,
        metadata={
            "help": "Decoder layers that train in each period (gamma in the paper); 0 for always-trained blocks alone; "
            "auto for as many as --gpu_memory is enough for."
        },
    )
    lisa_interval_steps: int = field(
        default=20,
        metadata={"help": "Optimizer steps in a period; then another set of layers is sampled (K in the paper)."},
    )
    lisa_sampler: str = field(
        default="uniform",
        metadata={
            "help": "How layers are sampled: uniform (the paper), reshuffle (each layer once before any repeats), "
            "cyclic (in order), fixed (one set for the whole run), weighted (by --lisa_weights_file), adaptive (by the "
            "size of each layer's gradients)."
        },
    )
    lisa_weights_file: str | None = field(
        default=None,
        metadata={
            "help": "For the weighted sampler: a JSON list with one non-negative weight for each decoder layer, or a "
            "table of norms as norms.csv#lora.weight_norm/full.weight_norm, a column or one over another."
        },
    )
    lisa_importance: str = field(
        default="gradient",
        metadata={"help": "The adaptive sampler's measure of a layer: the norm of its gradient, or of its update."},
    )
    lisa_importance_decay: float = field(
        default=0.5,
        metadata={"help": "Decay of the adaptive sampler's moving average of each layer, from 0 up to 1."},
    )
    lisa_importance_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of the adaptive sampler's softmax over averages whose mean is 1: lower is sharper."
        },
    )
    lisa_importance_floor: float = field(
        default=0.2,
        metadata={"help": "Part of the adaptive sampler's probability that is spread evenly over the layers."},
    )
    lisa_lr_power: float = field(
        default=0.0,
        metadata={
            "help": "Multiplies the learning rate by (layers of the model / active layers) to this power, such as 0.5, "
            "so that fewer layers have a higher rate; 0 leaves it as it is."
        },
    )
    lisa_wake_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Steps over which the learning rate of an activated block with fresh moments rises to its full "
            "value; 0 for none."
        },
    )
    lisa_always_on: str = field(
        default="embed,head,rest",
        metadata={
            "help": "Blocks that train in every period, of embed, head, rest (the final norm and whatever else is "
            "neither). A block that is neither here nor in --lisa_frozen is sampled like a layer."
        },
    )
    lisa_frozen: str = field(
        default="",
        metadata={"help": "Blocks that never train, of embed, head, rest."},
    )
    lisa_block_probability: str = field(
        default="",
        metadata={
            "help": "Probability that a period trains a block that is neither always-trained nor frozen, such as "
            "embed=0.25,head=0.1; by default that of a layer. It takes the places of as many layers as it is large."
        },
    )
    lisa_state: str = field(
        default="reset",
        metadata={
            "help": "Optimizer states at a switch: reset (dropped when a layer becomes inactive), reset_all (every "
            "block starts afresh, as in the paper's runs) or keep (those of inactive layers stay on the host)."
        },
    )
    lisa_state_bits: str = field(
        default="",
        metadata={
            "help": "Moments by block: 8 (bits, blockwise), 32 or, of embed and head, factored (one number a row and "
            "one a column, and no first moment), such as embed=factored,layers=8; by default as --optim has them."
        },
    )
    lisa_master: str = field(
        default="fp32",
        metadata={
            "help": "What AdamW adds its updates to: fp32 (a master copy of the weights), or with --optim lisa_adamw "
            "bf16_sr (the bf16 weights themselves, rounded stochastically)."
        },
    )
    lisa_offload: str = field(
        default="",
        metadata={
            "help": "Blocks whose masters and moments live and step on the host, of embed, head, rest, layers; the "
            "others' stay on the GPU, whatever the DeepSpeed config says of offload_optimizer."
        },
    )
    lisa_frozen_bits: int = field(
        default=16,
        metadata={
            "help": "Bits of frozen decoder layers on the device: 16 as they are, or 8 or 4 (NF4) by bitsandbytes, "
            "with the originals once a host. On ZeRO stages 1 and 2."
        },
    )
    lisa_frozen_store: str = field(
        default="host",
        metadata={
            "help": "Where the originals are that --lisa_frozen_bits 8 and 4 need: host (its memory) or a folder on a "
            "local disk."
        },
    )
    lisa_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What a loss or gradient that is not finite does in bf16 and fp32: stop the run, or skip the step. "
            "In fp16 DeepSpeed's loss scaler skips it."
        },
    )
    lisa_layers_attribute: str | None = field(
        default=None,
        metadata={"help": "Dotted path of the list of decoder layers, where it cannot be found (model.layers)."},
    )
    lisa_seed: int = field(
        default=0,
        metadata={"help": "Seed of the sampler; the same seed gives the same layers on any number of GPUs."},
    )
    lisa_debug: bool = field(
        default=False,
        metadata={"help": "Check at every switch that inactive weights did not change and that all ranks agree."},
    )

    def __post_init__(self) -> None:
        self._check_periods()
        self._check_importance()
        self._check_states()
        # One way of writing each, so that a resumed run with another is no other run.
        self.lisa_always_on, self.lisa_frozen = ",".join(self.always_on), ",".join(self.frozen)
        self.lisa_offload = ",".join(self.offloaded)
        self.lisa_state_bits = format_by_block("--lisa_state_bits", self.lisa_state_bits, self._given_bits)
        self.lisa_block_probability = format_by_block(
            "--lisa_block_probability", self.lisa_block_probability, self.block_probabilities
        )
        self._check_blocks()
        self._check_state_bits()

    def _check_periods(self) -> None:
        given = self.lisa_activated_layers
        if given != AUTO_LAYERS and not (isinstance(given, int) and given >= 0):
            raise UserError(f"--lisa_activated_layers {given}: a period trains 0 decoder layers or more, or auto.")
        if self.lisa_interval_steps < 1:
            raise UserError(
                f"--lisa_interval_steps {self.lisa_interval_steps}: a period lasts at least 1 optimizer step."
            )
        if self.lisa_sampler not in SAMPLERS:
            raise UserError(f"--lisa_sampler {self.lisa_sampler}: unknown; choose one of {', '.join(SAMPLERS)}.")
        if (self.lisa_sampler == "weighted") != (self.lisa_weights_file is not None):
            raise UserError(
                f"--lisa_sampler {self.lisa_sampler} with --lisa_weights_file {self.lisa_weights_file}: "
                "the weighted sampler needs a weights file, and no other sampler reads one."
            )
        if not -1 <= self.lisa_lr_power <= 1:
            raise UserError(f"--lisa_lr_power {self.lisa_lr_power}: a power is from -1 to 1, such as 0.5; 0 for none.")
        if not 0 <= self.lisa_wake_warmup_steps < self.lisa_interval_steps:
            raise UserError(
                f"--lisa_wake_warmup_steps {self.lisa_wake_warmup_steps}: a period has --lisa_interval_steps "
                f"{self.lisa_interval_steps} steps, and the warm-up is shorter; 0 for none."
            )

    def _check_states(self) -> None:
        if self.lisa_state not in STATE_POLICIES:
            raise UserError(f"--lisa_state {self.lisa_state}: unknown; choose one of {', '.join(STATE_POLICIES)}.")
        if self.lisa_master not in MASTERS:
            raise UserError(f"--lisa_master {self.lisa_master}: unknown; choose one of {', '.join(MASTERS)}.")
        if self.lisa_master != "fp32" and self.offloaded:
            raise UserError(
                f"--lisa_master {self.lisa_master} with --lisa_offload {self.lisa_offload}: what steps on the host is "
                "an fp32 master; leave one of them out."
            )
        if self.lisa_frozen_bits not in FROZEN_BITS:
            allowed = ", ".join(map(str, FROZEN_BITS))
            raise UserError(f"--lisa_frozen_bits {self.lisa_frozen_bits}: frozen layers have one of {allowed} bits.")
        if self.lisa_frozen_bits == 16 and self.lisa_frozen_store != "host":
            raise UserError(
                f"--lisa_frozen_store {self.lisa_frozen_store}: frozen layers of 16 bits have no originals elsewhere; "
                "give --lisa_frozen_bits 8 or 4, or leave it out."
            )
        if self.lisa_nonfinite not in NONFINITE_POLICIES:
            raise UserError(
                f"--lisa_nonfinite {self.lisa_nonfinite}: unknown; choose one of {', '.join(NONFINITE_POLICIES)}."
            )

    def _check_blocks(self) -> None:
        both = set(self.always_on) & set(self.frozen)
        if both:
            raise UserError(
                f"--lisa_always_on {self.lisa_always_on} and --lisa_frozen {self.lisa_frozen} both name "
                f"{', '.join(sorted(both))}: a block is one or the other."
            )
        if self.lisa_activated_layers == 0 and not {"embed", "head"} & set(self.always_on):
            raise UserError(
                f"--lisa_activated_layers 0 with --lisa_always_on {self.lisa_always_on}: no layer is sampled, and "
                "neither embed nor head trains: nothing to train but norms. Sample a layer, or leave embed or head "
                "always-trained."
            )
        if self.lisa_activated_layers == 0 and self.sampled:
            raise UserError(
                f"--lisa_activated_layers 0: {self.sampled[0]} is to be sampled in the place of layers, and there is "
                "none; put it in --lisa_always_on or in --lisa_frozen."
            )
        for block, probability in self.block_probabilities.items():
            flag = f"--lisa_block_probability {self.lisa_block_probability}"
            if block not in self.sampled:
                raise UserError(
                    f"{flag}: {block} is always-trained or frozen; take it out of --lisa_always_on and --lisa_frozen "
                    "to have it sampled."
                )
            if not 0 < probability <= 1:
                raise UserError(f"{flag}: a probability is above 0 and at most 1; {block} has {probability:g}.")

    def _check_state_bits(self) -> None:
        for block, bits in self._given_bits.items():
            if bits not in (8, 32, FACTORED):
                raise UserError(
                    f"--lisa_state_bits {self.lisa_state_bits}: moments have 8 or 32 bits, or are {FACTORED}; {block} "
                    f"has {float(bits):g}."
                )
            if bits == FACTORED and block not in ("embed", "head"):
                raise UserError(
                    f"--lisa_state_bits {self.lisa_state_bits}: the moments of embed and head can be {FACTORED}, where "
                    f"a row is a token; give {block}=8."
                )
            if bits != 32 and block in self.offloaded:
                raise UserError(
                    f"--lisa_state_bits {self.lisa_state_bits} with --lisa_offload {self.lisa_offload}: states on the "
                    f"host have 32 bits; take {block} out of one of them."
                )
        for block in self.offloaded:
            if block in self.frozen:
                warnings.warn(
                    f"--lisa_offload {self.lisa_offload}: {block} is in --lisa_frozen {self.lisa_frozen} and has no "
                    "states to put on the host.",
                    stacklevel=4,
                )

    def _check_importance(self) -> None:
        if self.lisa_importance not in IMPORTANCES:
            raise UserError(
                f"--lisa_importance {self.lisa_importance}: unknown; choose one of {', '.join(IMPORTANCES)}."
            )
        if not 0 <= self.lisa_importance_decay < 1:
            raise UserError(
                f"--lisa_importance_decay {self.lisa_importance_decay}: a share of the past is from 0 up to, not "
                "including, 1."
            )
        if not 1e-3 <= self.lisa_importance_temperature < math.inf:
            raise UserError(
                f"--lisa_importance_temperature {self.lisa_importance_temperature}: a temperature is 0.001 or more, "
                "and finite."
            )
        if not 0 <= self.lisa_importance_floor <= 1:
            raise UserError(
                f"--lisa_importance_floor {self.lisa_importance_floor}: a part is from 0 to 1; 1 samples uniformly."
            )
        defaults = {name: field.default for name, field in type(self).__dataclass_fields__.items()}
        for name, value in defaults.items():
            if "importance" in name and getattr(self, name) != value and self.lisa_sampler != "adaptive":
                warnings.warn(
                    f"--{name} {getattr(self, name)} with --lisa_sampler {self.lisa_sampler}: it has no effect, being "
                    "for the adaptive sampler.",
                    stacklevel=4,
                )

    @property
    def always_on(self) -> tuple[str, ...]:
        """Outer blocks that train in every period."""
        return parse_blocks("--lisa_always_on", self.lisa_always_on, OUTER_BLOCKS)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Outer blocks that never train."""
        return parse_blocks("--lisa_frozen", self.lisa_frozen, OUTER_BLOCKS)

    @property
    def sampled(self) -> tuple[str, ...]:
        """Outer blocks that are sampled like layers."""
        return tuple(block for block in OUTER_BLOCKS if block not in self.always_on and block not in self.frozen)

    @property
    def block_probabilities(self) -> dict[str, float]:
        """The probabilities that the user gave, by block."""
        flag = "--lisa_block_probability"
        return parse_by_block(flag, self.lisa_block_probability, OUTER_BLOCKS)

    @property
    def state_bits(self) -> dict[str, StateBits]:
        """Bits of the moments that the user gave, or "factored", for embed, head, rest and layers."""
        given = self._given_bits.items()
        return {block: bits if isinstance(bits, str) else int(bits) for block, bits in given}

    @property
    def _given_bits(self) -> dict[str, float | str]:
        return parse_by_block("--lisa_state_bits", self.lisa_state_bits, (*OUTER_BLOCKS, "layers"), words=(FACTORED,))

    @property
    def offloaded(self) -> tuple[str, ...]:
        """Blocks, "layers" among them, whose optimizer states are on the host."""
        return parse_blocks("--lisa_offload", self.lisa_offload, (*OUTER_BLOCKS, "layers"))

    def check_num_layers(self, num_layers: int) -> None:
        """Raise when a model of so many decoder layers has too few to sample from."""
        if self.lisa_activated_layers == AUTO_LAYERS:
            raise UserError(
                "--lisa_activated_layers auto: lisa-dist train and lisa-dist plan make a number of it; give one here."
            )
        if self.lisa_activated_layers > num_layers:
            raise UserError(
                f"--lisa_activated_layers {self.lisa_activated_layers}: the model has {num_layers} decoder layers."
            )

    def rate_factor(self, num_layers: int) -> float:
        """What the learning rate is multiplied by for a model of so many decoder layers, by --lisa_lr_power."""
        return (num_layers / max(1, self.lisa_activated_layers)) ** self.lisa_lr_power

    def to_dict(self) -> dict:
        """The settings as plain values, for logs and checkpoints."""
        return asdict(self)
