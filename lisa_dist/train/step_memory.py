"""A trainer's micro-batches as the memory plan takes them, and the plan of its run."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, TrainingArguments

from lisa_dist.core.controller import LisaController
from lisa_dist.memory.run_memory import RunMemory
from lisa_dist.memory.trace import Workload

RESERVED = 2**30  # bytes of a GPU, for the CUDA context, NCCL and fragments
# The losses whose memory can be planned, and whether each is fused with the head: TRL's makes no whole logits. By their
# names, since the second comes with TRL.
_HEAD_IS_FUSED = {
    "transformers.trainer.Trainer.compute_loss": False,
    "trl.trainer.sft_trainer.SFTTrainer.compute_loss": True,
}


class StepWorkload:
    """What a micro-batch of a trainer computes; `compute_loss` is the trainer class's."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, compute_loss: Callable[..., Any]):
        self._model, self._args = model, args
        self._fused_head = _HEAD_IS_FUSED.get(f"{compute_loss.__module__}.{compute_loss.__qualname__}")
        if args.label_smoothing_factor:
            self._fused_head = None

    def of(self, rows: int, tokens: int, padded: bool) -> Workload | None:
        """A micro-batch as `FakeRun` takes it; None where the loss is one that it does not know."""
        if self._fused_head is None:
            return None
        return Workload(
            seq_length=tokens,
            micro_batch_size=rows,
            dtype=next(self._model.parameters()).dtype,
            attention="eager" if self._model.config._attn_implementation == "eager" else "sdpa",
            fused_head=self._fused_head,
            padded=padded,
        )

    def longest(self) -> Workload | None:
        """The largest micro-batch that may come; None where no --max_length bounds it."""
        tokens, rows = getattr(self._args, "max_length", None), self._args.per_device_train_batch_size
        return self.of(rows, tokens, padded=rows > 1) if tokens else None


def plan_run_memory(
    lisa: LisaController,
    model: PreTrainedModel,
    args: TrainingArguments,
    ds_config: dict[str, Any],
    *,
    optim: str,
    longest: Workload | None,
    checkpointed: int | str | None,
    budget: int | None,
) -> RunMemory:
    """The memory of a trainer's run; without a `budget` in bytes that of the GPU but 1 GiB."""
    if budget is None and args.device.type == "cuda":
        budget = torch.cuda.get_device_properties(args.device).total_memory - RESERVED
    return RunMemory(
        lisa,
        ds_config,
        optim=optim,
        config=model.config if type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING else None,
        longest=longest,
        checkpointed=checkpointed,
        budget=budget,
    )
