"""What is installed here, and what a run would use of it: `lisa-dist info`."""

import platform

import torch
from transformers import LlamaConfig

from lisa_dist.attention import choose_attention
from lisa_dist.backend import choose_kernels
from lisa_dist.config import UserError
from lisa_dist.health import version_of
from lisa_dist.metrics import format_table

_NEEDED = ("torch", "deepspeed", "transformers", "accelerate", "trl", "datasets", "bitsandbytes", "peft")
_OPTIONAL = ("triton", "flash-attn", "flash-attn-3", "liger-kernel")


def describe() -> str:
    """A table: device, versions, and the kernels and attention that a run in bf16 would have, each with the reason.

    Raises ValueError where an environment variable forces kernels that cannot run.
    """
    on_gpu = torch.cuda.is_available()
    kernels, why = choose_kernels("cuda" if on_gpu else "cpu")
    attention, why_attention = choose_attention(None, half_precision=True, config=LlamaConfig())
    rows = [
        ("lisa_dist", version_of("lisa_dist")),
        ("Python", platform.python_version()),
        ("device", torch.cuda.get_device_name() if on_gpu else "CPU"),
        *((name, version_of(name)) for name in (*_NEEDED, *_OPTIONAL)),
        ("kernels of lisa_adamw", f"{kernels} ({why})"),
        ("attention of a Llama", f"{attention} ({why_attention})"),
    ]
    return format_table(rows)


def main() -> None:
    """Print it; an error of the user's is one line and exit status 2."""
    try:
        print(describe())
    except UserError as error:
        print(f"lisa-dist info: {error}", flush=True)
        raise SystemExit(2) from error
