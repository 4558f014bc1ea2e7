"""What the benchmarks compare, behind one interface: full training, LoRA, frozen layers, a callback, and LISA.

- full: every parameter in every step; lora: peft's adapters on all linear layers but the head, without dropout. Their
  rank is divided as the widths are, so that they keep their share of the parameters.
- static: embeddings, head and a fixed set of layers, the rest frozen by hand before plain DeepSpeed is built: the
  lower bound.
- callback: every parameter registered, `requires_grad` flipped at each period, as a Trainer callback does it.
- lisa: this package.

All have the same model (random weights, the same ones), rows, DeepSpeed config, AdamW and weight decay.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

import lisa_dist
from benchmarks.common.ranks import RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, positive
from lisa_dist.config import UserError
from lisa_dist.core.blocks import Blocks, find_blocks
from lisa_dist.core.checkpointing import checkpoint_layers, let_backward_end, number_of_layers
from lisa_dist.core.live_bytes import live_storages
from lisa_dist.ds_config import read_ds_config, uses_optimizer_offload
from lisa_dist.memory.estimate import plan_memory
from lisa_dist.memory.plan import load_model_config
from lisa_dist.memory.states import kept_states
from lisa_dist.memory.trace import FakeRun
from lisa_dist.memory.tracker import AllocationTracker
from lisa_dist.memory.workload import StageSettings, Trained, Workload
from lisa_dist.train.compiled_layers import compile_layers
from lisa_dist.zero.parameters import held_tensors, parameter_numel

RANKS = 2
LR, WEIGHT_DECAY = 1e-4, 0.1
EMBED_FROZEN = {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}
WIDTHS = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
PHASES = ("begin", "forward", "backward", "optimizer")  # of a step; LISA's switch is in the first


@dataclass(frozen=True)
class Arm:
    """One side of a comparison. `settings` are those of LisaConfig; of LoRA its rank, {"r": 16}."""

    name: str
    method: str  # full | lora | static | callback | lisa
    settings: dict = field(default_factory=dict)
    optim: str = "adamw_torch_fused"
    checkpointed: int | str = 0  # layers whose activations are computed again, or "all"
    length: int | None = None  # tokens of a row, where they are not the script's
    attention: str = "sdpa"
    liger: bool = False  # its kernels, with the loss fused with the head
    compiled: bool = False  # each decoder layer by itself

    @property
    def config(self) -> lisa_dist.LisaConfig:
        """What LISA, or what static and callback do in its place, is to train."""
        return lisa_dist.LisaConfig(**self.settings if self.method != "lora" else {})


FULL, STATIC, CALLBACK, LISA = (Arm(name, name) for name in ("full", "static", "callback", "lisa"))
LORA_16, LORA_128 = (Arm(f"lora r{rank}", "lora", {"r": rank}) for rank in (16, 128))
SIDE_BY_SIDE = (FULL, LORA_16, LORA_128, STATIC, CALLBACK, LISA)


def shrunk_arms(arms: Iterable[Arm], shrink: int) -> tuple[Arm, ...]:
    """The same arms for a model whose widths are divided by `shrink`: LoRA's ranks are too, but stay at least 1."""
    return tuple(
        replace(arm, settings={"r": max(1, arm.settings["r"] // shrink)}) if arm.method == "lora" else arm
        for arm in arms
    )


def shrunk_config(model: str, shrink: int = 1, num_layers: int | None = None) -> PretrainedConfig:
    """A shipped config, or that of a folder or the hub, with every width and the vocabulary divided by `shrink`.

    Heads keep their size and become fewer, so that each block keeps its share of the parameters. Raises ValueError for
    a model that is not there, or whose config names its widths otherwise.
    """
    config = load_model_config(model)
    if lacks := [name for name in WIDTHS if not hasattr(config, name)]:
        raise UserError(
            f"--model {model}: the config of a {config.model_type} has no {', '.join(lacks)}, by which its widths are "
            "divided; take a Llama, Mistral or Qwen."
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in WIDTHS:
        setattr(config, name, max(1, getattr(config, name) // shrink))
    config.head_dim = min(head, config.hidden_size)
    config.num_hidden_layers = num_layers or config.num_hidden_layers
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None  # which the vocabulary may have lost
    return config


def arms_parser(about: str, results: str, *, shrink: int) -> argparse.ArgumentParser:
    """The flags of a script that compares arms on groups of CPU ranks."""
    run_on_cpu()
    parser = parser_of(about, results)
    parser.add_argument("--model", default="llama2-7b", help="shipped config, folder or hub id; weights are random")
    parser.add_argument("--shrink", type=positive, default=shrink, help="its widths and vocabulary are divided by this")
    parser.add_argument("--num_layers", type=positive, help="instead of the model's own")
    return parser


def parse(parser: argparse.ArgumentParser, fewest: int = 2) -> argparse.Namespace:
    """The flags of `arms_parser`; an error for a model that is not there, or with fewer layers, or for --large."""
    arguments = parser.parse_args()
    flag = "--model"
    try:
        config = shrunk_config(arguments.model, arguments.shrink, arguments.num_layers)
        if hasattr(arguments, "large"):
            flag = "--large"
            load_model_config(arguments.large)
    except UserError as error:
        parser.error(str(error).replace("--model", flag))
    if config.num_hidden_layers < fewest:
        parser.error(f"--num_layers {config.num_hidden_layers}: too few for what is compared; take {fewest} or more")
    return arguments


def model_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model without data, for its sizes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def adapted(model: PreTrainedModel, arm: Arm) -> torch.nn.Module:
    """The model with the adapters of an arm of LoRA."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(lora_dropout=0.0, target_modules="all-linear", **arm.settings)
    return get_peft_model(model, adapters, autocast_adapter_dtype=False)


class Run:
    """An arm as a DeepSpeed engine that takes steps, on one rank; every rank calls everything.

    Every step has the same rows for every arm. `interval` is K in steps; `layers` are those that static trains.
    """

    def __init__(
        self,
        arm: Arm,
        config: PretrainedConfig,
        ds_config: str | dict = "zero2",
        *,
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
        interval: int = 10**6,
        layers: Sequence[int] = (),
        lr: float = LR,
    ):
        self.lr = lr
        self.arm, self._interval, self._rows, self._layers = arm, interval, rows, tuple(layers)
        self._ds_config, self._rng = ds_config, random.Random(0)
        self._tokens = torch.Generator().manual_seed(dist.get_rank())
        self._device = torch.device(get_accelerator().current_device_name())
        self.lisa: lisa_dist.LisaController | None = None
        self._period = -1  # of callback
        self.losses: list[float] = []  # of this rank's rows, by step
        torch.manual_seed(0)
        with self._device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=arm.attention)
        if arm.liger:
            apply_liger_kernel(self.model, None)
        self.blocks = find_blocks(self.model)
        if arm.compiled:
            compile_layers(self.model.get_submodule(self.blocks.layers_path).children(), "inductor", None)
        if arm.method == "lisa":
            settings = lisa_dist.LisaConfig(lisa_interval_steps=interval, **arm.settings)
            common = {"lr": lr, "weight_decay": WEIGHT_DECAY, "optim": arm.optim, "micro_batch_size": rows}
            self.engine, self.lisa = lisa_dist.initialize(self.model, self._ds_config, settings, **common)
        else:
            self.engine = self._plain_engine()
        self._checkpointed = 0
        if arm.checkpointed:
            self.checkpoint(number_of_layers(arm.checkpointed, len(self.blocks.layers)))
        get_accelerator().empty_cache()  # of what only the start has needed, so that `reserved_bytes` is of steps

    def _plain_engine(self) -> deepspeed.DeepSpeedEngine:
        """What one writes without this package: two groups of what trains, by decay, and DeepSpeed around them."""
        model = self.model
        if self.arm.method == "lora":
            model = adapted(model, self.arm)
        elif self.arm.method == "static":
            self._let_train(self._layers)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [one for one in trained if one.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [one for one in trained if one.ndim == 1], "weight_decay": 0.0},
        ]
        config = lisa_dist.load_ds_config(self._ds_config, model=model, micro_batch_size=self._rows)
        offload = uses_optimizer_offload(config)
        groups = [group for group in groups if group["params"]]
        optimizer = lisa_dist.build_optimizer(groups, self.arm.optim, lr=self.lr, offload=offload)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.train()
        return engine

    def _let_train(self, layers: Sequence[int]) -> None:
        """The layers and what is always on require gradients, and nothing else."""
        always_on = self.arm.config.always_on
        for block in self.blocks:
            block.requires_grad_(block.name in always_on)
        for layer in layers:
            self.blocks.layers[layer].requires_grad_(True)

    @property
    def active_layers(self) -> tuple[int, ...]:
        """The layers that train now; of full training and LoRA all."""
        if self.lisa is not None:
            return self.lisa.active_layers
        return self._layers if self.arm.method in ("static", "callback") else tuple(range(len(self.blocks.layers)))

    def begin(self) -> None:
        """What a step begins with, which is nothing if it is done already: in a new period other layers train now."""
        if self.lisa is not None:
            self.lisa.on_step_begin()
        elif self.arm.method == "callback" and self.engine.global_steps // self._interval != self._period:
            self._period, count = self.engine.global_steps // self._interval, len(self.blocks.layers)
            self._layers = tuple(sorted(self._rng.sample(range(count), self.arm.config.lisa_activated_layers)))
            self._let_train(self._layers)

    def _next_tokens(self, length: int) -> torch.Tensor:
        size = (self._rows, length)
        return torch.randint(self.model.config.vocab_size, size, generator=self._tokens).to(self._device)

    def step(self, length: int) -> dict[str, float]:
        """One optimizer step of `length` tokens a row: seconds of its phases and of all of it."""
        tokens = self._next_tokens(length)
        dist.barrier()
        times = [self._now()]
        self.begin()
        times.append(self._now())
        loss = self.engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        times.append(self._now())
        self.engine.backward(loss)
        times.append(self._now())
        self.engine.step()
        times.append(self._now())
        phases = dict(zip(PHASES, (end - start for start, end in itertools.pairwise(times)), strict=True))
        self.losses.append(loss.item())
        return phases | {"step": times[-1] - times[0]}

    def checkpoint(self, count: int) -> None:
        """From now on the activations of the lowest `count` layers are computed again in the backward pass."""
        checkpoint_layers(self.model, self.blocks, count)
        let_backward_end(self.model)
        self._checkpointed = count

    def get(self, name: str):
        """An attribute, for the script that calls the ranks."""
        return getattr(self, name)

    @property
    def active_blocks(self) -> tuple[str, ...]:
        """The outer blocks that LISA has drawn for this period; of other methods none."""
        return () if self.lisa is None else self.lisa.active_blocks

    def begin_with_embed(self, length: int) -> None:
        """Take periods until one that has begun trains the embedding, which is drawn; none of its steps is done."""
        self.begin()
        while "embed" not in self.active_blocks:
            self.steps(self._interval, length)
            self.begin()

    def steps(self, count: int, length: int) -> None:
        """So many steps, of which nobody wants to know."""
        for _ in range(count):
            self.step(length)

    def _now(self) -> float:
        get_accelerator().synchronize()
        return time.perf_counter()

    # Memory

    def live_bytes(self) -> dict[str, int]:
        """Bytes of this rank's tensors by what they are: each storage once."""
        zero = self.engine.optimizer
        states = zero.optimizer.state  # DeepSpeed's AdamW steps masters, which are its parameters
        parameters = list(self.engine.module.parameters())
        of = {
            "weights": [
                one
                for parameter in parameters
                for one in (parameter.data, getattr(parameter, "ds_tensor", None), *held_tensors(parameter))
            ],
            # Stage 3 keeps its buffer of gradients between steps.
            "gradients": [getattr(zero, "grad_partitions_flat_buffer", None), *(one.grad for one in parameters)],
            "masters": list(states),
            "moments": [value for state in states.values() for value in state.values()],
        }
        counted: dict[int, str] = {}
        for kind, tensors in of.items():
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.device == self._device:
                    counted.setdefault(tensor.untyped_storage().data_ptr(), kind)
        sums = dict.fromkeys((*of, "other"), 0)
        for storage in live_storages():
            if storage.device == self._device:
                sums[counted.get(storage.data_ptr(), "other")] += storage.nbytes()
        return sums | {"total": sum(sums.values())}

    def peak_bytes(self, length: int) -> int:
        """The most that tensors take in one step of `length` tokens."""
        if self._device.type == "cuda":
            get_accelerator().reset_peak_memory_stats()
            self.step(length)
            return get_accelerator().max_memory_allocated()
        tracker = AllocationTracker()
        tracker.add(torch.empty(0, dtype=torch.uint8).set_(storage) for storage in live_storages())
        with tracker:
            self.step(length)
        return tracker.peak

    def reserved_bytes(self) -> int | None:
        """The most that a GPU's allocator has taken so far, with what it keeps to give out again."""
        return None if self._device.type == "cpu" else get_accelerator().max_memory_reserved()

    def planned_bytes(self, length: int, checkpointed: int | None = None) -> int | None:
        """What the planner says of `peak_bytes`, for the blocks that train now; or if so many were checkpointed.

        There is no plan of the callback, which `lisa-dist` does not run, nor of Liger's fused loss; that of compiled
        layers is of layers that are not, which hold more.
        """
        arm, config = self.arm, self.arm.config
        if arm.method == "callback" or arm.liger:
            return None
        lora_rank = arm.settings["r"] if arm.method == "lora" else 0
        dtype = next(self.model.parameters()).dtype
        workload = Workload(
            length,
            self._rows,
            dtype,
            self._checkpointed if checkpointed is None else checkpointed,
            "eager" if arm.attention == "eager" else "sdpa",  # whose memory flash-attn's is
            loss="own",
            frozen_bits=config.lisa_frozen_bits,
        )
        run = FakeRun(self.model.config, workload, lora_rank)
        trained = None
        if arm.method in ("static", "lisa"):
            always_on = tuple(name for name in config.always_on if run.blocks.outer(name).parameters)
            trained = Trained(self.active_layers, always_on, self.lisa.active_blocks if self.lisa else ())
        ds_config = self._ds_config
        stage = StageSettings.of(
            read_ds_config(ds_config) if isinstance(ds_config, str) else ds_config, run.hidden_size
        )
        by_rows = stage.reduces_rows(arm.optim, arm.method)
        groups = run.groups(trained, arm.optim, config.state_bits, config.offloaded, by_rows)
        if arm.method == "static":  # two groups in all, as `_plain_engine` makes them
            params = [parameter for group in groups for parameter in group.params]
            halves = ([one for one in params if (one.ndim > 1) == decays] for decays in (True, False))
            groups = [replace(groups[0], params=tuple(half)) for half in halves if half]
        parts, _ = plan_memory(
            run,
            groups,
            run.trace(groups),
            stage,
            dist.get_world_size(),
            optim=arm.optim,
            master=config.lisa_master,
            rank=dist.get_rank(),
            on_cpu=self._device.type == "cpu",
            plain=self.lisa is None,
        )
        kept = 0
        if config.lisa_state == "keep" and self._device.type == "cpu":  # of layers that have trained and sleep
            asleep = {layer for layer, times in enumerate(self.lisa.visit_counts) if times} - {*self.active_layers}
            every = kept_states(run, config, stage.stage, dist.get_world_size(), arm.optim, pinned=False)
            kept = every * len(asleep) // (len(self.blocks.layers) - config.lisa_activated_layers)
        return parts.peak + kept

    def drift(self, length: int) -> dict[str, float] | None:
        """What sleeping layers do in a step: elements that have changed, and the largest change of one.

        All layers of full training and LoRA are awake: None.
        """
        self.begin()
        asleep = [block for number, block in enumerate(self.blocks.layers) if number not in self.active_layers]
        if not asleep:
            return self.steps(1, length)
        params = [parameter for block in asleep for parameter in block.parameters.values()]
        # Of stage 3 this rank's part; ds_tensor is where it lies.
        now = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in params]
        before = [part.clone() for part in now]
        self.steps(1, length)
        moved = [(part - old).abs() for part, old in zip(now, before, strict=True)]
        return {
            "changed": sum(int((change > 0).sum()) for change in moved),
            "elements": sum(part.numel() for part in now),
            "largest": max(change.max().item() for change in moved),
        }

    def numel(self) -> int:
        """Elements of all parameters, adapters included."""
        return sum(parameter_numel(one) for one in self.engine.module.parameters())


def peak_of(ranks: RankGroup, length: int, tries: int = 1) -> dict:
    """The most that a rank of `Run` takes in a step, what was planned, and for which layers and blocks.

    Of several tries the least: now and then a thread of gloo's still holds a bucket that it has reduced.
    """
    planned = ranks.call("planned_bytes", length)
    return {
        "planned": None if None in planned else max(planned),
        "active_layers": ranks.call("get", "active_layers")[0],
        "active_blocks": ranks.call("get", "active_blocks")[0],
        "peak": min(max(ranks.call("peak_bytes", length)) for _ in range(tries)),
    }


def flops_of_step(
    config: PretrainedConfig, arm: Arm, tokens: int, length: int, layers: Sequence[int] | None = None
) -> float:
    """Floating-point operations that a step cannot do without: matrix products, a multiply-add as two.

    Of every matrix a forward pass, the gradient of its input as far down as something trains, and its own gradient
    where it trains; of attention its two products, forward and twice as many backward. Without recomputation. `layers`
    are those that train, of which the lowest matters where the embedding does not; without them it is an average over
    draws.
    """
    model = model_of(config)
    blocks: Blocks = find_blocks(model)
    count = len(blocks.layers)
    layer = sum(one.numel() for one in blocks.layers[0].parameters.values() if one.ndim > 1)
    head = model.get_output_embeddings().weight.numel()
    attention = 4 * length * config.num_attention_heads * config.head_dim / 2  # a token and layer; causal: half of it
    if arm.method in ("full", "lora"):
        trained, head_trains, lowest = (count if arm.method == "full" else 0), arm.method == "full", 0
    else:
        outer = arm.config.always_on
        trained, head_trains = arm.config.lisa_activated_layers if layers is None else len(layers), "head" in outer
        # The backward pass ends at the embedding, or where that is frozen at the lowest layer that trains.
        lowest = (count - trained) / (trained + 1) if layers is None else min(layers, default=count)
        lowest = 0 if "embed" in outer else lowest
    of_adapters = 0
    if arm.method == "lora":
        linears = [one for one in blocks.layers[0].parameters.values() if one.ndim > 1]
        of_adapters = count * arm.settings["r"] * sum(sum(one.shape) for one in linears)
    backward = (count - lowest) / count
    per_token = 2 * count * layer * (1 + backward) + 2 * trained * layer + count * attention * (1 + 2 * backward)
    per_token += 2 * head * (3 if head_trains else 2) + 6 * of_adapters
    return per_token * tokens
