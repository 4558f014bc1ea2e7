"""The optimizer over flat partitions, as `--optim` names it, and what each one cannot do."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import FACTORED, StateBits
from lisa_dist.errors import UserError
from lisa_dist.optim.adamw import LisaAdamW
from lisa_dist.optim.ops import choose_kernels

# Optimizers that work on any flat piece of a parameter, which is what a ZeRO partition is.
TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
# Not its paged forms: their memory is never given back, so every switch would leak the states it drops.
BITSANDBYTES_ADAMW = ("adamw_bnb_8bit", "adamw_8bit")
LISA_ADAMW = "lisa_adamw"  # our own: one pass, fewer bytes
SUPPORTED_OPTIMIZERS = (*TORCH_ADAMW, *BITSANDBYTES_ADAMW, LISA_ADAMW)


def default_state_bits(optim: str) -> int:
    """Bits of the moments, of a block that --lisa_state_bits does not name."""
    return 8 if optim in BITSANDBYTES_ADAMW else 32


def check_optim(optim: str, offload: bool, config: LisaConfig | None = None, half_precision: str = "bf16") -> None:
    """Refuse an optimizer, or bits and masters that it cannot have, before anything is built.

    `offload`: DeepSpeed's; `half_precision`: "bf16", "fp16" or "fp32", of the weights.
    """
    config = config or LisaConfig()
    state_bits, offloaded = config.state_bits, config.offloaded
    optim = getattr(optim, "value", optim)  # the Trainer's arguments hold an enum
    if optim not in SUPPORTED_OPTIMIZERS:
        raise UserError(
            f"--optim {optim}: LISA runs AdamW over ZeRO partitions; choose one of {', '.join(SUPPORTED_OPTIMIZERS)}."
        )
    if config.lisa_master != "fp32":
        flag = f"--lisa_master {config.lisa_master}"
        if optim != LISA_ADAMW:
            raise UserError(f"{flag} with --optim {optim}: only --optim lisa_adamw does without a master.")
        if half_precision != "bf16":
            raise UserError(f"{flag} with weights in {half_precision}: it rounds to bf16; give --bf16 true.")
        if offload:
            raise UserError(f"{flag} with offload_optimizer: what steps on the host is an fp32 master; leave one out.")
    if optim == LISA_ADAMW and not offload:
        # At the start, and not in the first step: those that were forced where they cannot run.
        for device in {get_accelerator().device_name()} | ({"cpu"} if offloaded else set()):
            choose_kernels(device)
    for block in offloaded:
        if state_bits.get(block, default_state_bits(optim)) == 8:
            raise UserError(
                f"--optim {optim} with --lisa_offload {config.lisa_offload}: states on the host have 32 bits; give "
                f"--lisa_state_bits {block}=32, or use --optim adamw_torch_fused."
            )
    _check_bits(optim, offload, state_bits.items())
    if offload and optim in BITSANDBYTES_ADAMW:
        raise UserError(
            f"--optim {optim} with offload_optimizer: DeepSpeed steps offloaded states on the host with its own AdamW; "
            "use --optim adamw_torch, or a DeepSpeed config without offload_optimizer."
        )


def _block_of(group: dict[str, Any]) -> str:
    """The name that --lisa_state_bits has for the block of a group; those of sampled layers are slot0, slot1, ..."""
    name: str = group.get("lisa_group", "").partition("/")[0]
    return "layers" if name.startswith("slot") else name


def _check_bits(optim: str, offload: bool, state_bits: Iterable[tuple[str, StateBits]]) -> None:
    fewer = [f"{block}={bits}" for block, bits in state_bits if bits != 32]
    if offload and fewer:
        raise UserError(
            f"--lisa_state_bits {fewer[0]} with offload_optimizer: DeepSpeed steps offloaded states on the host with "
            "its own AdamW at 32 bits; leave the flag out, or use a DeepSpeed config without offload_optimizer."
        )
    listed = ",".join(one for one in fewer if one.endswith(FACTORED))
    if listed and optim != LISA_ADAMW:
        raise UserError(
            f"--lisa_state_bits {listed} with --optim {optim}: only --optim lisa_adamw has factored moments."
        )


def build_optimizer(
    param_groups: list[dict[str, Any]],
    optim: str = "adamw_torch",
    *,
    lr: float = 1e-5,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    offload: bool = False,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed will wrap: AdamW as named by `--optim`, DeepSpeedCPUAdam under offload.

    `lr` is the peak learning rate; weight decay, and bits of the moments where `optim` has others, are in the groups;
    `seed` is that of lisa_adamw's stochastic rounding. Raises ValueError for an optimizer that cannot work.
    """
    check_optim(optim, offload)
    optim = getattr(optim, "value", optim)
    with_bits = [group for group in param_groups if "lisa_state_bits" in group]
    bits = [(_block_of(group), group["lisa_state_bits"]) for group in with_bits]
    _check_bits(optim, offload, bits)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(param_groups, lr=lr, betas=betas, eps=eps, adamw_mode=True)
        return optimizer
    if optim == LISA_ADAMW:
        if any(group.get("lisa_host") for group in param_groups):
            choose_kernels("cpu")  # raises here what is forced in vain, and not in the first step
        return LisaAdamW(param_groups, lr=lr, betas=betas, eps=eps, seed=seed)
    if optim in TORCH_ADAMW and 8 not in [number for _, number in bits]:
        return torch.optim.AdamW(param_groups, lr=lr, betas=betas, eps=eps, fused=optim == "adamw_torch_fused")
    return _bitsandbytes_adamw()(param_groups, lr=lr, betas=betas, eps=eps, optim_bits=default_state_bits(optim))


def _bitsandbytes_adamw() -> Callable[..., torch.optim.Optimizer]:
    """bitsandbytes' AdamW, which asks a group for the bits of its moments; imported where it is wanted."""
    import bitsandbytes

    class BlockwiseAdamW(bitsandbytes.optim.AdamW):
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group.get("lisa_state_bits", config["optim_bits"])}

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            """The same without waiting for the device after each tensor, which its paged states alone need."""
            assert closure is None  # DeepSpeed calls it without one
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for number, group in enumerate(self.param_groups):
                for place, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, number, place)
                    self.update_step(group, parameter, number, place)

    return BlockwiseAdamW
