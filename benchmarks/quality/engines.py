"""The engines of quality.py and pareto.py: each method on a real model, with as many layers as it is to have."""

import argparse
import dataclasses

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lisa_dist
from benchmarks.common.methods import FUSED, INTERVAL, METHODS, Method
from benchmarks.common.runs import adapted, plain_engine
from benchmarks.quality.training import LENGTH
from lisa_dist.config_rules import AUTO_LAYERS
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.memory.planner import Planner
from lisa_dist.memory.workload import OWN, MemoryParts
from lisa_dist.run.cpu_bf16 import cpu_multiplies_bf16, multiply_in_fp32


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
    lisa_config = lisa_dist.LisaConfig.plain(
        **{name: value for name, value in settings.items() if name != "lisa_master"}
    )
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


def build(
    arguments: argparse.Namespace, name: str, lr: float, seed: int, interval: int | None = None, bf16: bool = False
):
    """An engine of a method, and LISA's controller if it has one; with periods of `interval` steps, if given."""
    method, settings = METHODS[name], dict(METHODS[name].settings)
    dtype = torch.bfloat16 if arguments.gpu or method.bf16 or bf16 else torch.float32
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
        config = lisa_dist.LisaConfig.plain(lisa_seed=seed, **settings)
        return lisa_dist.initialize(model, "zero2", config, lr=lr, micro_batch_size=arguments.rows, optim=optim)
    torch.manual_seed(seed)
    model = adapted(model, method) if method.kind == "lora" else model
    return plain_engine(model, "zero2", optim=optim, lr=lr, weight_decay=0.0, rows=arguments.rows), None
