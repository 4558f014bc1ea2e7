"""Settings that go together, by one name: `--lisa_preset`."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lisa_dist.ds_config import uses_optimizer_offload
from lisa_dist.errors import UserError
from lisa_dist.removed import refuse_removed

# What needs least of the device, and loses nothing that was measured (benchmarks/REPORT.md); for --optim lisa_adamw.
SMALL_MOMENTS = {"lisa_state_bits": "embed=factored,head=factored,layers=8"}
SMALL_STATES = SMALL_MOMENTS | {"lisa_master": "bf16_sr"}  # of weights in bf16
ADAPTERS, PAPER, NONE = "adapters", "paper", "none"
# What each preset sets in a LisaConfig.
PRESETS: dict[str, dict[str, Any]] = {
    # The default, which benchmarks/quality/RULE.md has chosen.
    ADAPTERS: {"lisa_activated_layers": 0, "lisa_adapters": 32},
    # Algorithm 1 and the settings of the runs of Pan et al. (arXiv 2403.17919): every state starts afresh in a period.
    PAPER: {
        "lisa_activated_layers": 2,
        "lisa_interval_steps": 20,
        "lisa_sampler": "uniform",
        "lisa_always_on": "embed,head,rest",
        "lisa_state": "reset_all",
    },
    NONE: {},
}
# The optimizer of each preset, and its states.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    ADAPTERS: {"optim": "lisa_adamw"} | SMALL_STATES,
    PAPER: {"optim": "adamw_torch_fused"},
    NONE: {},
}
PRESET_HELP = (
    "A group of settings: adapters (LoRA adapters of rank 32 on all decoder layers train together with the embedding "
    "and the head, and no layer is sampled; by lisa_adamw with small states), paper (2 layers, 20 steps, AdamW with "
    "32-bit states that are reset in each period) or none. By default adapters, or none if a setting of the sampling "
    "is given, such as --lisa_activated_layers."
)
# Settings that ask for sampled layers: with one of them the default is plain LISA.
OF_SAMPLING = frozenset(
    {
        "lisa_activated_layers",
        "lisa_unit",
        "lisa_budget",
        "lisa_interval_steps",
        "lisa_sampler",
        "lisa_weights_file",
        "lisa_always_on",
        "lisa_block_probability",
        "lisa_state",
    }
)


# The default learning rate, in units of TRL's default for the task: adapters take ten times the rate of all weights.
RATE_OF_ADAPTERS = 10


def default_rate(rate_of_trl: float, trains_adapters: bool) -> float:
    """Return the learning rate of a run where none is given: with `sft` 2e-4 for adapters and 2e-5 otherwise.

    `trains_adapters` is true for `--method lora` and for LISA's adapters without sampled layers.
    """
    return float(f"{rate_of_trl * (RATE_OF_ADAPTERS if trains_adapters else 1):.6g}")


def trains_adapters_alone(settings: Mapping[str, Any]) -> bool:
    """Return whether adapters train and no layer is sampled. `settings` are those of a LisaConfig."""
    return settings.get("lisa_adapters") is not None and settings.get("lisa_activated_layers") == 0


def reserved_bytes(total: int) -> int:
    """Bytes of a GPU of so many that a plan leaves: to CUDA's context, NCCL, other streams' pools and fragments."""
    return max(3 << 29, total * 6 // 100)


def default_preset(given: Iterable[str]) -> str:
    """Return the preset of a run where `--lisa_preset` is not among the given names."""
    return NONE if OF_SAMPLING.intersection(given) else ADAPTERS


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a LisaConfig with those that its preset adds to the given ones.

    Raises UserError for a preset that there is not.
    """
    preset = given.get("lisa_preset")
    if preset is None:
        preset = default_preset(given)
    refuse_removed({"lisa_preset": preset})
    if preset not in PRESETS:
        raise UserError(f"--lisa_preset {preset}: unknown; choose one of {', '.join(PRESETS)}.")
    return {**PRESETS[preset], **given, "lisa_preset": preset}


def optimizer_of_preset(
    preset: str,
    given: Collection[str],
    *,
    optim: str,
    ds_config: dict,
    offloaded: Collection[str],
    in_bf16: bool,
) -> dict[str, Any]:
    """Return the optimizer of a preset and the settings of its states, except the `given` names.

    Small states need lisa_adamw and a GPU that holds them. Weights that are not in bf16 have masters.
    """
    left_out = {*given}
    if preset == ADAPTERS:
        left_out |= set() if in_bf16 else {"lisa_master"}
        if offloaded or uses_optimizer_offload(ds_config) or ("optim" in given and optim != "lisa_adamw"):
            left_out |= {"optim", *SMALL_STATES}
    return {name: value for name, value in OPTIMIZERS[preset].items() if name not in left_out}
