"""Sequence parallelism in a Trainer: the ranks of a group are given the same rows, each its part of them."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from torch.utils.data import IterableDataset
from transformers import DataCollator, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_dist.core.sequence_parallel import SequenceParallel, check_groups, check_sequence_parallel, shard
from lisa_dist.errors import UserError
from lisa_dist.patches import patched
from lisa_dist.train.resume import task_trainer_of

# Arguments by which a loss is no sum over labels, or ranks of a group take other rows, and what each must be.
_OF_WHOLE_ROWS: dict[str, Any] = {
    "label_smoothing_factor": 0,
    "neftune_noise_alpha": None,
    "average_tokens_across_devices": True,
    "train_sampling_strategy": "random",
}

if TYPE_CHECKING:
    _TrainerClass: TypeAlias = Any  # whichever class of Trainer the mixin is put before
else:
    _TrainerClass = object


def take_sequence_parallel(args: Any) -> int:
    """The ranks that share each row, by a Trainer's arguments; 1 where none do.

    Accelerate is not told of them: its loaders would gather rows of all ranks, and the Trainer's loss would weigh rows
    by themselves, not by their labels.
    """
    given = getattr(args, "parallelism_config", None)
    size: int = getattr(args, "sequence_parallel", 1)
    if given is None or given.sp_size == 1:
        return size
    others = {name: getattr(given, name) for name in ("tp_size", "cp_size") if getattr(given, name) > 1}
    if others or size not in (1, given.sp_size):
        rule = f"sp_size {given.sp_size} beside {others or f'--sequence_parallel {size}'}: give sp_size alone"
        raise UserError(f"parallelism_config: {rule}.")
    args.sequence_parallel, args.parallelism_config = given.sp_size, None
    return given.sp_size


class _Collate:
    """A collator that gives this rank's part of rows; workers of a loader take it with them."""

    def __init__(self, collate: Callable[[Any], dict[str, Any]], size: int, place: int):
        self._collate, self._size, self._place = collate, size, place

    def __call__(self, rows: Any) -> dict[str, Any]:
        return shard(self._collate(rows), self._size, self._place)


class SequenceParallelMixin(_TrainerClass):
    """Put before a Trainer class: ranks share rows by `--sequence_parallel`, or `sp_size` of a ParallelismConfig."""

    data_collator: DataCollator  # the Trainer's
    _sequence: SequenceParallel | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        ours: Any = next((one for one in [*args, *kwargs.values()] if isinstance(one, TrainingArguments)), None)
        size = take_sequence_parallel(ours)
        if size > 1:
            check_can_share(type(self), ours, size)
        super().__init__(*args, **kwargs)
        if size > 1:
            config = self.model.config
            packed = getattr(self.args, "max_length", None) if getattr(self.args, "packing", False) else None
            how = config._attn_implementation
            check_sequence_parallel(size, self.args.world_size, config, how, packed_tokens=packed)
            if isinstance(self.train_dataset, IterableDataset) and getattr(self, "_stream", None) is None:
                rule = "rank 0 deals out a stream's rows, to each rank its own; give a dataset"
                raise UserError(f"--sequence_parallel {size}: {rule}.")
            if self.compute_loss_func is not None:
                raise UserError(f"--sequence_parallel {size} with compute_loss_func: it would shift labels again.")
            self._sequence = SequenceParallel(size, self.args.device.type)
            collator: Any = self.data_collator
            if hasattr(collator, "pad_to_multiple_of"):
                collator.pad_to_multiple_of = math.lcm(collator.pad_to_multiple_of or 1, size)
            self.add_callback(_Share(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; the model has its own attention again when it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._sequence is not None:
                self._sequence.close()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's. Of metrics Accelerate would drop those of ranks that stand for rows given twice."""
        if self._sequence is None:
            return super().training_step(*args, **kwargs)
        with patched(self.accelerator, "gather_for_metrics", self.accelerator.gather, of="metrics_of_parts"):
            return super().training_step(*args, **kwargs)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """The Trainer's; of training the ranks of a group have the same rows, each its part of them."""
        sequence, collate, state = self._sequence, self.data_collator, self.accelerator.state
        if sequence is None or not is_training:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        self.data_collator = _Collate(collate, sequence.size, sequence.place)
        state.ds_device_mesh = sequence.mesh
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collate
            del state.ds_device_mesh

    def get_total_train_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """The Trainer's: rows of a step, which the ranks of a group share."""
        return super().get_total_train_batch_size(*args, **kwargs) // self._rows_shared_by

    @property
    def _rows_shared_by(self) -> int:
        return 1 if self._sequence is None else self._sequence.size


class _Share(TrainerCallback):
    """Has ranks share rows from the first step on. Raises UserError for a model whose parts of rows need the others."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The engine is there."""
        self._trainer._sequence.share(self._trainer.model_wrapped)


def check_can_share(trainer_class: type, args: TrainingArguments, size: int) -> None:
    """Raise UserError for a trainer, or arguments, whose loss is of whole rows."""
    flag = f"--sequence_parallel {size}"
    if (task := task_trainer_of(trainer_class)) is not None:
        raise UserError(f"{flag}: {task} makes its batches of whole rows; it is for supervised fine-tuning.")
    check_groups(size, args.world_size)
    loaders: Any = args.accelerator_config
    if not loaders.use_seedable_sampler:
        raise UserError(
            f"{flag} with use_seedable_sampler False: ranks of a group would take other rows; make it True."
        )
    if loaders.dispatch_batches:
        raise UserError(
            f"{flag} with dispatch_batches True in --accelerator_config: rank 0 would give each rank rows of its own. "
            "Leave dispatch_batches out."
        )
    for name, without in _OF_WHOLE_ROWS.items():
        if getattr(args, name) != without:
            raise UserError(f"{flag} with --{name} {getattr(args, name)}: it is for whole rows; give one of the two.")
