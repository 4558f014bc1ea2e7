"""TRL's SFTTrainer, trained by LISA or, for comparison, with the same parameters in every step."""

from typing import Any

from trl import SFTTrainer

from lisa_dist.train.attention import PackingCheck, packs_documents
from lisa_dist.train.monitoring import MonitoredMixin
from lisa_dist.train.trainer import LisaMixin
from lisa_dist.zero.stage3 import forget_module_order


class LisaTrainer(LisaMixin, SFTTrainer):
    """TRL's SFTTrainer, trained by LISA: its formats, chat templates, packing and losses.

    Raises ValueError, at construction or before the first step, where packed documents would see each other.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if packs_documents(self.args):
            self.add_callback(PackingCheck(self, after=forget_module_order))


class BaselineTrainer(MonitoredMixin, SFTTrainer):
    """TRL's SFTTrainer with the same parameters in every step, all or adapters; it logs what a LISA run logs.

    Raises ValueError as `LisaTrainer` does.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if packs_documents(self.args):
            self.add_callback(PackingCheck(self, after=forget_module_order))
