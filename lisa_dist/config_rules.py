"""What can be given for the settings of LISA, a `LisaConfig`; every refusal names the flag, the value and the rule."""

import math
import warnings
from collections.abc import Collection
from typing import Any

from lisa_dist.errors import UserError

# By name: `register_sampler` in core/sampling.py gives these their functions, and adds others.
SAMPLERS: dict[str, Any] = dict.fromkeys(("uniform", "reshuffle", "fixed", "weighted", "balanced", "adaptive"))
UNITS = ("layer", "module")
OF_MODULES = ("uniform", "fixed", "adaptive")  # samplers that any number of units can be taken from
STATE_POLICIES = ("reset", "reset_all", "keep")
NONFINITE_POLICIES = ("stop", "skip")
MASTERS = ("fp32", "bf16_sr")
FROZEN_BITS = ("16", "8", "4", "fp8")
Form = int | str  # of frozen weights: their bits, or "fp8"
AUTO_LAYERS: Any = "auto"  # in the place of a number of layers, until one is planned
OUTER_BLOCKS = ("embed", "head", "rest")
ADAPTERS = "adapters"  # the block of --lisa_adapters
OPTIMIZED_BLOCKS = (*OUTER_BLOCKS, ADAPTERS, "layers")  # that learning rates and states are given by
EMBED_RATE, ADAPTERS_RATE = 2.0, 16.0  # beside sampled layers: learning rates in units of the layers'
ENDS_RATE = 0.1  # of embedding and head where no layer is sampled: in units of the adapters'
FACTORED = "factored"  # in the place of bits: a second moment by row and column, and no first one
StateBits = int | str


def check_choices(config: Any) -> None:
    for name, choices in (
        ("lisa_sampler", SAMPLERS),
        ("lisa_unit", UNITS),
        ("lisa_state", STATE_POLICIES),
        ("lisa_master", MASTERS),
        ("lisa_nonfinite", NONFINITE_POLICIES),
    ):
        if (given := getattr(config, name)) not in [*choices]:  # a list has no hash
            raise UserError(f"--{name} {given}: unknown; choose one of {', '.join(choices)}.")


def check_periods(config: Any) -> None:
    given = config.lisa_activated_layers
    if given != AUTO_LAYERS and not (isinstance(given, int) and given >= 0):
        raise UserError(f"--lisa_activated_layers {given}: give a number of decoder layers, 0 or more, or auto.")
    interval = config.lisa_interval_steps
    if not (isinstance(interval, int) and interval >= 1):
        raise UserError(f"--lisa_interval_steps {interval}: a period lasts at least 1 optimizer step.")
    check_weights(config)


def parse_share(flag: str, value: str | float) -> float:
    """0.03 of "3%" or "0.03". Raises UserError for what is no part of a whole."""
    text = str(value)
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(f"{flag} {value}: give a part of the whole, above 0 and at most 100%, such as 3%.")
    return share


def check_units(config: Any) -> None:
    flag = f"--lisa_unit {config.lisa_unit}"
    if config.lisa_unit == "layer":
        if config.lisa_budget:
            raise UserError(f"--lisa_budget {config.lisa_budget}: it is for --lisa_unit module; give that too.")
        return
    if not config.lisa_budget:
        raise UserError(f"{flag}: give --lisa_budget, the part of the modules' parameters that trains, such as 3%.")
    parse_share("--lisa_budget", config.lisa_budget)
    if config.lisa_activated_layers != type(config).lisa_activated_layers:  # the default
        layers = f"--lisa_activated_layers {config.lisa_activated_layers}"
        raise UserError(f"{flag} with {layers}: of modules --lisa_budget says how many train; leave it out.")
    if config.lisa_sampler not in OF_MODULES:
        rule = f"it is for units of one size; give one of {', '.join(OF_MODULES)}"
        raise UserError(f"{flag} with --lisa_sampler {config.lisa_sampler}: {rule}.")
    if config.sampled:
        way_out = "put it in --lisa_always_on or in --lisa_frozen"
        raise UserError(f"{flag}: {config.sampled[0]} would be sampled in the place of layers; {way_out}.")


def check_adapters(config: Any) -> None:
    rank = config.lisa_adapters
    if rank is None:
        for flag in ("lisa_lr_scale", "lisa_state_bits", "lisa_offload"):
            if ADAPTERS in (given := getattr(config, flag)):
                raise UserError(f"--{flag} {given}: there are no adapters; give --lisa_adapters, their rank, too.")
        return
    if not (isinstance(rank, int) and rank >= 1) or rank is True:
        raise UserError(f"--lisa_adapters {rank}: the rank of an adapter is at least 1; for none leave it out.")
    if config.lisa_unit == "module":
        raise UserError(f"--lisa_adapters {rank} with --lisa_unit module: they are beside whole layers; leave one out.")


def check_weights(config: Any) -> None:
    if config.lisa_weights_file is not None and config.lisa_sampler not in ("weighted", "balanced"):
        flag = f"--lisa_sampler {config.lisa_sampler} with --lisa_weights_file {config.lisa_weights_file}"
        raise UserError(f"{flag}: the weighted and the balanced sampler read one, and no other; give one of them.")
    if config.lisa_sampler == "weighted" and config.lisa_weights_file is None and config.lisa_unit == "layer":
        raise UserError("--lisa_sampler weighted: it needs weights of the layers; give --lisa_weights_file.")


