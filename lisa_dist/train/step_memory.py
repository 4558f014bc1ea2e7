"""A trainer's micro-batches as the memory plan takes them, and the bytes that a GPU has for its run."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from lisa_dist.distributed.collectives import gather
from lisa_dist.loss.label_logits import uses_triton
from lisa_dist.memory.workload import CHUNKED, LOGITS, OWN, RATIO, SCORE, Workload
from lisa_dist.presets import reserved_bytes

# By trainer: how its loss is computed, None where the run chooses; and the sequences of an example.
_OF_TRAINER: dict[str, tuple[str | None, int]] = {
    "Trainer": (OWN, 1),
    "SFTTrainer": (None, 1),
    "DPOTrainer": (CHUNKED, 2),
    "KTOTrainer": (CHUNKED, 1),
    "ORPOTrainer": (RATIO, 2),
    "RewardTrainer": (SCORE, 2),
}


class StepWorkload:
    """What a micro-batch of a trainer computes; `compute_loss` is the trainer class's, `loss` what TRL's is made by.

    It holds no model: a Trainer with a `model_init` makes another one when training begins.
    """

    def __init__(
        self, args: TrainingArguments, compute_loss: Callable[..., Any], loss: str = CHUNKED, sequence_parallel: int = 1
    ):
        self._args, self._sequence_parallel = args, sequence_parallel
        self._offloads = getattr(args, "activation_offloading", False) and args.device.type == "cuda"
        whose = getattr(compute_loss, "__module__", "").partition(".")[0]
        name = getattr(compute_loss, "__qualname__", "").removesuffix(".compute_loss")
        is_known = whose in ("transformers", "trl") and name in _OF_TRAINER and not args.label_smoothing_factor
        of_trainer, self._sequences = _OF_TRAINER[name] if is_known else (None, 1)
        self._loss = (of_trainer or loss) if is_known else None

    def of(self, model: PreTrainedModel, rows: int, tokens: int, padded: bool, labels: Any = None) -> Workload | None:
        """A micro-batch as `FakeRun` takes it; None where the loss is one that it does not know.

        `labels` [rows, tokens] of a batch that is there; of others all that may have a label has one.
        """
        if self._loss is None:
            return None
        first = int(self._sequence_parallel == 1)  # else the labels are those of each token's next already
        return Workload(
            seq_length=tokens,
            micro_batch_size=rows,
            dtype=next(model.parameters()).dtype,
            attention="eager" if model.config._attn_implementation == "eager" else "sdpa",
            loss=self._loss,
            labels=None if labels is None or self._loss != LOGITS else int((labels[:, first:] != -100).sum()),
            triton=uses_triton(self._args.device),
            padded=padded,
            activation_offloading=self._offloads,
            sequence_parallel=self._sequence_parallel,
        )

    def longest(self, model: PreTrainedModel) -> Workload | None:
        """The largest micro-batch that may come; None where no --max_length bounds it."""
        tokens = getattr(self._args, "max_length", None)
        rows = self._args.per_device_train_batch_size * self._sequences
        return self.of(model, rows, -(-tokens // self._sequence_parallel), padded=rows > 1) if tokens else None


def bytes_of_any_gpu(device: torch.device) -> int | None:
    """Bytes that tensors may take of every rank's GPU before the first step; None on CPUs. All ranks call it.

    Of what others and CUDA's context leave free a reserve is kept back.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return min(gather(max(0, free + torch.cuda.memory_reserved(device) - reserved_bytes(total))))
