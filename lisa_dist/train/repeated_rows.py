"""Rows that a loader repeats so that all ranks have equally many: they have no labels.

Accelerate fills the last batches of an epoch, and of an evaluation, with rows from its beginning. With labels they
would count twice, and a run would depend on the number of ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import Dataset

from lisa_dist.patches import patch

NO_LABEL = -100


class _RepeatedIndex(int):
    """The index of a row that another batch of the same pass over the data has too."""


class _RepeatedRow(dict):
    """A row that was taken by such an index."""


class _MarkingSampler(BatchSamplerShard):
    """Accelerate's batches of one rank, in which the indices of repeated rows are marked."""

    def __iter__(self) -> Iterator[list[int]]:
        rows = len(self.batch_sampler.sampler)
        for number, batch in enumerate(super().__iter__()):
            begin = (number * self.num_processes + self.process_index) * len(batch)
            own = max(0, rows - begin)
            yield batch[:own] + [_RepeatedIndex(index) for index in batch[own:]]


class _MarkingDataset(Dataset):
    """A dataset that marks the rows of marked indices."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        fetch = getattr(self._dataset, "__getitems__", None)
        rows = fetch(indices) if fetch else [self._dataset[index] for index in indices]
        return [
            _RepeatedRow(row) if isinstance(index, _RepeatedIndex) and isinstance(row, Mapping) else row
            for index, row in zip(indices, rows, strict=True)
        ]


class _Collate:
    """A collator whose batches have no labels for marked rows; workers of a loader take it with them."""

    def __init__(self, collate: Callable[[Any], Any]):
        self._collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        repeated = [place for place, row in enumerate(rows) if isinstance(row, _RepeatedRow)]
        if not repeated:
            return self._collate(rows)
        # Before rows are joined: a collator without padding makes one row of all.
        batch = self._collate([_without_labels(row) if isinstance(row, _RepeatedRow) else row for row in rows])
        if len(batch["labels"]) == len(rows):  # a collator of images makes the labels itself
            batch["labels"][repeated] = NO_LABEL
        return batch


def _without_labels(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": [NO_LABEL] * len(row["input_ids"])} if "input_ids" in row else dict(row)


def leave_out_labels(loader: Any) -> Any:
    """Have a loader that Accelerate has prepared give repeated rows without labels; return the same loader."""
    sampler: Any = getattr(loader, "batch_sampler", None)  # a stream has none: every row is read once
    if type(sampler) is not BatchSamplerShard or sampler.num_processes == 1 or sampler.batch_size is None:
        return loader
    marking = _MarkingSampler(
        sampler.batch_sampler, sampler.num_processes, sampler.process_index, sampler.split_batches, sampler.even_batches
    )
    inner = loader.base_dataloader
    patch(inner, "collate_fn", _Collate(loader.collate_fn), of="repeated_rows")
    # torch's DataLoader refuses to set these two attributes.
    vars(inner).update(batch_sampler=marking, dataset=_MarkingDataset(loader.dataset))
    return loader
