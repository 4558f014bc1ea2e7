"""Liger's Triton kernels (`--use_liger_kernel`) under LISA: what cannot work is refused at the start of a run.

The Trainer patches the model when training begins: `forward` of its norms and MLPs, of the model itself for the loss
fused with the head, and names in its modeling module, such as that of the rotary embedding. Under ZeRO-3 the fused loss
reads the head's weight within the model's forward, where DeepSpeed gathers it.
"""

import copy
import importlib.util
import inspect
import os
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel

from lisa_dist.config import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.loss.label_logits import compute_where_trained
from lisa_dist.optim.ops import why_no_compiler

FUSED_LOSS = "fused_linear_cross_entropy"


def check_liger(
    args: TrainingArguments, model_config: PretrainedConfig, lisa_config: LisaConfig, trl_head: bool = False
) -> str:
    """What Liger will replace in the model, as a line to print. Raises UserError for what cannot work.

    Where the fused loss cannot work it is turned off in `args.liger_kernel_config`, unless it was asked for.
    `trl_head`: the trainer is one of TRL's, with a fused head of its own.
    """
    kernels = dict(args.liger_kernel_config or {})
    setting = f"liger_kernel_config {kernels}"  # in a recipe or in code: the command line takes no dict
    if (missing := why_no_liger(model_config.model_type)) is not None:
        raise UserError(f"--use_liger_kernel True: {missing}; leave it out.")
    parameters = _patch_parameters(model_config.model_type)
    unknown = [name for name, wanted in kernels.items() if wanted and name not in parameters]
    if unknown:
        raise UserError(
            f"{setting}: there is no {unknown[0]} for {model_config.model_type}; choose from {', '.join(parameters)}."
        )
    activation = getattr(model_config.get_text_config(), "hidden_act", "silu")
    if "swiglu" in parameters and kernels.get("swiglu", True) and activation not in ("silu", "swish"):
        raise UserError(
            f"--use_liger_kernel True: its MLP computes silu, and the model's hidden_act is {activation}; write "
            "liger_kernel_config: {swiglu: false} in the recipe."
        )
    why = _why_no_fused_loss(args, kernels, lisa_config, trl_head)
    if why is not None and kernels.get(FUSED_LOSS):
        raise UserError(f"{setting}: no {FUSED_LOSS} here, since {why}; leave it out.")
    turned_off = why is not None and FUSED_LOSS in parameters
    if turned_off:
        kernels[FUSED_LOSS] = False
        args.liger_kernel_config = kernels
    on = [name for name, default in parameters.items() if kernels.get(name, default)]
    return f"Liger kernels: {', '.join(on) or 'none'}" + (f" ({FUSED_LOSS} is off, since {why})" if turned_off else "")


def settle_liger(training: TrainingArguments, model_config: PretrainedConfig, lisa_config: LisaConfig) -> None:
    """Take Liger's kernels on a GPU where nobody has said whether; not its fused loss, since TRL has its own."""
    if training.use_liger_kernel is None:
        training.use_liger_kernel = torch.cuda.is_available() and not training.torch_compile
        if training.use_liger_kernel:
            try:
                check_liger(copy.copy(training), model_config, lisa_config, trl_head=True)
            except UserError:
                training.use_liger_kernel = False
    if training.use_liger_kernel:
        training.liger_kernel_config = {FUSED_LOSS: False} | (training.liger_kernel_config or {})


def why_no_liger(model_type: str) -> str | None:
    """Why Liger has no kernels that run here for a type of model, or None."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "Liger's Triton kernels need a CUDA device"
    if torch.cuda.is_available() and (missing := why_no_compiler()):
        return missing
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'lisa_dist[gpu]')"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:  # a release for another transformers, or no triton
        return f"liger-kernel cannot be imported ({error}): pip install -U 'lisa_dist[gpu]'"
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # the Trainer would train without a word and without Liger
        return f"liger-kernel has no kernels for model type {model_type}"
    return None


def _patch_parameters(model_type: str) -> dict[str, bool]:
    """The kernels that Liger has for a type of model, and whether each is on by default."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    signature = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[model_type])
    return {name: value.default for name, value in signature.parameters.items() if isinstance(value.default, bool)}


def why_no_liger_loss(args: Any, model_config: PretrainedConfig, lisa_config: LisaConfig) -> str | None:
    """Why TRL's trainer, with its SFTConfig, cannot have Liger's loss fused with the head, or None."""
    if (missing := why_no_liger(model_config.model_type)) is not None:
        return missing
    if FUSED_LOSS not in _patch_parameters(model_config.model_type):
        return f"liger-kernel has no {FUSED_LOSS} for model type {model_config.model_type}"
    if args.loss_type != "nll":
        return f"--loss_type {args.loss_type} needs the loss of each token"
    if hasattr(model_config.get_text_config(), "output_router_logits"):
        return "it would count the loss of the model's routers twice"
    return _why_no_fused_loss(args, {}, lisa_config, trl_head=False)


def add_liger_loss(model: PreTrainedModel) -> None:
    """Have Liger compute the loss of a model that TRL has given a fused head, wherever a backward pass will follow.

    Its gradients are computed with it, chunk by chunk of the logits, once. It has no entropies: they are NaN.
    """
    chunked_forward = model.forward
    apply_liger_kernel(model, dict.fromkeys(_patch_parameters(model.config.model_type), False) | {FUSED_LOSS: True})
    liger_forward: Any = model.forward
    assert liger_forward != chunked_forward, "Liger has replaced something else"

    def compute(targets: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        how = {"num_items_in_batch": 1, "accum_dtype": torch.float32, "return_predicted_tokens": True}
        outputs = liger_forward(*args, shift_labels=targets, skip_logits=True, **how, **kwargs)
        mask = targets != -100
        return {
            "loss": outputs.loss / mask.sum().clamp(min=1),
            "log_probs": -outputs.loss[None],  # their sum, which is all that TRL takes of them
            "entropy": torch.full_like(outputs.loss.detach()[None], torch.nan),
            "is_top1": (outputs.predicted_tokens.view_as(mask) == targets) & mask,
            "label_mask": mask,
        }

    compute_where_trained(model, chunked_forward, compute, of="liger_loss")


def _why_no_fused_loss(
    args: TrainingArguments, kernels: dict[str, bool], config: LisaConfig, trl_head: bool
) -> str | None:
    if trl_head:
        return "TRL's own fused head takes its place"
    if kernels.get("cross_entropy"):
        return "cross_entropy takes its place"
    if args.label_smoothing_factor:  # evaluation would ask it for a loss without labels
        return "label smoothing needs logits"
    alone = "head" in config.sampled or ("head" in config.always_on and config.lisa_activated_layers == 0)
    if alone and not {"embed", "rest"} & set(config.always_on):
        # It computes gradients at all only where the hidden states need one, which nothing below the head then does.
        return "it has no gradient for a head that trains alone, which --lisa_always_on rest would prevent"
    return None
