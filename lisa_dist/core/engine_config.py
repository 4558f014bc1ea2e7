"""The one preparation of a DeepSpeed config for LISA: for a loop, a trainer, the command line and the planner."""

from typing import Any

from lisa_dist.config import LisaConfig
from lisa_dist.ds_config import check_ds_config, keep_no_master, offload_by_block, uses_optimizer_offload
from lisa_dist.errors import UserError
from lisa_dist.optim.build import check_optim


def prepare_ds_config(ds_config: dict[str, Any], config: LisaConfig, optim: str, precision: str) -> None:
    """Check a DeepSpeed config against the settings of a run, and change it in place to what they ask for.

    `precision` is that of the weights, "bf16", "fp16" or "fp32". Raises UserError for what LISA cannot run under.
    """
    check_ds_config(ds_config)
    offload_by_block(ds_config, config.offloaded)
    if config.lisa_frozen_bits != 16:
        _check_frozen_bits(ds_config, config, precision)
    check_optim(optim, uses_optimizer_offload(ds_config), config, precision)
    if config.lisa_master != "fp32":
        keep_no_master(ds_config)


def _check_frozen_bits(ds_config: dict[str, Any], config: LisaConfig, precision: str) -> None:
    flag = f"--lisa_frozen_bits {config.lisa_frozen_bits}"
    if (ds_config.get("zero_optimization") or {}).get("stage") == 3:
        raise UserError(
            f"{flag} on ZeRO stage 3: it cuts frozen layers between the ranks, where each has its part in 16 bits; use "
            "--deepspeed zero2, or leave the flag out."
        )
    if precision == "fp32":
        raise UserError(f"{flag} with weights in fp32: what is frozen is 16 bits wide; give --bf16 true.")


def check_eval_frozen_bits(bits: int | None, config: LisaConfig) -> None:
    """Raise UserError for bits that frozen layers do not have in an evaluation (`--eval_frozen_bits`)."""
    if bits not in (None, 16, config.lisa_frozen_bits):
        allowed = " or ".join(map(str, sorted({16, config.lisa_frozen_bits})))
        raise UserError(
            f"--eval_frozen_bits {bits}: frozen layers are evaluated as they are held, or with their originals: with "
            f"--lisa_frozen_bits {config.lisa_frozen_bits} give {allowed}."
        )
