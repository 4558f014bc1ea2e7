"""DeepSpeed ZeRO-2 with overlap_comm: a gradient is reduced from memory that has been given out again.

    deepspeed --num_gpus 3 docs/upstream/overlap_comm_race.py

The gradient of `large` is larger than reduce_bucket_size, so `average_tensor` reduces it where it is, on the reduction
stream: `tensor.div_()`, then `flatten` of its slices, which copies them. `record_stream` is called on the copy and on
the slices that this rank keeps. Rank 0 keeps none: `reduce_ipg_grads` calls `clear_grad_attribute` at once, and the
allocator gives the memory to the default stream, whose backward pass writes the gradient of `first` there before the
reduction stream has read it. Expected: the same weights with and without overlap_comm.

`_record_gradient_stream(tensor, stream)`, which `average_tensor` calls first, is what is missing: it does something
under optimizer offload alone (`_offload_gradient_safety_enabled`). With `overlap_comm` it is to record always.
"""

import argparse

import deepspeed
import torch
from torch import nn

WIDTH = 1024
DELAY = 1 << 28  # cycles, about 0.15 s: work of other ranks or kernels before it


def step(overlap_comm: bool) -> torch.Tensor:
    """The weights of `large` after a step of SGD."""
    torch.manual_seed(0)
    first, second, large = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
    model = nn.Sequential(first, second, large)
    for layer in model:
        layer.bias = None  # so ranks keep, of six squares of WIDTH: `first` and `second`; half of `large`; the other
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": overlap_comm, "reduce_bucket_size": 3 * WIDTH**2},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    zero = engine.optimizer
    if overlap_comm:  # `average_tensor` calls this first on its stream, behind the waits, where it does nothing so far

        def reduce_late(tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
            if stream == zero.reduction_stream:
                torch.cuda._sleep(DELAY)

        zero._record_gradient_stream = reduce_late
    inputs = torch.randn(8, WIDTH, device=engine.device, dtype=torch.bfloat16)
    engine.backward(engine(inputs).float().pow(2).mean())
    engine.step()
    return large.weight.detach().float()


def main() -> None:
    deepspeed.init_distributed()
    plain, overlapped = step(overlap_comm=False), step(overlap_comm=True)
    if torch.distributed.get_rank() == 0:
        print("largest difference of a weight:", (plain - overlapped).abs().max().item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.parse_args()
    main()
