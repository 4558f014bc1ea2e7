"""Settings that go together, by one name: `--lisa_preset`."""

from collections.abc import Collection, Iterable
from typing import Any

from lisa_dist.config_rules import LORA_LAYERS
from lisa_dist.ds_config import cuts_weights, uses_optimizer_offload
from lisa_dist.errors import UserError
from lisa_dist.tasks import GRPO

# What needs least of the device, and loses nothing that was measured (benchmarks/REPORT.md); for --optim lisa_adamw.
SMALL_MOMENTS = {"lisa_state_bits": "embed=factored,head=factored,layers=8"}
SMALL_STATES = SMALL_MOMENTS | {"lisa_master": "bf16_sr"}  # of weights in bf16
_PLANNED: dict[str, Any] = {"optim": "lisa_adamw", "lisa_activated_layers": LORA_LAYERS} | SMALL_STATES
LORA_MEMORY, ADAPTERS, PAPER, NONE = "lora_memory", "adapters", "paper", "none"
SMALL = (LORA_MEMORY, ADAPTERS)  # with small states, and as many layers as fit in LoRA's memory
PRESETS: dict[str, dict[str, Any]] = {
    LORA_MEMORY: _PLANNED,
    # Where few layers fit: near full training on text that is new to a model and on text that is not.
    ADAPTERS: _PLANNED | {"lisa_adapters": 32, "lisa_frozen_bits": "8", "lisa_state_bits": "embed=8,head=8,layers=8"},
    # Algorithm 1 and the settings of the runs of Pan et al. (arXiv 2403.17919): every state starts afresh in a period.
    PAPER: {
        "optim": "adamw_torch_fused",
        "lisa_activated_layers": 2,
        "lisa_interval_steps": 20,
        "lisa_sampler": "uniform",
        "lisa_always_on": "embed,head,rest",
        "lisa_state": "reset_all",
    },
    NONE: {},
}
PRESET_HELP = (
    "A group of settings: lora_memory (LISA with as many layers as fit in the memory of a LoRA run plus a tenth, at "
    "most half of them, lisa_adamw with small states), adapters (the same with LoRA adapters, and frozen layers in 8 "
    "bits), paper (2 layers, 20 steps, AdamW with 32-bit states that are reset in each period) or none."
)


# The default learning rate, in units of TRL's default for the task: adapters take ten times the rate of all weights.
RATES_OF_METHODS = {"lisa": 1, "full": 1, "lora": 10}


def default_rate(method: str, rate_of_trl: float) -> float:
    """Return the learning rate of a run where none is given: 2e-4 for `lora` and 2e-5 for the others with `sft`."""
    return float(f"{rate_of_trl * RATES_OF_METHODS.get(method, 1):.6g}")


def reserved_bytes(total: int) -> int:
    """Bytes of a GPU of so many that a plan leaves: to CUDA's context, NCCL, other streams' pools and fragments."""
    return max(3 << 29, total * 6 // 100)


# Flags that say what a run may take, besides those that `lora_memory` sets.
_OF_MEMORY = ("lisa_offload", "lisa_unit")


def check_preset(preset: str | None) -> None:
    """Raise UserError for a `--lisa_preset` that there is not."""
    if preset not in (None, *PRESETS):
        raise UserError(f"--lisa_preset {preset}: unknown; choose one of {', '.join(PRESETS)}.")


def says_nothing_of_memory(given: Iterable[str]) -> bool:
    """Whether none of the given flags stands against `lora_memory`, which is then the preset by default."""
    return not {*PRESETS[LORA_MEMORY], *_OF_MEMORY}.intersection(given)


def choose_preset(
    asked: str | None,
    given: Collection[str],
    *,
    optim: str,
    ds_config: dict,
    offloaded: Collection[str],
    by_module: bool,
    in_bf16: bool,
    can_plan: bool,
) -> tuple[str, dict[str, Any]]:
    """The preset of a run, and what it sets: all but the `given` names, and but what the run cannot have.

    By default it is lora_memory if the user gave none of its settings and a step can be planned. Small moments need
    lisa_adamw and states on the device. Weights that are not in bf16 have masters and are not quantized; weights that
    ZeRO-3 partitions are not quantized either. `--lisa_budget` says how many modules train. Raises UserError if layers
    must be planned and no step can be planned.
    """
    offloads = bool(offloaded) or uses_optimizer_offload(ds_config)
    by_default = LORA_MEMORY if says_nothing_of_memory(given) and can_plan and not offloads else NONE
    preset, left_out = asked or by_default, {*given}
    if preset in SMALL:
        left_out |= {"lisa_activated_layers"} if by_module else set()
        left_out |= set() if in_bf16 else {"lisa_master"}
        left_out |= set() if in_bf16 and not cuts_weights(ds_config) else {"lisa_frozen_bits"}
        if offloads or ("optim" in given and optim != PRESETS[preset]["optim"]):
            left_out |= {"optim", *SMALL_STATES}
    settings = {name: value for name, value in PRESETS[preset].items() if name not in left_out}
    if preset in SMALL and "lisa_activated_layers" in settings and not can_plan:
        raise UserError(
            f"--lisa_preset {preset}: it plans a step, by --max_length, and can plan none of --task {GRPO}; give "
            "--lisa_activated_layers too, or another preset."
        )
    return preset, settings
