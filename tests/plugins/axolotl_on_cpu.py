"""Axolotl's `train` on CPU ranks, which it is not for: they meet by gloo, and no model is put on a numbered device."""

import runpy
import sys

import deepspeed.comm
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, TrainingArguments

load = PreTrainedModel.from_pretrained.__func__
meet = deepspeed.comm.init_distributed
forget = AcceleratorState._reset_state
finish = TrainingArguments.__post_init__


def on_cpu(arguments: TrainingArguments) -> None:
    arguments.use_cpu = True
    finish(arguments)


def forget_and_meet(reset_partial_state: bool = False) -> None:
    forget(reset_partial_state)
    if reset_partial_state:
        PartialState(cpu=True, backend="gloo")


PreTrainedModel.from_pretrained = classmethod(lambda cls, *args, device_map=None, **kwargs: load(cls, *args, **kwargs))
deepspeed.comm.init_distributed = lambda dist_backend=None, **kwargs: meet(dist_backend="gloo", **kwargs)
AcceleratorState._reset_state = staticmethod(forget_and_meet)
TrainingArguments.__post_init__ = on_cpu
torch.cuda.can_device_access_peer = lambda *_: True  # which it asks, and a torch that is for CUDA looks for a driver

if __name__ == "__main__":  # and not in the processes that tokenize
    sys.argv[0] = "axolotl"
    runpy.run_module("axolotl.cli.train", run_name="__main__")
