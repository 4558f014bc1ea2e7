"""The training arguments of each task: TRL's config, with the flags that every task has."""

import os
from dataclasses import dataclass
from typing import Any

from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from lisa_dist.tasks import GRPO, KTO, REWARD, SFT
from lisa_dist.train.training_flags import TrainingFlags

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns where it is imported
from trl.experimental.orpo import ORPOConfig


@dataclass
class LisaSFTConfig(TrainingFlags, SFTConfig):
    """TRL's SFTConfig, with the flags of every task."""


@dataclass
class LisaDPOConfig(TrainingFlags, DPOConfig):
    """TRL's DPOConfig, with the flags of every task."""


@dataclass
class LisaKTOConfig(TrainingFlags, KTOConfig):
    """TRL's KTOConfig, with the flags of every task."""


@dataclass
class LisaORPOConfig(TrainingFlags, ORPOConfig):
    """TRL's ORPOConfig, with the flags of every task."""


@dataclass
class LisaRewardConfig(TrainingFlags, RewardConfig):
    """TRL's RewardConfig, with the flags of every task."""


@dataclass
class LisaGRPOConfig(TrainingFlags, GRPOConfig):
    """TRL's GRPOConfig, with the flags of every task."""


CONFIGS: dict[str, Any] = {
    SFT: LisaSFTConfig,
    "dpo": LisaDPOConfig,
    KTO: LisaKTOConfig,
    "orpo": LisaORPOConfig,
    REWARD: LisaRewardConfig,
    GRPO: LisaGRPOConfig,
}
