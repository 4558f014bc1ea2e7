"""Which attention implementation a run uses, and why."""

import importlib.util

import torch


def choose_attention(requested: str | None, half_precision: bool) -> tuple[str, str]:
    """The `attn_implementation` for transformers and the reason for it, in a few words.

    What the user asked for is taken as it is. Otherwise flash-attn where it is importable and can run (an Ampere GPU or
    newer, weights in bf16 or fp16: `half_precision`), else torch's own SDPA.
    """
    if requested is not None:
        return requested, "as asked for"
    if not torch.cuda.is_available():
        return "sdpa", "no CUDA device"
    if importlib.util.find_spec("flash_attn") is None:
        return "sdpa", "flash-attn is not installed"
    if not half_precision:
        return "sdpa", "flash-attn needs bf16 or fp16"
    if torch.cuda.get_device_capability() < (8, 0):
        return "sdpa", "flash-attn needs an Ampere GPU or newer"
    return "flash_attention_2", "flash-attn is installed"
