"""ms-swift's trainer of causal language models, trained by LISA."""

from typing import Any

from swift.trainers import Seq2SeqTrainer

from lisa_dist.integrations.ms_swift import settings_of
from lisa_dist.integrations.settings import one_line
from lisa_dist.train.trainer import LisaMixin


class LisaSeq2SeqTrainer(LisaMixin, Seq2SeqTrainer):
    """ms-swift's Seq2SeqTrainer by LISA: its datasets, templates and losses."""

    def __init__(self, *, args: Any, **kwargs: Any):
        with one_line():
            super().__init__(args=args, **settings_of(args), **kwargs)

    def _get_callbacks(self, args: Any) -> list[Any]:
        """ms-swift's, without its own LISA, which flips `requires_grad` of parameters that DeepSpeed has."""
        args.callbacks = [name for name in args.callbacks if name != "lisa"]
        return super()._get_callbacks(args)


class NotByLisa:
    """In the place of the arguments of ms-swift's other trainers."""

    def __init__(self, **arguments: Any):
        raise SystemExit(
            "lisa_dist: ms-swift's plugin is for `swift sft` and `swift pt` of causal language models; leave it out, "
            "or run lisa-dist train with --task."
        )
