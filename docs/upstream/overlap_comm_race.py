"""ZeRO-2 with overlap_comm: are weights the same as without? deepspeed --num_gpus 3 overlap_comm_race.py"""

import argparse

import deepspeed
import torch
from torch import nn

WIDTH = 1024
DELAY = 1 << 28  # cycles, about 0.15 s: work of other ranks or kernels before it


def step(overlap_comm: bool) -> torch.Tensor:
    torch.manual_seed(0)
    sizes = [(WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]  # rank 0 keeps nothing of the last one's gradient
    model = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes))
    zero_config = {"stage": 2, "overlap_comm": overlap_comm, "reduce_bucket_size": 3 * WIDTH**2}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    config |= {"bf16": {"enabled": True}, "zero_optimization": zero_config}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    zero = engine.optimizer
    if overlap_comm:  # `average_tensor` calls this first on its stream, behind the waits, where it does nothing so far
        zero._record_gradient_stream = lambda _, on: on == zero.reduction_stream and torch.cuda._sleep(DELAY)
    engine.backward(engine(torch.randn(8, WIDTH, device=engine.device, dtype=torch.bfloat16)).float().pow(2).mean())
    engine.step()
    return model[2].weight.detach().float()


def main() -> None:
    deepspeed.init_distributed()
    print("largest difference of a weight:", (step(False) - step(True)).abs().max().item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.parse_args()
    main()
