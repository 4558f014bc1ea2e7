"""The one preparation of a DeepSpeed config for LISA: for a loop, a trainer, the command line and the planner."""

from typing import Any

from lisa_dist.config import LisaConfig
from lisa_dist.ds_config import check_ds_config, keep_no_master, offload_by_block, uses_optimizer_offload
from lisa_dist.optim.build import check_optim


def prepare_ds_config(ds_config: dict[str, Any], config: LisaConfig, optim: str, precision: str) -> None:
    """Check a DeepSpeed config against the settings of a run, and change it in place to what they ask for.

    `precision` is that of the weights, "bf16", "fp16" or "fp32". Raises UserError for what LISA cannot run under.
    """
    check_ds_config(ds_config)
    offload_by_block(ds_config, config.offloaded)
    check_optim(optim, uses_optimizer_offload(ds_config), config, precision)
    if config.lisa_master != "fp32":
        keep_no_master(ds_config)
