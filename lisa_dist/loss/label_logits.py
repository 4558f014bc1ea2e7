"""The loss from logits of the positions with a label: computed once, and kept for the backward pass.

TRL's loss computes logits in chunks, in the forward pass and once more in the backward pass.
"""

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils import is_triton_available

from lisa_dist.errors import UserError
from lisa_dist.patches import patch

LOSSES = ("auto", "logits", "chunked", "liger")
_IN_CACHE = 1 << 17  # elements in fp32
# Logits [labels, vocabulary] and targets [labels] to the targets' log-probabilities and entropies, in fp32.
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
    the head; under ZeRO-3 the head is called as ever. `select` and `score` are for fake tensors, which have no values.
    """
    chunked_forward, score = model.forward, score or _score
    select = select or (lambda mask: mask.flatten().nonzero().squeeze(1))

    def compute(targets: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        mask = targets != -100
        selected = select(mask)

        def keep_selected(head: torch.nn.Module, inputs: Any) -> Any:  # [rows, tokens, size] to [positions, size]
            return inputs[0].flatten(0, 1).index_select(0, selected), *inputs[1:]

        with model.get_output_embeddings().register_forward_pre_hook(keep_selected):
            outputs = chunked_forward(*args, **kwargs)
        logits, targets = outputs.logits, targets.flatten()[selected]
        if logits.shape[:-1] != targets.shape:
            raise UserError(f"--loss logits: {type(model).__name__} does not call its head; give --loss chunked.")
        log_probs, entropy = score(logits, targets)
        aux_loss = getattr(outputs, "aux_loss", None)
        loss = -log_probs.sum() / mask.sum().clamp(min=1)
        if aux_loss is not None:
            loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss

        def spread(values: torch.Tensor) -> torch.Tensor:  # connected to the model even where nothing has a label
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return {
            "loss": loss,
            "log_probs": spread(log_probs),
            "entropy": spread(entropy),
            "is_top1": spread(logits.detach().argmax(-1) == targets),
            "label_mask": mask,
            "aux_loss": aux_loss,
        }

    compute_where_trained(model, chunked_forward, compute, of="label_logits")


def compute_where_trained(
    model: PreTrainedModel, chunked_forward: Callable[..., Any], compute: Callable[..., dict[str, Any]], of: str
) -> None:
    """Have `compute(targets, ...)` give the fields of a fused head's output wherever a backward pass will follow.

    `targets` are the token to predict at each position, -100 for none. Without gradients, as in an evaluation, nothing
    is computed twice and the loss in chunks stays.
    """

    @functools.wraps(chunked_forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or not torch.is_grad_enabled():
            return chunked_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput

        kwargs.pop("num_items_in_batch", None)  # TRL's trainer divides
        labels, targets = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        targets = pad(labels[:, 1:], (0, 1), value=-100) if targets is None else targets
        return FusedCausalLMOutput(**compute(targets, *args, **kwargs))

    patch(model, "forward", types.MethodType(forward, model), of=of)


def _score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    if uses_triton(logits.device):
        log_probs, entropies = selective_log_softmax_and_entropy(
            logits[None], targets[None], entropy_requires_grad=False
        )
        return log_probs[0], entropies[0]
    scores: tuple[torch.Tensor, torch.Tensor] = _ScoresByRows.apply(logits, targets)
    return scores


class _ScoresByRows(torch.autograd.Function):
    """TRL's log-probabilities and gradients, to the bit, and entropies, by rows of fp32 that a CPU's cache holds.

    TRL goes through all logits ten times, and makes five tensors of their size. In few parts: a plan traces each.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_sums, entropies = [], []
        for cut in _cuts(logits):
            part = logits[cut].float()
            largest = part.amax(-1, keepdim=True)
            weights = (part - largest).exp_()
            total = weights.sum(-1, keepdim=True)
            log_sums.append(total.log() + largest)
            entropies.append(log_sums[-1][:, 0] - torch.linalg.vecdot(weights, part) / total[:, 0])
        log_sum, entropy = torch.cat(log_sums), torch.cat(entropies)
        ctx.save_for_backward(logits, targets, log_sum)
        ctx.mark_non_differentiable(entropy)
        return (logits.gather(1, targets[:, None]).float() - log_sum)[:, 0], entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits, targets, log_sum), of_targets = ctx.saved_tensors, gradients[0][:, None]
        gradient = torch.empty_like(logits)
        for cut in _cuts(logits):
            part = (logits[cut].float() - log_sum[cut]).exp_().mul_(-of_targets[cut])
            gradient[cut] = part.scatter_add_(1, targets[cut, None], of_targets[cut])
        return gradient, None


def _cuts(logits: torch.Tensor) -> list[slice]:
    """Parts that a cache holds, of two rows at least: the sum of a single one torch splits over its threads."""
    count = max(1, min(64, len(logits) // 2, logits.numel() // _IN_CACHE))
    return [slice(*cut) for cut in itertools.pairwise(len(logits) * part // count for part in range(count + 1))]
