"""TRL's trainers of each task, by LISA and, for comparison, with the same parameters in every step."""

from typing import Any

from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.orpo import ORPOTrainer

from lisa_dist.tasks import GRPO, KTO, REWARD, SFT
from lisa_dist.train.monitoring import MonitoredMixin
from lisa_dist.train.sft_trainer import BaselineTrainer, LisaTrainer
from lisa_dist.train.trainer import LisaMixin


class LisaDPOTrainer(LisaMixin, DPOTrainer):
    """TRL's DPOTrainer, trained by LISA."""


class LisaKTOTrainer(LisaMixin, KTOTrainer):
    """TRL's KTOTrainer, trained by LISA."""


class LisaORPOTrainer(LisaMixin, ORPOTrainer):
    """TRL's ORPOTrainer, trained by LISA."""


class LisaRewardTrainer(LisaMixin, RewardTrainer):
    """TRL's RewardTrainer, trained by LISA: the score is part of the block `rest`."""


class LisaGRPOTrainer(LisaMixin, GRPOTrainer):
    """TRL's GRPOTrainer, trained by LISA."""


class BaselineDPOTrainer(MonitoredMixin, DPOTrainer):
    """TRL's DPOTrainer; it logs what a LISA run logs."""


class BaselineKTOTrainer(MonitoredMixin, KTOTrainer):
    """TRL's KTOTrainer; it logs what a LISA run logs."""


class BaselineORPOTrainer(MonitoredMixin, ORPOTrainer):
    """TRL's ORPOTrainer; it logs what a LISA run logs."""


class BaselineRewardTrainer(MonitoredMixin, RewardTrainer):
    """TRL's RewardTrainer; it logs what a LISA run logs."""


class BaselineGRPOTrainer(MonitoredMixin, GRPOTrainer):
    """TRL's GRPOTrainer; it logs what a LISA run logs."""


# By task: LISA's, and the one of --method full and lora.
TRAINERS: dict[str, tuple[Any, Any]] = {
    SFT: (LisaTrainer, BaselineTrainer),
    "dpo": (LisaDPOTrainer, BaselineDPOTrainer),
    KTO: (LisaKTOTrainer, BaselineKTOTrainer),
    "orpo": (LisaORPOTrainer, BaselineORPOTrainer),
    REWARD: (LisaRewardTrainer, BaselineRewardTrainer),
    GRPO: (LisaGRPOTrainer, BaselineGRPOTrainer),
}
