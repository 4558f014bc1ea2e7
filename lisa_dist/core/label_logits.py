"""The loss from logits of the positions with a label: computed once, and kept for the backward pass.

TRL's loss never has all logits: it computes them in chunks, once in the forward pass and once more in the backward
pass. Where they fit in memory, to keep them saves the second time.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils import is_triton_available

from lisa_dist.errors import UserError

LOSSES = ("auto", "logits", "chunked", "liger")
_IN_CACHE = 1 << 17  # elements in fp32
# Logits [labels, words] and targets [labels] to the targets' log-probabilities and entropies, in fp32.
Score = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# A mask [rows, tokens] to the numbers of what it keeps, row after row.
Select = Callable[[torch.Tensor], torch.Tensor]


def check_loss(loss: str) -> None:
    """Raise UserError for a `--loss` that there is not."""
    if loss not in LOSSES:
        raise UserError(f"--loss {loss}: unknown; choose one of {', '.join(LOSSES)}.")


def why_no_label_logits(model_class: Any) -> str | None:
    """Why a class of models, None for an unknown one, cannot compute logits of some positions alone, or None."""
    if model_class is None:
        return "the model's class is none of transformers'"
    if "logits_to_keep" in inspect.signature(model_class.forward).parameters:
        return None  # its head takes hidden states of any positions
    return f"{model_class.__name__} takes no logits_to_keep, its logits are of all positions"


def uses_triton(device: torch.device) -> bool:
    """Whether TRL's Triton kernel computes log-probabilities on a device, in one pass over logits of any precision."""
    return device.type == "cuda" and is_triton_available()


def add_label_logits(model: PreTrainedModel, select: Select | None = None, score: Score | None = None) -> None:
    """Have a model that TRL has given a fused head keep the logits of labels, wherever a backward pass will follow.

    The model's own forward pass computes them, with its scale and its caps, from hidden states that are selected before
    the head; under ZeRO-3 the head is called as ever. Without gradients, as in an evaluation, nothing is computed twice
    and the loss in chunks stays. `select` and `score` are for a run on fake tensors, which have no values.
    """
    chunked_forward, select, score = model.forward, select or _numbers, score or _score

    @functools.wraps(chunked_forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or not torch.is_grad_enabled():
            return chunked_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput

        targets = take_targets(kwargs)
        mask = targets != -100
        selected = select(mask)
        with _only(self.get_output_embeddings(), selected):
            outputs = chunked_forward(*args, **kwargs)
        logits, targets = outputs.logits, targets.flatten()[selected]
        if logits.shape[:-1] != targets.shape:
            raise UserError(f"--loss logits: {type(self).__name__} does not call its head; give --loss chunked.")
        log_probs, entropy = score(logits, targets)
        aux_loss = getattr(outputs, "aux_loss", None)
        loss = -log_probs.sum() / mask.sum().clamp(min=1)
        if aux_loss is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss

        def spread(values: torch.Tensor) -> torch.Tensor:  # connected to the model even where nothing has a label
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return FusedCausalLMOutput(
            loss=loss,
            log_probs=spread(log_probs),
            entropy=spread(entropy),
            is_top1=spread(logits.detach().argmax(-1) == targets),
            label_mask=mask,
            aux_loss=aux_loss,
        )

    model.forward = types.MethodType(forward, model)


def take_targets(kwargs: dict[str, Any]) -> torch.Tensor:
    """Take the labels out of a model's arguments: the token to predict at each position, -100 for none."""
    kwargs.pop("num_items_in_batch", None)  # TRL's trainer divides
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    return pad(labels[:, 1:], (0, 1), value=-100) if shifted is None else shifted


@contextlib.contextmanager
def _only(head: torch.nn.Module, selected: torch.Tensor) -> Iterator[None]:
    """Give a head the hidden states of some positions alone: [rows, tokens, size] become [positions, size]."""
    hook = head.register_forward_pre_hook(
        lambda module, inputs: (inputs[0].flatten(0, 1).index_select(0, selected), *inputs[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def _numbers(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().squeeze(1)


def _score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    if uses_triton(logits.device):
        scores = selective_log_softmax_and_entropy(logits[None], targets[None], entropy_requires_grad=False)
        return scores[0][0], scores[1][0]
    # TRL computes in the precision of the logits; and in one go for each index of the first dimension.
    logits = logits.float()
    log_probs = selective_log_softmax(logits[None], targets[None])[0]
    return log_probs, _entropies(
        logits.detach(), logits.detach().gather(1, targets[:, None]) - log_probs.detach()[:, None]
    )


def _entropies(logits: torch.Tensor, log_sums: torch.Tensor) -> torch.Tensor:
    """The entropy of each row of logits [labels, words], of whose exponentials `log_sums` [labels, 1] has log-sums.

    By rows that a CPU's cache holds: copies of all logits take TRL six times as long as the log-probabilities. In few
    parts, since a plan traces each.
    """
    rows = max(1, _IN_CACHE // logits.shape[1], len(logits) // 64)
    parts = zip(logits.split(rows), log_sums.split(rows), strict=True)
    return torch.cat([log_sum[:, 0] - torch.linalg.vecdot((part - log_sum).exp_(), part) for part, log_sum in parts])
