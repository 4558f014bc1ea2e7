"""The settings of LISA, checked where they are defined.

Source: Algorithm 1 of Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
Fine-Tuning" (arXiv 2403.17919). Flag names follow the ones in use elsewhere.
"""

import functools
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from lisa_dist.config_rules import (
    ADAPTERS,
    ADAPTERS_RATE,
    AUTO_LAYERS,
    EMBED_RATE,
    ENDS_RATE,
    FACTORED,
    OPTIMIZED_BLOCKS,
    OUTER_BLOCKS,
    Form,
    StateBits,
    check_adapters,
    check_blocks,
    check_choices,
    check_lr_scales,
    check_periods,
    check_state_bits,
    check_states,
    check_units,
    parse_share,
    scales_beside,
)
from lisa_dist.definitions import setting
from lisa_dist.errors import UserError
from lisa_dist.presets import NONE, PRESET_HELP, with_preset
from lisa_dist.removed import refuse_removed
from lisa_dist.text import format_by_block, parse_blocks, parse_by_block

Config = TypeVar("Config")


def taking_presets(dataclass_type: type[Config]) -> type[Config]:
    """Give a dataclass a constructor that fills in its preset, and that refuses settings of earlier releases.

    Copies and pickles do not call the constructor, and `dataclasses.replace` gives it every setting.
    """
    build = dataclass_type.__init__
    names = [one.name for one in fields(dataclass_type)]  # type: ignore[arg-type]

    @functools.wraps(build)
    def fill_and_build(self: Config, *args: Any, **settings: Any) -> None:
        given = dict(zip(names, args, strict=False)) | settings
        refuse_removed(given)
        build(self, **with_preset(given))

    dataclass_type.__init__ = fill_and_build  # type: ignore[method-assign, assignment]
    dataclass_type.only_given = True  # type: ignore[attr-defined] # FlagParser hands it what the user gave, no defaults
    return dataclass_type


