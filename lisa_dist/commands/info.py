"""What is installed here, and what a run would use of it: `lisa-dist info`."""

import os
import platform
import shutil
from importlib.util import find_spec

import torch
from transformers import PretrainedConfig

from lisa_dist.commands import exit_on_error
from lisa_dist.distributed.devices import why_no_gpu
from lisa_dist.distributed.health import version_of
from lisa_dist.optim.ops import choose_kernels
from lisa_dist.text import format_bytes, format_table
from lisa_dist.train.attention import choose_attention

_NEEDED = ("torch", "deepspeed", "transformers", "accelerate", "trl", "datasets", "bitsandbytes", "peft")
_OPTIONAL = ("triton", "flash-attn", "flash-attn-3", "liger-kernel")
# What a run may lack: a module or a program, what for, where from, and whether only a GPU has a use for it.
_WORTH_HAVING = (
    ("flash_attn", "attention of packed rows at full speed", "pip install flash-attn --no-build-isolation", True),
    ("liger_kernel", "fewer passes over activations; --loss liger", "pip install 'lisa_dist[gpu]'", True),
    ("triton", "fused steps of --optim lisa_adamw", "pip install triton (a CUDA torch brings it)", True),
    ("ninja", "building DeepSpeed's operators", "pip install ninja, and its folder on PATH", False),
    ("c++", "building DeepSpeed's operators", "apt install g++", False),
    ("pdsh", "deepspeed --hostfile on several hosts", "apt install pdsh", False),
    ("wandb", "--report_to wandb", "pip install wandb", False),
    ("lm_eval", "lisa-dist eval of mmlu, gsm8k, ...", "pip install 'lisa_dist[eval]'", False),
)


def describe() -> str:
    """Device, versions, a run's kernels and attention with the reasons, what is missing. UserError: forced kernels."""
    on_gpu = torch.cuda.is_available()
    kernels, why = choose_kernels("cuda" if on_gpu else "cpu")
    config = PretrainedConfig()
    if on_gpu:  # without one it is SDPA's for any model, and a Llama's configuration takes half a second to import
        from transformers import LlamaConfig

        config = LlamaConfig()
    attention, why_attention = choose_attention(None, half_precision=True, config=config)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count() if on_gpu else 0)]
    of_gpus = ", ".join(f"{gpu.name} ({format_bytes(gpu.total_memory)})" for gpu in gpus)
    rows = [
        ("lisa_dist", version_of("lisa_dist")),
        ("Python", platform.python_version()),
        ("devices", of_gpus if on_gpu else f"{os.cpu_count()} CPU cores"),
        *([("missing: GPU", no_gpu)] if (no_gpu := why_no_gpu()) else []),
        *((name, version_of(name)) for name in (*_NEEDED, *_OPTIONAL)),
        ("kernels of lisa_adamw", f"{kernels} ({why})"),
        ("attention of a Llama", f"{attention} ({why_attention})"),
    ]
    lacking = [
        (f"missing: {name.replace('_', '-')}", f"for {what_for}; {how}")
        for name, what_for, how, gpu_only in _WORTH_HAVING
        if (on_gpu or not gpu_only) and shutil.which(name) is None and find_spec(name) is None
    ]
    return format_table([*rows, *(lacking or [("missing", "nothing that a run could use")])])


def main() -> None:
    """Print the table."""
    with exit_on_error("lisa-dist info"):
        print(describe())
