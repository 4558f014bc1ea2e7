"""The arms of quality.py: what trains, by which optimizer, and the engine of each."""

import argparse
import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import lisa_dist
from benchmarks.cost import peers
from benchmarks.quality.examples import LENGTH
from benchmarks.quality.training import Batch
from lisa_dist.config import AUTO_INTERVAL
from lisa_dist.config_rules import AUTO_LAYERS
from lisa_dist.core.sampling import sample_period
from lisa_dist.memory.parts import MemoryParts
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.memory.planner import Planner
from lisa_dist.memory.workload import OWN
from lisa_dist.run.cpu_bf16 import cpu_multiplies_bf16, multiply_in_fp32

INTERVAL = 20  # K
ALL_LAYERS = "all"
LISA, EMBED_AND_HEAD = {"lisa_activated_layers": 2}, {"lisa_activated_layers": 0}
FROZEN = {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}
WEIGHTED = {"lisa_sampler": "weighted"}  # and "weights", of a layer by its number from 0
BADAM = {"lisa_always_on": "", "lisa_frozen": "embed,head,rest", "lisa_activated_layers": 1}
ONE_PASS, BF16 = {"optim": "lisa_adamw"}, {"dtype": torch.bfloat16}
EVERY_LAYER = {"lisa_activated_layers": ALL_LAYERS, "lisa_sampler": "fixed"}
FACTORED = {"lisa_state_bits": "embed=factored,head=factored"}
SMALL = {"lisa_state_bits": "embed=factored,head=factored,layers=8"}
LAYERS_8 = {"lisa_state_bits": "layers=8"}
BALANCED, WINDOW = {"lisa_sampler": "balanced"}, {"lisa_sampler": "window"}
DEEP = BALANCED | {"lisa_depth_bias": 8.0}
UPPER = BALANCED | {"lisa_depth_bias": 16.0}
MODULES = {"lisa_unit": "module", "lisa_budget": AUTO_LAYERS}
OF_14 = {"lisa_activated_layers": 14} | FROZEN | ONE_PASS
OF_EIGHT = {"lisa_unit": "module", "lisa_budget": str(8 / 30)}  # of SmolLM2's 30 layers
OF_FOURTEEN = OF_EIGHT | {"lisa_budget": str(14 / 30)}
PROBED = BALANCED | {"lisa_probe_steps": 10}
SHARP = {"lisa_importance_temperature": 0.5, "lisa_importance_floor": 0.0}
# As their packages have them; what is no matrix of a layer steps by plain AdamW.
GALORE = {"rank": 16, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
APOLLO = {
    "rank": 16,
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "std",
    "proj": "random",
    "scale_type": "channel",
}
IN_LORA_S = {"lisa_activated_layers": AUTO_LAYERS, "memory_of": "lora"} | ONE_PASS | SMALL
# Name: method, its settings, and the middle of its learning rates in units of --rate.
ARMS = {
    "full": ("full", {}, 1),
    "full one pass": ("lisa", EVERY_LAYER | ONE_PASS, 1),
    "lora r8": ("lora", {"r": 8}, 2),
    "lora r16": ("lora", {"r": 16}, 1),
    "lora r32": ("lora", {"r": 32}, 1),
    "lora r64": ("lora", {"r": 64}, 1),
    "galore r16": ("galore", GALORE, 4),
    "apollo r16": ("apollo", APOLLO, 1),
    "ms-swift lisa 2": ("ms-swift", LISA, 1),
    "lisa 1": ("lisa", {"lisa_activated_layers": 1}, 1),
    "lisa 1 reshuffle": ("lisa", {"lisa_activated_layers": 1, "lisa_sampler": "reshuffle"}, 1),
    "lisa 1 adaptive": ("lisa", {"lisa_activated_layers": 1, "lisa_sampler": "adaptive"}, 1),
    "lisa 2": ("lisa", LISA, 1),
    "lisa 2 as published": ("lisa", LISA | {"lisa_state": "reset_all"}, 1),
    "lisa 2 reshuffle": ("lisa", LISA | {"lisa_sampler": "reshuffle"}, 1),
    "lisa 2 adaptive": ("lisa", LISA | {"lisa_sampler": "adaptive"}, 1),
    "lisa 2 by update": ("lisa", LISA | {"lisa_sampler": "adaptive", "lisa_importance": "update"}, 1),
    "fixed 2": ("lisa", LISA | {"lisa_sampler": "fixed"}, 1),
    "embed and head": ("lisa", EMBED_AND_HEAD, 4),
    "one block": ("lisa", BADAM | {"lisa_sampler": "reshuffle"}, 1),
    # What may close the gap between LISA and full training.
    "lisa 2 K 5": ("lisa", LISA | {"lisa_interval_steps": 5}, 1),
    "lisa 2 K auto": ("lisa", LISA | {"lisa_interval_steps": AUTO_INTERVAL}, 1),
    "lisa 2 K 50": ("lisa", LISA | {"lisa_interval_steps": 50}, 1),
    "lisa 2 K 100": ("lisa", LISA | {"lisa_interval_steps": 100}, 1),
    "lisa 2 keep": ("lisa", LISA | {"lisa_state": "keep"}, 1),
    "lisa 2 warm-up": ("lisa", LISA | {"lisa_wake_warmup_steps": 10}, 1),
    "lisa 2 sharp": ("lisa", LISA | {"lisa_sampler": "adaptive", "lisa_importance_temperature": 0.2}, 1),
    "lisa 2 keep, warm-up": ("lisa", LISA | {"lisa_state": "keep", "lisa_wake_warmup_steps": 10}, 1),
    "lisa 2 keep, K 5": ("lisa", LISA | {"lisa_state": "keep", "lisa_interval_steps": 5}, 1),
    "lisa 2 keep, K 1": ("lisa", LISA | {"lisa_state": "keep", "lisa_interval_steps": 1}, 1),
    "lisa 2 rate x 1.6": ("lisa", LISA | {"lisa_lr_power": 0.5}, 1),
    "lisa 2 rate / 1.6": ("lisa", LISA | {"lisa_lr_power": -0.5}, 1),
    "lisa 2 upper more": ("lisa", LISA | WEIGHTED | {"weights": lambda layer: layer + 1}, 1),
    "lisa 2 upper most": ("lisa", LISA | WEIGHTED | {"weights": lambda layer: (layer + 1) ** 3}, 1),
    "lisa 2 lower most": ("lisa", LISA | WEIGHTED | {"weights": lambda layer: 1 / (layer + 1) ** 3}, 1),
    # Smaller states and frozen layers; "optim" and "dtype" are the run's.
    "lisa 2 one pass": ("lisa", LISA | ONE_PASS, 1),
    "lisa 2, 8 bits": ("lisa", LISA | ONE_PASS | {"lisa_state_bits": "embed=8,head=8,layers=8"}, 1),
    "lisa 2, factored": ("lisa", LISA | ONE_PASS | FACTORED, 1),
    "lisa 2 bf16": ("lisa", LISA | ONE_PASS | BF16, 1),
    "lisa 2, frozen 8 bits": ("lisa", LISA | ONE_PASS | BF16 | {"lisa_frozen_bits": 8}, 1),
    "lisa 2, frozen 4 bits": ("lisa", LISA | ONE_PASS | BF16 | {"lisa_frozen_bits": 4}, 1),
    "lisa auto": ("lisa", {"lisa_activated_layers": AUTO_LAYERS} | ONE_PASS | SMALL, 1),
    # As many layers as fit in a tenth more than a step of LoRA takes, rank 16, and which of them.
    "lisa in lora's memory": ("lisa", IN_LORA_S, 1),
    "lisa in lora's, upper most": ("lisa", IN_LORA_S | BALANCED | {"lisa_depth_bias": 4.0}, 1),
    "lisa in lora's, probed": ("lisa", IN_LORA_S | PROBED, 1),
    "lisa in lora's, embed frozen": ("lisa", IN_LORA_S | FROZEN | LAYERS_8, 1),
    "lisa in lora's, 32 bits": ("lisa", IN_LORA_S | FACTORED, 1),
    "lisa at lora's peak, embed frozen": ("lisa", IN_LORA_S | FROZEN | LAYERS_8 | {"times": 1.0}, 1),
    "lisa in lora's, no masters": ("lisa", IN_LORA_S | BF16 | {"lisa_master": "bf16_sr"}, 1),
    "lisa 2 balanced": ("lisa", LISA | BALANCED, 1),
    "lisa 2 depth 1": ("lisa", LISA | BALANCED | {"lisa_depth_bias": 1.0}, 1),
    "lisa 2 depth 2": ("lisa", LISA | BALANCED | {"lisa_depth_bias": 2.0}, 1),
    "lisa 2 depth 4": ("lisa", LISA | BALANCED | {"lisa_depth_bias": 4.0}, 1),
    "lisa 2 depth 8": ("lisa", LISA | DEEP, 1),
    "lisa 3 depth 8, factored": ("lisa", {"lisa_activated_layers": 3} | DEEP | ONE_PASS | FACTORED, 1),
    "lisa 2 probed": ("lisa", LISA | PROBED, 1),
    "lisa 2 probed sharp": ("lisa", LISA | PROBED | SHARP, 1),
    "lisa modules": ("lisa", MODULES, 1),  # as many of their parameters as two layers have
    "lisa modules adaptive": ("lisa", MODULES | {"lisa_sampler": "adaptive"}, 1),
    "lisa modules 8, embed frozen": ("lisa", OF_EIGHT | FROZEN, 1),
    "lisa modules 8 fixed, embed frozen": ("lisa", OF_EIGHT | FROZEN | ONE_PASS | {"lisa_sampler": "fixed"}, 1),
    "lisa modules 14 fixed, embed frozen": ("lisa", OF_FOURTEEN | FROZEN | ONE_PASS | {"lisa_sampler": "fixed"}, 1),
    "lisa 2 window": ("lisa", LISA | WINDOW, 1),
    "lisa 2, embed and head / 2": ("lisa", LISA | {"lisa_lr_scale": "embed=0.5,head=0.5"}, 1),
    "lisa 3": ("lisa", {"lisa_activated_layers": 3}, 1),
    "lisa 4": ("lisa", {"lisa_activated_layers": 4}, 1),
    "lisa 4 keep": ("lisa", {"lisa_activated_layers": 4, "lisa_state": "keep"}, 1),
    "lisa 2, embed frozen": ("lisa", LISA | FROZEN, 1),
    "lisa 8, embed frozen": ("lisa", {"lisa_activated_layers": 8} | FROZEN, 1),
    "lisa 14, embed frozen": ("lisa", OF_14, 1),
    "lisa 14 keep, embed frozen": ("lisa", OF_14 | {"lisa_state": "keep"}, 1),
    "lisa 14 K 10, embed frozen": ("lisa", OF_14 | {"lisa_interval_steps": 10}, 1),
    "lisa 14 keep, K 5, embed frozen": ("lisa", OF_14 | {"lisa_state": "keep", "lisa_interval_steps": 5}, 1),
    "lisa 14 fixed, embed frozen": ("lisa", OF_14 | {"lisa_sampler": "fixed"}, 1),
    "lisa 14 balanced, embed frozen": ("lisa", OF_14 | BALANCED, 1),
    "lisa 14 middle, embed frozen": ("lisa", OF_14 | WEIGHTED | {"weights": lambda layer: int(8 <= layer < 22)}, 1),
    "lisa 8 middle, embed frozen": (
        "lisa",
        OF_14 | {"lisa_activated_layers": 8} | WEIGHTED | {"weights": lambda layer: int(11 <= layer < 19)},
        1,
    ),
    "lisa 8": ("lisa", {"lisa_activated_layers": 8}, 1),
    "lisa 14, factored": ("lisa", {"lisa_activated_layers": 14} | ONE_PASS | FACTORED, 1),
    # The backward pass ends early where embeddings are frozen and lower layers seldom train.
    "lisa 8 upper, embed frozen": ("lisa", {"lisa_activated_layers": 8} | FROZEN | UPPER, 1),
    "lisa 8 window, embed frozen": ("lisa", {"lisa_activated_layers": 8} | FROZEN | WINDOW | ONE_PASS, 1),
    "lisa 14 window, embed frozen": ("lisa", {"lisa_activated_layers": 14} | FROZEN | WINDOW | ONE_PASS, 1),
}
# Of the comparison of every method at equal steps, time and memory.
PROTOCOL = (
    "full", "lora r16", "lora r64", "galore r16", "apollo r16", "ms-swift lisa 2", "lisa 2 as published", "lisa 2",
    "lisa in lora's memory", "lisa in lora's, embed frozen", "lisa modules", "lisa modules adaptive", "lisa 2 balanced",
    "lisa 2 depth 4", "lisa 2 window", "lisa 2, embed and head / 2", "lisa 2 warm-up", "lisa 2 K auto",
    "lisa in lora's, upper most", "lisa 8 upper, embed frozen", "lisa 8, embed frozen", "lisa 2 probed",
    "lisa 2 probed sharp", "lisa in lora's, probed",
)  # fmt: skip


def protocol_of(model: str) -> list[str]:
    """The arms of the comparison of every method that a model has enough layers for."""
    num_layers = AutoConfig.from_pretrained(model).num_hidden_layers
    layers = {arm: ARMS[arm][1].get("lisa_activated_layers", 0) for arm in PROTOCOL}
    return [arm for arm, count in layers.items() if isinstance(count, str) or count <= num_layers]


def adamw_of(arguments: argparse.Namespace) -> str:
    """torch's AdamW; on a GPU the fused one, since the other's temporaries are as large as its states."""
    return "adamw_torch_fused" if arguments.gpu else "adamw_torch"


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


def with_memory_of(other: str, arguments: argparse.Namespace, settings: dict, times: float = 1.1) -> dict:
    """As many layers as two with AdamW's states in 32 bits hold beside activations, or as fit LoRA's peak `times`."""

    def taken(parts: MemoryParts) -> int:
        return parts.static + parts.gradients if other == "lisa" else parts.peak

    lora = {"method": other, "optim": adamw_of(arguments)}
    budget = taken(planned(arguments, LISA)) if other == "lisa" else times * taken(planned(arguments, {}, **lora))
    of_layers = {"lisa_activated_layers": AutoConfig.from_pretrained(arguments.model).num_hidden_layers}
    while taken(planned(arguments, settings | of_layers)) > budget:
        of_layers["lisa_activated_layers"] -= 1
    return settings | of_layers


def train_by_swift(
    arguments: argparse.Namespace, arm: str, seed: int, batches: list[Batch], rates: list[float]
) -> tuple:
    """What ms-swift's LISA makes of the model, in the environment that cost/peers.py has for it; layers are ours."""
    gamma = ARMS[arm][1]["lisa_activated_layers"]
    num_layers = AutoConfig.from_pretrained(arguments.model).num_hidden_layers
    periods = range(-(-len(batches) // INTERVAL))
    layers = [list(sample_period("uniform", num_layers, gamma, seed, period).layers) for period in periods]
    work = {"model": str(Path(arguments.model).resolve()), "layers": layers, "interval": INTERVAL}
    python = peers.python_of("ms-swift", peers.ENVIRONMENTS)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(work | {"batches": batches, "rates": rates}, f"{folder}/work.pt")
        command = [str(python), str(Path(__file__).with_name("swift_lisa.py")), folder]
        subprocess.run(command, check=True, env=peers.environment_of(python, Path(folder)))
        found = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    return PlainEngine(model, torch.optim.SGD(model.parameters())), None, found


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


def low_rank_optimizer(method: str, model: torch.nn.Module, settings: dict, lr: float) -> torch.optim.Optimizer:
    """GaLore's or APOLLO's AdamW: projected gradients of the matrices of layers, plain ones of the rest.

    Their packages are installed by hand, `pip install --no-deps galore-torch apollo-torch`; mind APOLLO's licence.
    """
    low_rank = [value for name, value in model.named_parameters() if ".layers." in name and value.ndim == 2]
    ours = set(map(id, low_rank))
    others = [value for value in model.parameters() if id(value) not in ours]
    groups = [{"params": others}, {"params": low_rank} | settings]
    if method == "galore":
        from galore_torch import GaLoreAdamW

        return GaLoreAdamW(groups, lr=lr, weight_decay=0.0, no_deprecation_warning=True)
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(groups, lr=lr, weight_decay=0.0)


def build(arguments: argparse.Namespace, arm: str, lr: float, seed: int, interval: int | None = None):
    """An engine of an arm, and LISA's controller if it has one; with periods of `interval` steps, if given."""
    method, settings, _ = ARMS[arm]
    settings = dict(settings)
    dtype = settings.pop("dtype", torch.bfloat16 if arguments.gpu else torch.float32)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    if dtype == torch.bfloat16 and not arguments.gpu and not cpu_multiplies_bf16():
        multiply_in_fp32(model)
    common = {"lr": lr, "micro_batch_size": arguments.rows}
    if method == "lisa":
        common["optim"] = settings.pop("optim", adamw_of(arguments))
        settings = {"lisa_interval_steps": INTERVAL} | settings
        other, times = settings.pop("memory_of", "lisa"), settings.pop("times", 1.1)
        if interval is not None:
            settings["lisa_interval_steps"] = interval
            settings.pop("lisa_wake_warmup_steps", None)  # may be longer, and changes no cost
        if settings.get("lisa_budget") == AUTO_LAYERS:
            settings["lisa_budget"] = str(LISA["lisa_activated_layers"] / model.config.num_hidden_layers)
        if settings.get("lisa_activated_layers") == ALL_LAYERS:
            settings["lisa_activated_layers"] = model.config.num_hidden_layers
        if settings.get("lisa_activated_layers") == AUTO_LAYERS:
            settings = with_memory_of(other, arguments, settings, times)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as weights:
            if weight_of := settings.pop("weights", None):
                json.dump([weight_of(layer) for layer in range(model.config.num_hidden_layers)], weights)
                weights.flush()
                settings["lisa_weights_file"] = weights.name
            config = lisa_dist.LisaConfig(lisa_seed=seed, **settings)
            if config.lisa_interval_steps == AUTO_INTERVAL:
                config = config.with_interval(arguments.steps, model.config.num_hidden_layers)
            return lisa_dist.initialize(model, "zero2", config, **common)
    torch.manual_seed(seed)
    if method in ("galore", "apollo"):
        model = model.to(get_accelerator().current_device_name())
        return PlainEngine(model, low_rank_optimizer(method, model, settings, lr)), None
    if method == "lora":
        more = {"lora_alpha": 2 * settings["r"], "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**more, **settings))
    config = lisa_dist.load_ds_config("zero2", model=model, micro_batch_size=arguments.rows)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = lisa_dist.build_optimizer([{"params": trained, "weight_decay": 0.0}], adamw_of(arguments), lr=lr)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    return engine, None
