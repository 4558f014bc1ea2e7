"""Gradients that ZeRO makes at construction: DS_ACCELERATOR=cpu torchrun zero_gradients.py"""

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Zeros(TorchDispatchMode):
    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        self.nbytes += made.nbytes if function._schema.name == "aten::zeros" else 0
        return made


def watch(zero_class: type) -> None:
    original = zero_class.initialize_optimizer_states

    def initialize(zero) -> None:
        with Zeros() as zeros:
            original(zero)
        masters = [master for group in zero.optimizer.param_groups for master in group["params"]]
        left = sum(master.grad is not None for master in masters), len(zero.optimizer.state)
        print(f"{zeros.nbytes / 2**20:.0f} MiB of zeros; afterwards {left[0]} gradients, {left[1]} states", flush=True)

    zero_class.initialize_optimizer_states = initialize


if __name__ == "__main__":
    for stage, zero_class in ((2, DeepSpeedZeroOptimizer), (3, DeepSpeedZeroOptimizer_Stage3)):
        watch(zero_class)
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
        config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
        deepspeed.initialize(model=model, config=config, optimizer=torch.optim.AdamW(model.parameters()))
