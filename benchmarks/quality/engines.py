"""The engines of quality.py and pareto.py: each method on a real model, with as many layers as it is to have."""

import argparse
import dataclasses

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig, AutoModelForCausalLM

import lisa_dist
from benchmarks.common.methods import FUSED, INTERVAL, METHODS, Method
from benchmarks.common.runs import adapted, plain_engine
from benchmarks.quality.examples import LENGTH
from lisa_dist.config_rules import AUTO_LAYERS
from lisa_dist.memory.parts import MemoryParts
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.memory.planner import Planner
from lisa_dist.memory.workload import OWN
from lisa_dist.train.cpu_bf16 import cpu_multiplies_bf16, multiply_in_fp32


def optim_of(arguments: argparse.Namespace, method: Method) -> str:
    """In the place of the fused AdamW torch's other one; not on a GPU, where its temporaries are as large as states."""
    return "adamw_torch" if method.optim == FUSED and not arguments.gpu else method.optim


def planned(arguments: argparse.Namespace, settings: dict, **changes) -> MemoryParts:
    """The plan of a run's step, or with `changes` that of another method."""
    asked = PlanArguments(
        arguments.model,
        reserve="0",
        seq_length=LENGTH,
        micro_batch_size=arguments.rows,
        precision="bf16" if arguments.gpu else "fp32",
        optim="lisa_adamw",
        checkpointed_layers="none",
    )
    # The number of layers is that of weights in fp32, which are their own masters, for a fair comparison.
    lisa_config = lisa_dist.LisaConfig(**{name: value for name, value in settings.items() if name != "lisa_master"})
    config = AutoConfig.from_pretrained(arguments.model)
    planner = Planner(config, dataclasses.replace(asked, **changes), lisa_config, on_cpu=not arguments.gpu)
    return planner.plan("zero2", 0, OWN).gpu  # the loss as these runs compute it


def with_memory_of(other: str, arguments: argparse.Namespace, settings: dict, times: float) -> dict:
    """As many layers as two with AdamW's states in 32 bits hold beside activations, or as fit LoRA's peak `times`."""

    def taken(parts: MemoryParts) -> int:
        return parts.peak if is_lora else parts.static + parts.gradients

    is_lora = METHODS[other].kind == "lora"
    lora = {"method": "lora", "optim": optim_of(arguments, METHODS[other])}
    of_other = planned(arguments, {}, **lora) if is_lora else planned(arguments, METHODS[other].settings)
    of_layers = {"lisa_activated_layers": AutoConfig.from_pretrained(arguments.model).num_hidden_layers}
    while taken(planned(arguments, settings | of_layers)) > times * taken(of_other):
        of_layers["lisa_activated_layers"] -= 1
    return settings | of_layers


class PlainEngine:
    """A model and its optimizer by the names of DeepSpeed's engine, for one process: optimizers of whole matrices."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        deepspeed.init_distributed(auto_mpi_discovery=False)
        self.module, self.optimizer, self.device = model.train(), optimizer, model.device
        self.train, self.eval = model.train, model.eval

    def __call__(self, **inputs: torch.Tensor):
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        """Clipped as DeepSpeed's configs of this project clip."""
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def destroy(self) -> None:
        """Nothing is left of it but what others hold."""


def low_rank_optimizer(kind: str, model: torch.nn.Module, settings: dict, lr: float) -> torch.optim.Optimizer:
    """GaLore's or APOLLO's AdamW: projected gradients of the matrices of layers, plain ones of the rest.

    Their packages are installed by hand, `pip install --no-deps galore-torch apollo-torch`; mind APOLLO's licence.
    """
    low_rank = [value for name, value in model.named_parameters() if ".layers." in name and value.ndim == 2]
    ours = set(map(id, low_rank))
    others = [value for value in model.parameters() if id(value) not in ours]
    groups = [{"params": others}, {"params": low_rank} | settings]
    if kind == "galore":
        from galore_torch import GaLoreAdamW

        return GaLoreAdamW(groups, lr=lr, weight_decay=0.0, no_deprecation_warning=True)
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(groups, lr=lr, weight_decay=0.0)


def build(arguments: argparse.Namespace, name: str, lr: float, seed: int, interval: int | None = None):
    """An engine of a method, and LISA's controller if it has one; with periods of `interval` steps, if given."""
    method, settings = METHODS[name], dict(METHODS[name].settings)
    dtype = torch.bfloat16 if arguments.gpu or method.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    num_layers = model.config.num_hidden_layers
    if dtype == torch.bfloat16 and not arguments.gpu and not cpu_multiplies_bf16():
        multiply_in_fp32(model)
    optim = optim_of(arguments, method)
    if method.kind == "lisa":
        settings = (
            {"lisa_interval_steps": INTERVAL} | settings | ({"lisa_interval_steps": interval} if interval else {})
        )
        if settings.get("lisa_budget") == AUTO_LAYERS:
            settings["lisa_budget"] = str(2 / num_layers)
        if settings.get("lisa_activated_layers") == "all":
            settings["lisa_activated_layers"] = num_layers
        if settings.get("lisa_activated_layers") == AUTO_LAYERS:
            settings = with_memory_of(method.memory_of[0], arguments, settings, method.memory_of[1])
        config = lisa_dist.LisaConfig(lisa_seed=seed, **settings)
        return lisa_dist.initialize(model, "zero2", config, lr=lr, micro_batch_size=arguments.rows, optim=optim)
    torch.manual_seed(seed)
    if method.kind in ("galore", "apollo"):
        model = model.to(get_accelerator().current_device_name())
        return PlainEngine(model, low_rank_optimizer(method.kind, model, settings, lr)), None
    model = adapted(model, method) if method.kind == "lora" else model
    return plain_engine(model, "zero2", optim=optim, lr=lr, weight_decay=0.0, rows=arguments.rows), None
