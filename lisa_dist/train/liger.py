"""Liger's Triton kernels (`--use_liger_kernel`) under LISA: what cannot work is refused at the start of a run.

The Trainer patches the model when training begins: `forward` of its norms and MLPs, of the model itself for the loss
fused with the head, and names in its modeling module, such as that of the rotary embedding. No kernel computes the
gradient of a frozen weight. Under ZeRO-3 a norm reads its weight within its own forward; the fused loss reads the
head's within the model's, where DeepSpeed gathers it.
"""

import importlib.util
import inspect
import os

import torch
from transformers import PretrainedConfig, TrainingArguments

from lisa_dist.config import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.optim.ops import why_no_compiler

FUSED_LOSS = "fused_linear_cross_entropy"


def check_liger(
    args: TrainingArguments, model_config: PretrainedConfig, lisa_config: LisaConfig, trl_head: bool = False
) -> str:
    """What Liger will replace in the model, as a line to print.

    Where the fused loss cannot work it is turned off in `args.liger_kernel_config`, unless it was asked for.
    `trl_head`: the trainer is one of TRL's, with a fused head of its own. Raises ValueError for what cannot work: no
    CUDA device (Triton's interpreter will do), no liger-kernel, a model that it does not know, a kernel that it does
    not have for that model, an activation that its MLP does not compute.
    """
    kernels = dict(args.liger_kernel_config or {})
    setting = f"liger_kernel_config {kernels}"  # in a recipe or in code: the command line takes no dict
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


def _patch_parameters(model_type: str) -> dict[str, bool]:
    """The kernels that Liger has for a type of model, and whether each is on by default."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("--use_liger_kernel True: its Triton kernels need a CUDA device; leave it out.")
    if torch.cuda.is_available() and (missing := why_no_compiler()):
        raise UserError(f"--use_liger_kernel True: {missing}, or leave the flag out.")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "--use_liger_kernel True: liger-kernel is not installed; pip install 'lisa_dist[gpu]', or leave it out."
        )
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:  # a release for another transformers, or no triton
        raise UserError(
            f"--use_liger_kernel True: liger-kernel cannot be imported ({error}); pip install -U 'lisa_dist[gpu]'."
        ) from error
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # the Trainer would train without a word and without Liger
        raise UserError(
            f"--use_liger_kernel True: liger-kernel has no kernels for model type {model_type}; leave it out."
        )
    signature = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[model_type])
    return {name: value.default for name, value in signature.parameters.items() if isinstance(value.default, bool)}


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
