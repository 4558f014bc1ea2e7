"""A model of shapes alone, for what depends on its modules before it is loaded."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import deepspeed as hf_deepspeed

from lisa_dist.errors import UserError
from lisa_dist.patches import patched
from lisa_dist.text import in_one_line


def without_zero3_init() -> AbstractContextManager[None]:
    """In a run under ZeRO-3 transformers would partition any model that is built, in collectives with all ranks."""
    return patched(hf_deepspeed, "_hf_deepspeed_config_weak_ref", None, of="zero3_init")


def model_without_weights(config: PretrainedConfig) -> Any:
    """A causal model on the meta device. Raises UserError where its code, which may be anyone's, cannot build it."""
    try:
        with without_zero3_init(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
        named = f"{type(config).__name__}: this model cannot be built"
        raise UserError(f"{named} ({type(error).__name__}: {in_one_line(error)}).") from error
