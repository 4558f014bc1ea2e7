"""torch's CUDA allocator, for which CUDA need not have begun, nor torch be imported."""

import os
import sys

# Any of them is the user's word. torch 2.9.1 ignores the second, and on ROCm the first would outdo the third.
_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_GROWING = "expandable_segments:True"


def use_expandable_segments() -> None:
    """Have the allocator grow its segments, in this process and those that it starts, unless the user has set it.

    A switch frees partitions and allocates others of other sizes, which would leave gaps in segments of fixed sizes.
    An allocator reads the variable once, when CUDA begins; the segments that it has made by then stay as they are.
    """
    if any(name in os.environ for name in _SETTINGS):
        return
    os.environ[_SETTINGS[0]] = _GROWING
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # which torch 2.9 has not
        (change or torch.cuda.memory._set_allocator_settings)(_GROWING)
