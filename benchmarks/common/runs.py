"""A method as a DeepSpeed engine on a rank, and what is measured of it: steps, memory, drift, operations.

All have the same model (random weights, the same ones), rows, DeepSpeed config, AdamW and weight decay.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

import lisa_dist
from benchmarks.common.methods import Method
from benchmarks.common.ranks import RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, positive
from lisa_dist.config import UserError
from lisa_dist.core.activation_checkpointing import checkpoint_layers, let_backward_end, number_of_layers
from lisa_dist.core.blocks import find_blocks
from lisa_dist.core.live_bytes import live_storages
from lisa_dist.ds_config import read_ds_config, uses_optimizer_offload
from lisa_dist.memory.estimate import StepPlan, kept_states
from lisa_dist.memory.plan import load_model_config
from lisa_dist.memory.trace import AllocationTracker, FakeRun
from lisa_dist.memory.workload import Lora, StageSettings, Trained, Workload
from lisa_dist.train.compiled_layers import compile_layers
from lisa_dist.zero.parameters import local_tensors, parameter_numel

RANKS = 2
LR, WEIGHT_DECAY = 1e-4, 0.1
WIDTHS = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
PHASES = ("begin", "forward", "backward", "optimizer")  # of a step; LISA's switch is in the first


def shrunk_config(model: str, shrink: int = 1, num_layers: int | None = None) -> PretrainedConfig:
    """A shipped config, or that of a folder or the hub, with every width and the vocabulary divided by `shrink`.

    Heads keep their size and become fewer. Raises UserError for a model that is not there or has other widths.
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


def methods_parser(about: str, results: str, *, shrink: int) -> argparse.ArgumentParser:
    """The flags of a script that compares methods on groups of CPU ranks."""
    run_on_cpu()
    parser = parser_of(about, results)
    parser.add_argument("--model", default="llama2-7b", help="shipped config, folder or hub id; weights are random")
    parser.add_argument("--shrink", type=positive, default=shrink, help="its widths and vocabulary are divided by this")
    parser.add_argument("--num_layers", type=positive, help="instead of the model's own")
    return parser


def parse(parser: argparse.ArgumentParser, fewest: int = 2) -> argparse.Namespace:
    """The flags of `methods_parser`; an error for a model that is not there, or with fewer layers."""
    arguments = parser.parse_args()
    try:
        config = shrunk_config(arguments.model, arguments.shrink, arguments.num_layers)
    except UserError as error:
        parser.error(str(error))
    if config.num_hidden_layers < fewest:
        parser.error(f"--num_layers {config.num_hidden_layers}: too few for what is compared; take {fewest} or more")
    return arguments


def model_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model without data, for its sizes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def adapted(model: PreTrainedModel, method: Method) -> torch.nn.Module:
    """The model with the adapters of LoRA."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM", **method.settings)
    return get_peft_model(model, adapters, autocast_adapter_dtype=False)


def peak_within(work: Callable[[], object]) -> int:
    """The most bytes that tensors on a CPU take while something is done."""
    tracker = AllocationTracker()
    tracker.add(torch.empty(0, dtype=torch.uint8).set_(storage) for storage in live_storages())
    with tracker:
        work()
    return tracker.peak


def plain_engine(
    model: torch.nn.Module, ds_config: str | dict, *, optim: str, lr: float, weight_decay: float, rows: int
) -> deepspeed.DeepSpeedEngine:
    """Two groups of what trains, by decay, and DeepSpeed around them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim > 1], "weight_decay": weight_decay},
        {"params": [one for one in trained if one.ndim == 1], "weight_decay": 0.0},
    ]
    config = lisa_dist.load_ds_config(ds_config, model=model, micro_batch_size=rows)
    groups = [group for group in groups if group["params"]]
    optimizer = lisa_dist.build_optimizer(groups, optim, lr=lr, offload=uses_optimizer_offload(config))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    return engine


