"""Settings that go together, by one name: `--lisa_preset`."""

from collections.abc import Iterable
from typing import Any

from lisa_dist.config_rules import LORA_LAYERS

# What needs least of the device, and loses nothing that was measured (docs/comparing.md); for --optim lisa_adamw.
SMALL_MOMENTS = {"lisa_state_bits": "embed=factored,head=factored,layers=8"}
SMALL_STATES = SMALL_MOMENTS | {"lisa_master": "bf16_sr"}  # of weights in bf16
LORA, PAPER, NONE = "lora", "paper", "none"
PRESETS: dict[str, dict[str, Any]] = {
    LORA: {"optim": "lisa_adamw", "lisa_activated_layers": LORA_LAYERS} | SMALL_STATES,
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
# Flags that say what a run may take, besides those that `lora` sets.
_OF_MEMORY = ("gpu_memory", "lisa_offload", "lisa_unit")


def says_nothing_of_memory(given: Iterable[str]) -> bool:
    """Whether none of the given flags stands against `lora`, which is then the preset by default."""
    return not {*PRESETS[LORA], *_OF_MEMORY}.intersection(given)