def check_states(config: Any) -> None:
    if config.lisa_master != "fp32" and config.offloaded:
        raise UserError(
            f"--lisa_master {config.lisa_master} with --lisa_offload {config.lisa_offload}: what steps on the host is "
            "an fp32 master; leave one of them out."
        )
    if config.lisa_frozen_bits not in FROZEN_BITS:
        allowed = ", ".join(FROZEN_BITS)
        raise UserError(f"--lisa_frozen_bits {config.lisa_frozen_bits}: frozen layers have one of {allowed}.")
    if config.lisa_frozen_bits == "16" and config.lisa_frozen_store != "host":
        raise UserError(
            f"--lisa_frozen_store {config.lisa_frozen_store}: frozen layers of 16 bits have no originals elsewhere; "
            "give --lisa_frozen_bits 8, 4 or fp8, or leave it out."
        )


def check_blocks(config: Any) -> None:
    both = set(config.always_on) & set(config.frozen)
    if both:
        raise UserError(
            f"--lisa_always_on {config.lisa_always_on} and --lisa_frozen {config.lisa_frozen} both name "
            f"{', '.join(sorted(both))}: a block is one or the other."
        )
    none = "--lisa_activated_layers 0"
    if config.lisa_activated_layers == 0 and not {"embed", "head", ADAPTERS} & set(config.always_on):
        raise UserError(
            f"{none} with --lisa_always_on {config.lisa_always_on}: no layer is sampled, and neither embed nor head "
            "trains: nothing to train but norms. Sample a layer, leave embed or head always-trained, or give "
            "--lisa_adapters."
        )
    if config.lisa_activated_layers == 0 and config.sampled:
        raise UserError(
            f"{none}: {config.sampled[0]} is to be sampled in the place of layers, and there is none; put it in "
            "--lisa_always_on or in --lisa_frozen."
        )
    flag = f"--lisa_block_probability {config.lisa_block_probability}"
    for block, probability in config.block_probabilities.items():
        if block not in config.sampled:
            raise UserError(
                f"{flag}: {block} is always-trained or frozen; take it out of --lisa_always_on and --lisa_frozen "
                "to have it sampled."
            )
        if not 0 < probability <= 1:
            raise UserError(f"{flag}: a probability is above 0 and at most 1; {block} has {probability:g}.")


def scales_beside(rank: int | None, frozen: Collection[str], samples: bool) -> dict[str, float]:
    """Return what learning rates are multiplied by where adapters of a rank train.

    Beside sampled layers the rate is that of the layers, and that of adapters falls with the root of their rank.
    Otherwise the rate is that of the adapters.
    """
    if rank is None:
        return {}
    of_ends = {block: EMBED_RATE if samples else ENDS_RATE for block in ("embed", "head") if block not in frozen}
    return of_ends | ({ADAPTERS: ADAPTERS_RATE * min(1.0, (16 / rank) ** 0.5)} if samples else {})


def check_load_in_4bit(method: str, stage: int) -> None:
    """Raise UserError for weights in 4 bits that the method trains, or that ZeRO-3 would partition."""
    if method != "lora":
        way_out = "Use `--method lora`" + (" or `--lisa_frozen_bits 4`." if method == "lisa" else ".")
        raise UserError(f"--load_in_4bit with --method {method}: weights in 4 bits cannot train. {way_out}")
    if stage == 3:
        raise UserError("--load_in_4bit with ZeRO-3: it cannot partition weights in 4 bits. Use `--deepspeed zero2`.")


def check_lr_scales(config: Any) -> None:
    flag = f"--lisa_lr_scale {config.lisa_lr_scale}"
    for block, scale in config.lr_scales.items():
        if not 0 < scale < math.inf:
            rule = "a scale is above 0, and finite; what is not to train is for --lisa_frozen"
            raise UserError(f"{flag}: {block} has {scale:g}; {rule}.")
        if block in config.frozen or (block == "layers" and config.lisa_activated_layers == 0):
            warnings.warn(f"{flag}: {block} does not train.", stacklevel=5)


def check_state_bits(config: Any) -> None:
    flag, offload = f"--lisa_state_bits {config.lisa_state_bits}", f"--lisa_offload {config.lisa_offload}"
    for block, bits in config.given_bits.items():
        if bits not in (8, 32, FACTORED):
            rule = f"moments have 8 or 32 bits, or are {FACTORED}"
            raise UserError(f"{flag}: {rule}; {block} has {float(bits):g}.")
        if bits == FACTORED and block not in ("embed", "head"):
            rule = f"the moments of embed and head can be {FACTORED}, where a row is a token"
            raise UserError(f"{flag}: {rule}; give {block}=8.")
        if bits != 32 and block in config.offloaded:
            rule = "states on the host have 32 bits"
            raise UserError(f"{flag} with {offload}: {rule}; take {block} out of one of them.")
    for block in config.offloaded:
        if block in config.frozen:
            why = f"{block} is in --lisa_frozen {config.lisa_frozen} and has no states to put on the host"
            warnings.warn(f"{offload}: {why}.", stacklevel=5)