class Run:
    """A method as a DeepSpeed engine that takes steps, on one rank; every rank calls everything.

    Every step has the same rows for every method. `interval` is K in steps; `layers` are those that static trains.
    """

    def __init__(
        self,
        method: Method,
        config: PretrainedConfig,
        ds_config: str | dict = "zero2",
        *,
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
        interval: int = 10**6,
        layers: Sequence[int] = (),
        lr: float = LR,
    ):
        self.method, self._interval, self._rows, self._layers = method, interval, rows, tuple(layers)
        self._ds_config, self._rng = ds_config, random.Random(0)
        self._tokens = torch.Generator().manual_seed(dist.get_rank())
        self._device = torch.device(get_accelerator().current_device_name())
        self.lisa: lisa_dist.LisaController | None = None
        self._period = -1  # of callback
        self.losses: list[float] = []  # of this rank's rows, by step
        torch.manual_seed(0)
        with self._device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=method.attention)
        if method.liger:
            apply_liger_kernel(self.model, None)
        self.blocks = find_blocks(self.model)
        if method.compiled:
            compile_layers(self.model.get_submodule(self.blocks.layers_path).children(), "inductor", None)
        if method.kind == "lisa":
            settings = lisa_dist.LisaConfig(lisa_interval_steps=interval, **method.settings)
            common = {"lr": lr, "weight_decay": WEIGHT_DECAY, "optim": method.optim, "micro_batch_size": rows}
            self.engine, self.lisa = lisa_dist.initialize(self.model, ds_config, settings, **common)
        else:
            if method.kind == "static":
                self._let_train(self._layers)
            model = adapted(self.model, method) if method.kind == "lora" else self.model
            more = {"optim": method.optim, "lr": lr, "weight_decay": WEIGHT_DECAY, "rows": rows}
            self.engine = plain_engine(model, ds_config, **more)
        self._checkpointed = 0
        if method.checkpointed:
            self.checkpoint(number_of_layers(method.checkpointed, len(self.blocks.layers)))
        get_accelerator().empty_cache()  # of what only the start has needed, so that `reserved_bytes` is of steps

    def _let_train(self, layers: Sequence[int]) -> None:
        """The layers and what is always on require gradients, and nothing else."""
        always_on = self.method.config.always_on
        for block in self.blocks:
            block.requires_grad_(block.name in always_on)
        for layer in layers:
            self.blocks.layers[layer].requires_grad_(True)

    @property
    def active_layers(self) -> tuple[int, ...]:
        """The layers that train now; of full training and LoRA all."""
        if self.lisa is not None:
            return self.lisa.active_layers
        return self._layers if self.method.kind in ("static", "callback") else tuple(range(len(self.blocks.layers)))

    def begin(self) -> None:
        """What a step begins with, which is nothing if it is done already: in a new period other layers train now."""
        if self.lisa is not None:
            self.lisa.on_step_begin()
        elif self.method.kind == "callback" and self.engine.global_steps // self._interval != self._period:
            self._period, count = self.engine.global_steps // self._interval, len(self.blocks.layers)
            self._layers = tuple(sorted(self._rng.sample(range(count), self.method.config.lisa_activated_layers)))
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
                for one in (parameter.data, getattr(parameter, "ds_tensor", None), *local_tensors(parameter))
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
        return peak_within(lambda: self.step(length))

    def reserved_bytes(self) -> int | None:
        """The most that a GPU's allocator has taken so far, with what it keeps to give out again."""
        return None if self._device.type == "cpu" else get_accelerator().max_memory_reserved()

    def planned_bytes(self, length: int, checkpointed: int | None = None) -> int | None:
        """What the planner says of `peak_bytes`, for the blocks that train now; or if so many were checkpointed.

        There is none of the callback and of Liger's fused loss; that of compiled layers is of layers that are not.
        """
        method, config = self.method, self.method.config
        if method.kind == "callback" or method.liger:
            return None
        lora = Lora(method.settings["r"]) if method.kind == "lora" else None
        dtype = next(self.model.parameters()).dtype
        workload = Workload(
            length,
            self._rows,
            dtype,
            self._checkpointed if checkpointed is None else checkpointed,
            "eager" if method.attention == "eager" else "sdpa",  # whose memory flash-attn's is
            loss="own",
            frozen_bits=config.frozen_form,
        )
        run = FakeRun(self.model.config, workload, lora)
        trained = None
        if method.kind in ("static", "lisa"):
            always_on = tuple(name for name in config.always_on if run.blocks.outer(name).parameters)
            trained = Trained(self.active_layers, always_on, self.lisa.active_blocks if self.lisa else ())
        ds_config = self._ds_config
        stage = StageSettings.of(
            read_ds_config(ds_config) if isinstance(ds_config, str) else ds_config, run.hidden_size
        )
        by_rows = stage.reduces_rows(dist.get_world_size(), method.optim, method.kind)
        groups = run.groups(trained, method.optim, config.state_bits, config.offloaded, by_rows)
        if method.kind == "static":  # two groups in all, as `plain_engine` makes them
            params = [parameter for group in groups for parameter in group.params]
            halves = ([one for one in params if (one.ndim > 1) == decays] for decays in (True, False))
            groups = [replace(groups[0], params=tuple(half)) for half in halves if half]
        parts, _ = StepPlan(
            run,
            groups,
            stage,
            dist.get_world_size(),
            optim=method.optim,
            master=config.lisa_master,
            rank=dist.get_rank(),
            on_cpu=self._device.type == "cpu",
            plain=self.lisa is None,
        ).parts()
        kept = 0
        if config.lisa_state == "keep" and self._device.type == "cpu":  # of layers that have trained and sleep
            frozen = {layer for layer, times in enumerate(self.lisa.visit_counts) if times} - {*self.active_layers}
            every = kept_states(run, config, stage.stage, dist.get_world_size(), method.optim, pinned=False)
            kept = every * len(frozen) // (len(self.blocks.layers) - config.lisa_activated_layers)
        return parts.peak + kept

    def drift(self, length: int) -> dict[str, float] | None:
        """Elements of frozen layers, and how many change in a step; None where all layers train."""
        self.begin()
        frozen = [block for number, block in enumerate(self.blocks.layers) if number not in self.active_layers]
        if not frozen:
            return self.steps(1, length)
        params = [parameter for block in frozen for parameter in block.parameters.values()]
        # Of stage 3 this rank's part; ds_tensor is where it lies.
        now = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in params]
        before = [part.clone() for part in now]
        self.steps(1, length)
        moved = [(part - old).abs() for part, old in zip(now, before, strict=True)]
        return {
            "changed": sum(int((change > 0).sum()) for change in moved),
            "elements": sum(part.numel() for part in now),
        }

    def numel(self) -> int:
        """Elements of all parameters, adapters included."""
        return sum(parameter_numel(one) for one in self.engine.module.parameters())


