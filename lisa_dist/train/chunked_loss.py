"""TRL's loss in chunks: by Triton on a GPU, and by torch where Triton cannot compile.

TRL takes Triton wherever it can be imported; without a C compiler its first step would end in a traceback.
"""

import torch
from trl.kernels import chunked_logprob

from lisa_dist.optim.ops import why_no_compiler


def choose_loss_kernels() -> str | None:
    """Have TRL compute its loss in torch where Triton cannot compile; why, for the header, or None."""
    if not torch.cuda.is_available() or not (missing := why_no_compiler()):
        return None
    assert hasattr(chunked_logprob, "_TRITON_AVAILABLE"), "TRL has renamed what turns its kernels off"
    chunked_logprob._TRITON_AVAILABLE = False
    return f"torch, slower than Triton ({missing})"
