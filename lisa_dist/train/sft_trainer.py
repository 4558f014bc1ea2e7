"""TRL's SFTTrainer, trained by LISA or, for comparison, with the same parameters in every step."""

from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from lisa_dist.errors import UserError
from lisa_dist.train.attention import documents_see_each_other, packs_documents
from lisa_dist.train.monitoring import MonitoredMixin
from lisa_dist.train.trainer import LisaMixin
from lisa_dist.zero.stage3 import forget_module_order


class PackingCheck(TrainerCallback):
    """Refuses, before the first step, a model that lets packed documents see each other. Raises UserError.

    All ranks take part, as ZeRO-3 gathers weights for it. The trainer's engine is there once training begins.
    """

    def __init__(self, trainer: "_PackingMixin"):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare a document after one and after another."""
        trainer: Any = self._trainer
        model = trainer.model_wrapped.module
        training = model.training
        model.eval()
        with torch.no_grad():
            mixed = documents_see_each_other(
                lambda batch: model(**send_to_device(batch, args.device), use_cache=False).logits,
                trainer.data_collator,
                model.config.get_text_config().vocab_size,
            )
        model.train(training)
        forget_module_order(trainer.model_wrapped)
        if mixed:
            flag = "packing" if trainer.args.packing else "padding_free"
            raise UserError(
                f"--{flag} true: in {type(model).__name__} with attention {model.config._attn_implementation}, "
                "documents in a row see each other; leave the flag out, or give another --attn_implementation."
            )


class _PackingMixin(MonitoredMixin):
    """Put before all else of a trainer: adds the check after every other callback of its construction."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if packs_documents(self.args):
            self.add_callback(PackingCheck(self))


class LisaTrainer(_PackingMixin, LisaMixin, SFTTrainer):
    """TRL's SFTTrainer, trained by LISA: its formats, chat templates, packing and losses.

    Raises ValueError, at construction or before the first step, where packed documents would see each other.
    """


class BaselineTrainer(_PackingMixin, SFTTrainer):
    """TRL's SFTTrainer with the same parameters in every step, all or adapters; it logs what a LISA run logs.

    Raises ValueError as `LisaTrainer` does.
    """
