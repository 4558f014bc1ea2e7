"""TRL's SFTTrainer, trained by LISA or, for comparison, with the same parameters in every step."""

from typing import Any

from accelerate.utils import send_to_device
from deepspeed import DeepSpeedEngine
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from lisa_dist.data.stream import Stream, StreamLoader, read_stream_state, stream_path
from lisa_dist.errors import UserError
from lisa_dist.files import write_json
from lisa_dist.loss.label_logits import add_label_logits, check_loss, why_no_label_logits
from lisa_dist.loss.liger import add_liger_loss
from lisa_dist.memory.workload import CHUNKED, LIGER, LOGITS
from lisa_dist.train.attention import documents_see_each_other, packs_documents
from lisa_dist.train.baseline import BaselineMixin
from lisa_dist.train.monitoring import MonitoredMixin
from lisa_dist.train.repeated_rows import leave_out_labels
from lisa_dist.train.trainer import LisaMixin
from lisa_dist.zero.stage3 import asking, forget_module_order


class PackingCheck(TrainerCallback):
    """Raises UserError, before the first step, for a model that lets packed documents see each other.

    All ranks take part, as ZeRO-3 gathers weights for it. The trainer's engine is there once training begins.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Compare a document after one and after another."""
        trainer = self._trainer
        with asking(trainer.model_wrapped) as model:
            mixed = documents_see_each_other(
                lambda batch: model(**send_to_device(batch, args.device), use_cache=False).logits,
                trainer.data_collator,
                model.config.get_text_config().vocab_size,
            )
        if mixed:
            flag = "packing" if trainer.args.packing else "padding_free"
            raise UserError(
                f"--{flag} true: in {type(model).__name__} with attention {model.config._attn_implementation}, "
                "documents in a row see each other; leave the flag out, or give another --attn_implementation."
            )


class _StreamTrainer(SFTTrainer):
    """SFTTrainer of a `stream`, of which each rank reads rows of its own; a resume reads on where they were."""

    def __init__(self, *args: Any, stream: Stream | None = None, **kwargs: Any):
        self._stream = stream
        self._stream_loader: StreamLoader | None = None
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if self._stream is not None and args[-1] == "train":
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        if self._stream is None or not kwargs.get("is_training"):
            return super()._get_dataloader(*args, **kwargs)
        ranks, sharing = self.args.world_size, getattr(self, "_rows_shared_by", 1)  # ranks that share each row
        batches = self._stream, self.args.process_index // sharing, ranks // sharing, kwargs["batch_size"]
        names = ("num_workers", "pin_memory", "prefetch_factor", "multiprocessing_context")
        loading = {name: getattr(self.args, f"dataloader_{name}") for name in names}
        self._stream_loader = StreamLoader(*batches, self.data_collator, self.accelerator.print, **loading)
        return self._stream_loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, which would take all earlier batches once more when it resumes."""
        folder = kwargs["resume_from_checkpoint"]
        if self._stream_loader is not None and folder is not None and not self.args.ignore_data_skip:
            self._stream_loader.load_state_dict(read_stream_state(folder, self.args.process_index))
            kwargs["steps_trained_in_current_epoch"] = 0
        super()._run_epoch(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._stream_loader is not None:
            write_json(stream_path(output_dir, self.args.process_index), self._stream_loader.state_dict())


class _SFTMixin(MonitoredMixin):
    """Put before all else of a trainer: adds the check after every other callback of its construction, and `loss`."""

    def __init__(self, *args: Any, loss: str = CHUNKED, **kwargs: Any):
        check_loss(loss)
        if loss == "auto":
            raise UserError("loss='auto': lisa-dist train chooses by a plan; give logits, chunked or liger here.")
        self._loss = loss
        super().__init__(*args, **kwargs)
        if packs_documents(self.args):
            self.add_callback(PackingCheck(self))
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if loss == LOGITS:
            if (why_not := why_no_label_logits(type(model))) is not None:
                raise UserError(f"--loss logits: {why_not}; give --loss chunked.")
            add_label_logits(model)
        elif loss == LIGER:
            add_liger_loss(model)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's loader. Rows that it repeats for ranks to have equally many have no labels."""
        return leave_out_labels(super()._get_dataloader(*args, **kwargs))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's. Its loss in chunks gathers the head by itself, where training's order would prefetch it."""
        engine = self.model_wrapped
        if self._loss != LOGITS or not isinstance(engine, DeepSpeedEngine):
            return super().evaluation_loop(*args, **kwargs)
        forget_module_order(engine)
        outcome = super().evaluation_loop(*args, **kwargs)
        forget_module_order(engine)
        return outcome

    def log(self, *args: Any, **kwargs: Any) -> None:
        """TRL's, without the entropies that Liger does not compute."""
        if self._loss == LIGER:
            self._metrics["train"].pop("entropy", None)
        super().log(*args, **kwargs)


class LisaTrainer(_SFTMixin, LisaMixin, _StreamTrainer):
    """TRL's SFTTrainer, trained by LISA: its formats, chat templates, packing and losses.

    `loss` is how the loss is computed: "chunked" as TRL does, "logits" with logits of the positions with a label that
    are kept for the backward pass, or "liger" (`--loss` of a run).

    Raises ValueError, at construction or before the first step, where packed documents would see each other.
    """


class BaselineTrainer(_SFTMixin, BaselineMixin, _StreamTrainer):
    """TRL's SFTTrainer with the same parameters in every step, all or adapters; it logs what a LISA run logs.

    Raises ValueError as `LisaTrainer` does.
    """