@taking_presets
@dataclass
class LisaConfig:
    """What LISA trains, for how long, and what happens to the optimizer states.

    Without a setting of the sampling, the preset is "adapters": LoRA adapters of rank 32 train together with the
    embedding and the head, and no layer is sampled. The optimizer is not part of it: `lisa-dist train` combines this
    preset with lisa_adamw and small states, and in Python `optim`, `lisa_state_bits` and `lisa_master` ask for them.
    The defaults below are those of the preset "none".

    Raises ValueError, naming the flag, the value and the rule, for every setting that cannot work. What depends on
    the model (more layers than it has, tied matrices) is checked when the model is known.
    """

    lisa_activated_layers: int = setting(
        2,
        "Decoder layers that train in each period (gamma in the paper); 0 for always-trained blocks alone; "
        "auto for as many as --gpu_memory is enough for.",
    )
    lisa_unit: str = setting(
        "layer",
        "What is sampled: layer, or module (each linear module of a decoder layer by itself, as many as "
        "--lisa_budget is enough for; norms then belong to rest).",
    )
    lisa_budget: str = setting(
        "",
        "With --lisa_unit module: part of the parameters of the linear modules that trains in each period, "
        "such as 0.03, in the place of --lisa_activated_layers.",
    )
    lisa_interval_steps: int = setting(
        20, "Optimizer steps in a period; then another set of layers is sampled (K in the paper)."
    )
    lisa_sampler: str = setting(
        "uniform",
        "How layers are sampled: uniform (the paper), reshuffle (each layer once before any repeats), "
        "fixed (one set for the whole run), weighted (by --lisa_weights_file), balanced (by the same, as often as "
        "a layer's weight says, evenly over the run), adaptive (by the size of each layer's gradients).",
    )
    lisa_weights_file: str | None = setting(
        None,
        "For the weighted and the balanced sampler: a JSON list with one non-negative weight for each "
        "decoder layer, or a table of norms as norms.csv#lora.weight_norm/full.weight_norm, a column or one over "
        "another.",
    )
    lisa_adapters: int | None = setting(
        None,
        "Rank of LoRA adapters on the linear modules of all decoder layers, which train in every period beside the "
        "sampled layers; the exported model has them merged.",
    )
    lisa_lr_scale: str = setting(
        "",
        "Multiplies the learning rate by block, such as embed=0.5,head=0.5,layers=1; by default by 1. Beside "
        f"adapters of rank r embed and head have {EMBED_RATE:g}, and adapters {ADAPTERS_RATE:g}, or 64 / sqrt(r) above "
        f"rank 16; if no layer is sampled, embed and head have {ENDS_RATE:g}.",
    )
    lisa_always_on: str = setting(
        "embed,head,rest",
        "Blocks that train in every period, of embed, head, rest (the final norm and whatever else is "
        "neither). A block that is neither here nor in --lisa_frozen is sampled like a layer.",
    )
    lisa_frozen: str = setting("", "Blocks that never train, of embed, head, rest.")
    lisa_block_probability: str = setting(
        "",
        "Probability that a period trains a block that is neither always-trained nor frozen, such as "
        "embed=0.25,head=0.1; by default that of a layer. It takes the places of as many layers as it is large.",
    )
    lisa_state: str = setting(
        "reset",
        "Optimizer states at a switch: reset (dropped when a layer becomes inactive), reset_all (every "
        "block begins without moments, as in the paper's runs) or keep (those of inactive layers stay on the host).",
    )
    lisa_state_bits: str = setting(
        "",
        "Moments by block: 8 (bits, blockwise), 32 or, of embed and head, factored (one number a row and "
        "one a column, and no first moment), such as embed=factored,layers=8; by default as --optim has them.",
    )
    lisa_master: str = setting(
        "fp32",
        "What AdamW adds its updates to: fp32 (a master copy of the weights), or with --optim lisa_adamw "
        "bf16_sr (the bf16 weights themselves, rounded stochastically).",
    )
    lisa_offload: str = setting(
        "",
        "Blocks whose masters and moments live and step on the host, of embed, head, rest, adapters, layers; the "
        "others' stay on the GPU, whatever the DeepSpeed config says of offload_optimizer. And frozen: the weights of "
        "frozen decoder layers, which are copied in one layer ahead of the pass; on ZeRO stages 1 and 2.",
    )
    lisa_frozen_bits: str = setting(
        "16",
        "Bits of frozen decoder layers on the device: 16 as they are, 8 or 4 (NF4) by bitsandbytes, or fp8 (e4m3, "
        "multiplied as it is by GPUs that can), with the originals once a host. On ZeRO stages 1 and 2.",
    )
    lisa_frozen_store: str = setting(
        "host",
        "Where the originals are that --lisa_frozen_bits 8, 4 and fp8 need: host (its memory) or a folder on a local "
        "disk.",
    )
    lisa_nonfinite: str = setting(
        "stop",
        "What a loss or gradient that is not finite does in bf16 and fp32: stop the run, or skip the step. "
        "In fp16 DeepSpeed's loss scaler skips it.",
    )
    lisa_layers_attribute: str | None = setting(
        None, "Dotted path of the list of decoder layers, where it cannot be found (model.layers)."
    )
    lisa_seed: int = setting(0, "Seed of the sampler; the same seed gives the same layers on any number of GPUs.")
    lisa_debug: bool = setting(
        False, "Check at every switch that inactive weights did not change and that all ranks agree."
    )
    lisa_preset: str | None = setting(None, PRESET_HELP)

    def __post_init__(self) -> None:
        self.lisa_frozen_bits = str(self.lisa_frozen_bits)
        check_choices(self)
        check_periods(self)
        check_adapters(self)
        check_units(self)
        check_states(self)
        # One way of writing each, so that a resumed run with another is no other run.
        self.lisa_frozen = ",".join(self.frozen)
        self.lisa_always_on = ",".join(block for block in self.always_on if block != ADAPTERS)
        self.lisa_offload = ",".join((*self.offloaded, *(["frozen"] if self.streams else [])))
        self.lisa_budget = f"{100 * self.budget:.10g}%" if self.by_module else self.lisa_budget
        self.lisa_lr_scale = format_by_block("--lisa_lr_scale", self.lisa_lr_scale, self.given_scales)
        self.lisa_state_bits = format_by_block("--lisa_state_bits", self.lisa_state_bits, self.given_bits)
        self.lisa_block_probability = format_by_block(
            "--lisa_block_probability", self.lisa_block_probability, self.block_probabilities
        )
        check_blocks(self)
        check_lr_scales(self)
        check_state_bits(self)

    @classmethod
    def plain(cls, **settings: Any) -> "LisaConfig":
        """Return the settings with the default of each one that is not given, without a preset."""
        return cls(**settings, lisa_preset=NONE)

    @property
    def samples(self) -> bool:
        """Whether decoder layers or their modules are sampled."""
        return self.lisa_activated_layers != 0

    @property
    def by_module(self) -> bool:
        """Whether linear modules are sampled in the place of decoder layers."""
        return self.lisa_unit == "module"

    @property
    def budget(self) -> float:
        """The part of the modules' parameters that trains in a period; of layers there is none."""
        return parse_share("--lisa_budget", self.lisa_budget)

    @property
    def always_on(self) -> tuple[str, ...]:
        """Outer blocks that train in every period, adapters among them."""
        given = parse_blocks("--lisa_always_on", self.lisa_always_on, OUTER_BLOCKS)
        return given if self.lisa_adapters is None else (*given, ADAPTERS)

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
        return parse_by_block("--lisa_block_probability", self.lisa_block_probability, OUTER_BLOCKS)

    @property
    def lr_scales(self) -> dict[str, float]:
        """What the learning rate of blocks is multiplied by, where that is not 1."""
        return scales_beside(self.lisa_adapters, self.frozen, self.samples) | self.given_scales

    @property
    def given_scales(self) -> dict[str, float]:
        return parse_by_block("--lisa_lr_scale", self.lisa_lr_scale, OPTIMIZED_BLOCKS)

    @property
    def state_bits(self) -> dict[str, StateBits]:
        """Bits of the moments that the user gave, or "factored", by block."""
        given = self.given_bits.items()
        return {block: bits if isinstance(bits, str) else int(bits) for block, bits in given}

    @property
    def given_bits(self) -> dict[str, float | str]:
        return parse_by_block("--lisa_state_bits", self.lisa_state_bits, OPTIMIZED_BLOCKS, words=(FACTORED,))

    @property
    def offloaded(self) -> tuple[str, ...]:
        """Blocks, "layers" among them, whose optimizer states are on the host."""
        return tuple(block for block in self._on_host if block != "frozen")

    @property
    def streams(self) -> bool:
        """Whether the weights of frozen layers are on the host."""
        return "frozen" in self._on_host

    @property
    def frozen_form(self) -> Form:
        """The form of frozen layers' weights: 16, 8 or 4 bits, or "fp8"."""
        return "fp8" if self.lisa_frozen_bits == "fp8" else int(self.lisa_frozen_bits)

    @property
    def frozen_flags(self) -> list[str]:
        """What was given of the form and the place of frozen layers' weights."""
        bits = [] if self.frozen_form == 16 else [f"--lisa_frozen_bits {self.lisa_frozen_bits}"]
        return bits + (["--lisa_offload frozen"] if self.streams else [])

    @property
    def _on_host(self) -> tuple[str, ...]:
        return parse_blocks("--lisa_offload", self.lisa_offload, (*OPTIMIZED_BLOCKS, "frozen"))

    def check_num_layers(self, num_layers: int) -> None:
        """Raise when a model of so many decoder layers has too few to sample from."""
        if self.by_module:
            return
        if self.lisa_activated_layers == AUTO_LAYERS:
            raise UserError(
                "--lisa_activated_layers auto: lisa-dist train and lisa-dist plan choose the number; give one here."
            )
        if self.lisa_activated_layers > num_layers:
            raise UserError(
                f"--lisa_activated_layers {self.lisa_activated_layers}: the model has {num_layers} decoder layers."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for logs and checkpoints."""
        return asdict(self) | {"lisa_frozen_bits": self.frozen_form}