def peak_of(ranks: RankGroup, length: int, tries: int = 1) -> dict:
    """The most that a rank of `Run` takes in a step, what was planned, and for which layers and blocks."""
    planned = ranks.call("planned_bytes", length)
    return {
        "planned": None if None in planned else max(planned),
        "active_layers": ranks.call("get", "active_layers")[0],
        "active_blocks": ranks.call("get", "active_blocks")[0],
        # The least of several tries: now and then a thread of gloo's still has a bucket that it has reduced.
        "peak": min(max(ranks.call("peak_bytes", length)) for _ in range(tries)),
    }


def flops_of_step(
    config: PretrainedConfig, method: Method, tokens: int, length: int, layers: Sequence[int] = (), again: int = 0
) -> float:
    """Floating-point operations that a step cannot do without: matrix products, a multiply-add as two.

    Of every matrix a forward pass, the gradient of its input as far down as something trains, and its own gradient
    where it trains, adapters among them; of attention its two products, forward and twice as many backward. `layers`
    are those of static, callback and LISA that train, and so many are computed `again`.
    """
    model = model_of(config)
    first, count = find_blocks(model).layers[0], config.num_hidden_layers
    matrices = [one for one in first.parameters.values() if one.ndim > 1]
    layer, head = sum(one.numel() for one in matrices), model.get_output_embeddings().weight.numel()
    attention = 4 * length * config.num_attention_heads * config.head_dim / 2  # a token and layer; causal: half of it
    trained, outer, rank = len(layers), method.config.always_on, method.config.lisa_adapters or 0
    if method.kind in ("full", "lora"):
        trained, outer = (count, ("embed", "head")) if method.kind == "full" else (0, ("embed",))
    rank = method.settings["r"] if method.kind == "lora" else rank
    of_adapters = count * rank * sum(sum(one.shape) for one in matrices)
    # The backward pass ends at the embedding, or where that is frozen at the lowest layer that trains.
    lowest = 0 if "embed" in outer else min(layers, default=count)
    backward = (count - lowest) / count
    per_token = 2 * count * layer * (1 + backward) + 2 * trained * layer + count * attention * (1 + 2 * backward)
    per_token += 2 * head * (3 if "head" in outer else 2) + 6 * of_adapters + again * (2 * layer + attention)
    return per_token * tokens
