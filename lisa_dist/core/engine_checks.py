"""What an engine must be for LISA to take it over; ValueError with the setting and the way out."""

from collections.abc import Sequence

from lisa_dist.config import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.optim.states import PartitionKey
from lisa_dist.zero.partitions import ZeroPartitions


def check_engine(partitions: ZeroPartitions, config: LisaConfig, expected_keys: Sequence[PartitionKey]) -> None:
    """Raise ValueError for an engine whose groups, masters or gradients do not fit; `expected_keys` are the groups'."""
    if config.lisa_state == "keep" and partitions.engine.zero_round_robin_gradients():
        raise UserError(
            "the DeepSpeed config has round_robin_gradients = true: with --lisa_state keep it must be false."
        )
    _check_masters(partitions, config)
    keys = partitions.keys()
    if list(expected_keys) != keys:
        raise UserError(
            f"the engine optimizes {len(keys)} groups of parameters that are not the {len(expected_keys)} groups of "
            "the active blocks: build its optimizer from param_groups() of this controller, and keep "
            "zero_optimization.sub_group_size larger than a block."
        )


def _check_masters(partitions: ZeroPartitions, config: LisaConfig) -> None:
    keys = "bf16_master_weights_and_grads and bf16_optimizer_states in the bf16 section of the DeepSpeed config"
    without_masters = config.lisa_master == "bf16_sr"
    if without_masters and not (partitions.keeps_no_masters and partitions.coding == "lisa"):
        raise UserError(
            f"--lisa_master bf16_sr: the engine was built with masters, or with another optimizer; set {keys}, and "
            'take build_optimizer(..., "lisa_adamw"), as lisa_dist.initialize does.'
        )
    if partitions.keeps_no_masters and not without_masters:
        raise UserError(
            f"--lisa_master fp32: the engine keeps no masters in fp32, by {keys}; leave them out, or use "
            "--lisa_master bf16_sr with --optim lisa_adamw."
        )
