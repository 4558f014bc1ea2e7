"""When to switch, and the order of a switch.

One period, K optimizer steps long, as it runs on every rank::

    on_step_begin()                 step s, s % K == 0: the step before has written its weights back
      draw       all compare their period: 8 W bytes gathered; rank 0 draws and broadcasts (period, drawn outer block,
                 layers): 8 (gamma + 2) bytes
      flip       requires_grad of what sleeps and what wakes; gradients of what sleeps become None
      partition  ZeroPartitions.repartition: states of staying blocks move over, of waking blocks are new
      verify     each rank hashes what it now holds and all compare: 8 W bytes gathered
    forward, backward, step         K times; on_step_begin() between them is one comparison
    ...

Source: Algorithm 1 of the LISA paper. A switch never happens inside the optimizer's step, where the last update of the
period would be lost.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.blocks import Block, Blocks, find_blocks
from lisa_dist.config import OUTER_BLOCKS, LisaConfig, UserError
from lisa_dist.ds_config import check_ds_config, load_ds_config, uses_optimizer_offload
from lisa_dist.files import replacing
from lisa_dist.invariants import SleepingWeights
from lisa_dist.memory import live_tensor_bytes
from lisa_dist.optimizer import build_optimizer, build_param_groups, check_same_kinds, split_by_decay
from lisa_dist.sampling import Draw, SampledBlock, load_layer_weights, sample_period
from lisa_dist.states import HostStates, PartitionKey, PartitionState, Piece, states_to_carry
from lisa_dist.zero import ZeroPartitions, check_deepspeed, release_shared_memory

LOG_NAME = "lisa_log.jsonl"
STATE_VERSION = 1
# Settings that a resumed run may give otherwise at any step: they do not decide on layers or groups.
FREE_SETTINGS = ("lisa_state", "lisa_nonfinite", "lisa_layers_attribute", "lisa_weights_file", "lisa_debug")


@dataclass
class PeriodRecord:
    """One line of lisa_log.jsonl. Seconds are of the switch; bytes are of this rank, after the period's first step.

    `blocks` are the outer blocks that train in this period beside those that are always on; `host_bytes` are states of
    sleeping blocks that wait on the host.
    """

    period: int
    step: int
    layers: list[int]
    blocks: list[str]
    seconds: float
    state_bytes_per_rank: int
    bytes_released: int
    live_bytes: int
    host_bytes: int = 0


def sampled_blocks(config: LisaConfig, blocks: Blocks) -> list[SampledBlock]:
    """The outer blocks that `config` has drawn, with their probabilities and places; tied matrices are one, in embed.

    Raises ValueError when embed and head are tied and not treated as one, or the probabilities add up to more than 1.
    """
    policies = {name: [name in config.always_on, name in config.frozen] for name in ("embed", "head")}
    probabilities = dict(config.block_probabilities)
    if blocks.tied:
        given = {probabilities.pop(name, None) for name in ("embed", "head")} - {None}
        if policies["embed"] != policies["head"] or len(given) > 1:
            raise UserError(
                f"--lisa_always_on {config.lisa_always_on}, --lisa_frozen {config.lisa_frozen}, "
                f"--lisa_block_probability {config.lisa_block_probability}: embed and head of this model are one tied "
                "matrix; give both the same."
            )
        probabilities |= dict.fromkeys(("embed",), *given)
    gamma, num_layers = config.lisa_activated_layers, len(blocks.layers)
    layer_numel = sum(layer.numel for layer in blocks.layers) / num_layers
    sampled = []
    for name in config.sampled:
        block = blocks.outer(name)
        if block.parameters:
            places = min(gamma, round(block.numel / layer_numel))
            sampled.append(SampledBlock(name, probabilities.get(name) or gamma / num_layers, places))
    total = sum(block.probability for block in sampled)
    if total > 1:
        listed = ", ".join(f"{block.name}={block.probability:g}" for block in sampled)
        raise UserError(
            f"--lisa_block_probability {config.lisa_block_probability}: a period trains at most one drawn block, but "
            f"the probabilities add up to {total:g} ({listed})."
        )
    return sampled


class LisaController:
    """Draws the active layers, freezes the rest, and switches both at the start of every period.

    Build it on the model before the optimizer exists: it finds the blocks and activates the layers of period 0. Then
    `param_groups` is for the optimizer, `attach` for the DeepSpeed engine, and `on_step_begin` for every step.

    Raises ValueError for a model or an engine that LISA cannot train, RuntimeError when a switch was missed or ranks
    disagree.
    """

    def __init__(self, model: torch.nn.Module, config: LisaConfig):
        check_deepspeed()
        self.config = config
        self.blocks = find_blocks(model, config.lisa_layers_attribute)
        num_layers = len(self.blocks.layers)
        config.check_num_layers(num_layers)
        check_same_kinds(self.blocks.layers)
        self._sampled = sampled_blocks(config, self.blocks)
        self._state_bits = config.state_bits
        if self.blocks.tied and self._state_bits.get("head", given := self._state_bits.get("embed")) != given:
            raise UserError(
                f"--lisa_state_bits {config.lisa_state_bits}: embed and head of this model are one tied matrix; give "
                "both the same."
            )
        self._weights = None
        if config.lisa_weights_file is not None:
            self._weights = load_layer_weights(config.lisa_weights_file, num_layers, config.lisa_activated_layers)

        self.period = 0
        draw = self._draw(0)
        self.active_layers, self.active_blocks = draw.layers, draw.blocks
        self.visit_counts = [0] * num_layers
        self.block_visit_counts = {block.name: 0 for block in self._sampled}
        self.host_states = HostStates()
        self.records: list[PeriodRecord] = []
        self._model = model
        self.engine: deepspeed.DeepSpeedEngine | None = None
        self.partitions: ZeroPartitions | None = None
        self._log_path: Path | None = None
        self._log_begun = self._resumed = False
        self._begun_step = -1  # the last step that on_step_begin has seen
        self._unlogged: PeriodRecord | None = None
        self._watch: SleepingWeights | None = None
        self._skipped_steps = 0
        self._loss_was_finite: torch.Tensor | None = None
        if dist.is_initialized():
            self._compare(
                [config.to_dict(), self._weights, num_layers], "have other --lisa_* settings or another model"
            )
        self._activate()

    # For the optimizer and the engine

    def param_groups(self, weight_decay: float = 0.0) -> list[dict]:
        """Parameter groups for the optimizer, the same number and order in every period.

        Where outer blocks are drawn, those of all that a period may train: `attach` cuts them down to period 0's.
        """
        layers, drawn = self._widest()
        return self._build_groups(layers, drawn, weight_decay)

    def attach(self, engine: deepspeed.DeepSpeedEngine, output_dir: str | None = None) -> None:
        """Take over a DeepSpeed engine whose optimizer was built from `param_groups`.

        With `output_dir`, rank 0 writes a line for each period to lisa_log.jsonl there.
        """
        self.partitions = ZeroPartitions(engine)
        self.engine = engine
        if self.config.lisa_state == "keep" and engine.zero_round_robin_gradients():
            raise UserError(
                "the DeepSpeed config has round_robin_gradients = true: with --lisa_state keep it must be false."
            )
        self._skipped_steps = engine.skipped_steps
        self._loss_was_finite = torch.tensor(True, device=engine.device)
        mine = self._names_of(group["params"] for group in self.param_groups())
        theirs = self.partitions.keys()
        if mine != theirs:
            raise UserError(
                f"the engine optimizes {len(theirs)} groups of parameters that are not the {len(mine)} groups of the "
                "active blocks: build its optimizer from param_groups() of this controller, and keep "
                "zero_optimization.sub_group_size larger than a block."
            )
        if output_dir is not None and dist.get_rank() == 0:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self._log_path = Path(output_dir) / LOG_NAME
        self.active_layers, self.active_blocks = self._agree()
        if self._sampled:
            self._activate()
            self.partitions.repartition(self._params_of_groups(), {})
        self._verify()
        release_shared_memory()
        if self.config.lisa_debug:
            self._watch = SleepingWeights(self.partitions)
            self._watch.remember(self._sleeping_blocks())
        engine.module.register_forward_pre_hook(self._refuse_missed_switch)
        if not self._resumed:
            self._open_record(engine.global_steps, seconds=0.0, bytes_released=0)

    # The loop

    def on_step_begin(self) -> bool:
        """Call before every step, or before every micro-batch: switches when a period begins. Returns whether it did.

        It goes by the engine's own step count, so a period is K optimizer steps whatever the accumulation.
        """
        assert self.engine is not None, "attach the controller to a DeepSpeed engine first"
        step = self.engine.global_steps
        if step == self._begun_step:
            return False
        self.check_finite()
        self._close_record(step)
        period = step // self.config.lisa_interval_steps
        due = period != self.period
        if due:
            if period != self.period + 1 or step % self.config.lisa_interval_steps != 0:
                raise RuntimeError(self._missed(step))
            self._switch(period)
        self._begun_step = step
        return due

    def partition_states(self) -> dict:
        """This rank's masters and optimizer states, keyed by the names of the parameters they were cut from."""
        return self.partitions.states()

    def saved_states(self) -> tuple[dict[PartitionKey, PartitionState], dict[PartitionKey, list[Piece]]]:
        """What a checkpoint holds of this rank's optimizer: active and kept partitions, and the pieces of each."""
        get_accelerator().synchronize()  # copies to the host are not waited for
        states, pieces = self.partitions.states(), self.partitions.pieces()
        return states | self.host_states.states, pieces | self.host_states.pieces

    def keep_states(self, read: Callable[[PartitionKey, list[Piece], int], dict | None]) -> None:
        """Fill the host's states of sleeping blocks from `read`, which gives a partition's saved fields or None."""
        self.host_states.clear()
        if self.config.lisa_state != "keep":
            return
        for block in self._sleeping_blocks():
            group = block.name if block.name in self.block_visit_counts else "slot0"
            for kind, params in split_by_decay(block).items():
                (key,) = self._names_of([params])
                pieces, numel = self.partitions.layout(params)
                fields = read(key, pieces, numel)
                if fields is not None:
                    self.host_states.put(key, self.partitions.state_of(f"{group}/{kind}", fields), pieces)

    def live_bytes(self) -> int:
        """Bytes that tensors hold on this rank's device right now."""
        return live_tensor_bytes(self.engine.device)

    def note_loss(self, loss: torch.Tensor) -> None:
        """Remember on this rank whether the loss of a micro-batch was finite, for `check_finite` to name the rank."""
        self._loss_was_finite &= torch.isfinite(loss.detach()).all()

    def check_finite(self) -> None:
        """Raise RuntimeError, on every rank, when DeepSpeed left the last step out and --lisa_nonfinite is stop.

        Weights and states are as they were before that step. In fp16 leaving steps out is the loss scaler's work.
        """
        step, skipped = self.engine.global_steps, self.engine.skipped_steps
        left_out, self._skipped_steps = skipped > self._skipped_steps, skipped
        finite, self._loss_was_finite = self._loss_was_finite, torch.ones_like(self._loss_was_finite)
        if not left_out or self.engine.fp16_enabled():
            return
        every = [torch.empty_like(finite) for _ in range(dist.get_world_size())]
        dist.all_gather(every, finite)
        ranks = [rank for rank, was_finite in enumerate(every) if not was_finite]
        said = (
            f"step {step}, period {self.period}, active layers {list(self.active_layers)}: "
            + (f"the loss of rank(s) {ranks} is not finite" if ranks else "the gradients are not finite")
            + "; no weight was changed"
        )
        if self.config.lisa_nonfinite == "stop":
            raise RuntimeError(f"{said}. Lower the learning rate, look at the data, or give --lisa_nonfinite skip.")
        if dist.get_rank() == 0:
            print(f"lisa-dist: {said}, the step was skipped.", flush=True)

    def close(self) -> None:
        """Write the last period's line of the log; call after the last step."""
        self.check_finite()
        if self._watch is not None:
            self._watch.check(self.period)
        self._close_record(self.engine.global_steps)

    # A switch, in order

    def _switch(self, period: int) -> None:
        if self._watch is not None:
            self._watch.check(self.period)
        started = time.perf_counter()
        self.period = period
        self.active_layers, self.active_blocks = self._agree()
        self._activate()
        params_of_groups = self._params_of_groups()
        states = self.partitions.states()
        next_keys = self._names_of(params_of_groups)
        if self.config.lisa_state == "keep":
            pieces = self.partitions.pieces()
            for key in states.keys() - set(next_keys):
                self.host_states.put(key, states[key], pieces[key])
        carried = states_to_carry(states, self.config.lisa_state, next_keys, self.host_states)
        staying = sum(state.nbytes for key, state in carried.items() if key in states)
        released = sum(state.nbytes for state in states.values()) - staying
        changed = released > 0 or states.keys() != {key for key in next_keys if key}
        del states  # what falls asleep must be gone before what wakes is allocated
        if changed:  # else the same blocks go on with all they have
            self.partitions.repartition(params_of_groups, carried)
        self._verify()
        self._open_record(self.engine.global_steps, time.perf_counter() - started, released)
        if self._watch is not None:
            self._watch.remember(self._sleeping_blocks())

    def _draw(self, period: int) -> Draw:
        config = self.config
        return sample_period(
            config.lisa_sampler,
            len(self.blocks.layers),
            config.lisa_activated_layers,
            config.lisa_seed,
            period,
            self._weights,
            self._sampled,
        )

    def _agree(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Rank 0's draw for the period, layers and outer block, on every rank."""
        self._compare(self.period, "are in another period")
        draw, names = self._draw(self.period), [block.name for block in self._sampled]
        block = names.index(draw.blocks[0]) if draw.blocks else -1
        padding = [-1] * (self.config.lisa_activated_layers - len(draw.layers))
        message = [self.period, block, *draw.layers, *padding]
        message = torch.tensor(message, dtype=torch.int64, device=self.engine.device)
        dist.broadcast(message, src=0)
        period, block, *layers = message.tolist()
        assert period == self.period
        return tuple(layer for layer in layers if layer >= 0), tuple(names[block : block + 1] if block >= 0 else ())

    def _activate(self) -> None:
        """Let exactly the active blocks require gradients; before there is an engine, all that its optimizer is for."""
        layers, drawn = (self.active_layers, self.active_blocks) if self.partitions is not None else self._widest()
        asleep = self._sleeping_blocks(layers, drawn)
        for block in self.blocks:
            block.requires_grad_(block not in asleep)

    def _verify(self) -> None:
        """Check that all ranks now hold the same layers in the same partitions."""
        held = [self.period, self.active_layers, self.active_blocks, self.partitions.keys()]
        self._compare(held, "hold other layers or partitions")

    def _compare(self, held: object, what_differs: str) -> None:
        """Gather a digest of what each rank holds; every rank raises RuntimeError naming those unlike rank 0."""
        digest = int.from_bytes(hashlib.sha256(json.dumps(held).encode()).digest()[:7], "big")
        mine = torch.tensor([digest], dtype=torch.int64, device=get_accelerator().current_device_name())
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        differing = [rank for rank, theirs in enumerate(every) if theirs.item() != every[0].item()]
        if differing:
            raise RuntimeError(
                f"period {self.period}: ranks {differing} {what_differs} than rank 0 (this is rank {dist.get_rank()} "
                f"with layers {list(self.active_layers)}): all ranks need the same model, the same --lisa_* settings, "
                "the same steps and the same package versions."
            )

    # What is active

    def _outer_blocks(self, drawn: Sequence[str]) -> list[Block]:
        """The outer blocks that train when `drawn` are, in the order of their groups; none without parameters."""
        blocks = [self.blocks.outer(name) for name in OUTER_BLOCKS if name in (*self.config.always_on, *drawn)]
        return [block for block in blocks if block.parameters]

    def _sleeping_blocks(self, layers: Sequence[int] | None = None, drawn: Sequence[str] | None = None) -> list[Block]:
        """What does not train in this period, or would not if others did."""
        layers = self.active_layers if layers is None else layers
        drawn = self.active_blocks if drawn is None else drawn
        active = [*self._outer_blocks(drawn), *(self.blocks.layers[layer] for layer in layers)]
        return [block for block in self.blocks if block not in active]

    def _widest(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Layers in every slot, the active ones first, and every outer block that is ever drawn.

        What the optimizer is built over: DeepSpeed takes no group without parameters.
        """
        others = [layer for layer in range(len(self.blocks.layers)) if layer not in self.active_layers]
        missing = self.config.lisa_activated_layers - len(self.active_layers)
        layers = sorted([*self.active_layers, *others[:missing]])
        return tuple(layers), tuple(block.name for block in self._sampled)

    def _build_groups(self, layers: Sequence[int], drawn: Sequence[str], weight_decay: float = 0.0) -> list[dict]:
        active_layers = [self.blocks.layers[layer] for layer in layers]
        return build_param_groups(self._outer_blocks(drawn), active_layers, weight_decay, self._state_bits)

    def _params_of_groups(self) -> list[list[torch.nn.Parameter]]:
        """The parameters of each group in this period; a group may have none."""
        active = self._build_groups(self.active_layers, self.active_blocks)
        params = {group["lisa_group"]: group["params"] for group in active}
        return [params.get(group["lisa_group"], []) for group in self.param_groups()]

    def _names_of(self, params_of_groups: Iterable[list[torch.nn.Parameter]]) -> list[PartitionKey]:
        names = {id(parameter): name for block in self.blocks for name, parameter in block.parameters.items()}
        return [tuple(names[id(parameter)] for parameter in params) for params in params_of_groups]

    # A switch must not be missed

    def _refuse_missed_switch(self, module: torch.nn.Module, *_) -> None:
        step = self.engine.global_steps
        if module.training and torch.is_grad_enabled() and step // self.config.lisa_interval_steps != self.period:
            raise RuntimeError(self._missed(step))

    def _missed(self, step: int) -> str:
        interval = self.config.lisa_interval_steps
        return (
            f"step {step} is in period {step // interval} (of {interval} steps), but the layers of period "
            f"{self.period} are still active: call on_step_begin() before every step."
        )

    # The log

    def _open_record(self, step: int, seconds: float, bytes_released: int) -> None:
        for layer in self.active_layers:
            self.visit_counts[layer] += 1
        for block in self.active_blocks:
            self.block_visit_counts[block] += 1
        drawn = list(self.active_layers), list(self.active_blocks)
        self._unlogged = PeriodRecord(self.period, step, *drawn, seconds, 0, bytes_released, 0)

    def _close_record(self, step: int) -> None:
        """Complete and write the period's line once its first step has made the moments."""
        record = self._unlogged
        if record is None or step == record.step:
            return
        self._unlogged = None
        record.state_bytes_per_rank = sum(state.nbytes for state in self.partition_states().values())
        record.live_bytes = self.live_bytes()
        record.host_bytes = self.host_states.nbytes
        self.records.append(record)
        if self._log_path is not None:
            if not self._log_begun:
                with replacing(self._log_path) as path:
                    path.write_text(self._earlier_lines(record.step), encoding="utf-8")
                self._log_begun = True
            with self._log_path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(vars(record)) + "\n")

    def _earlier_lines(self, step: int) -> str:
        """The log up to `step` of the run that this one resumes; a line that a kill has cut short ends it."""
        kept = ""
        if self._resumed and self._log_path.is_file():
            for line in self._log_path.read_text(encoding="utf-8").splitlines(keepends=True):
                if not line.endswith("}\n") or json.loads(line)["step"] >= step:
                    break
                kept += line
        return kept

    # State, for a resume

    def state_dict(self) -> dict:
        """Everything that a resumed run needs to activate the same layers before it loads the optimizer."""
        return {
            "version": STATE_VERSION,
            "step": self.engine.global_steps if self.engine is not None else 0,
            "period": self.period,
            "active_layers": list(self.active_layers),
            "active_blocks": list(self.active_blocks),
            "visit_counts": list(self.visit_counts),
            "block_visit_counts": dict(self.block_visit_counts),
            "record": None if self._unlogged is None else vars(self._unlogged).copy(),
            "config": self.config.to_dict(),
            "weights": self._weights,
        }

    def load_state_dict(self, state: dict) -> None:
        """Activate the layers of a saved run; with an engine attached, partition them with masters from the weights.

        Other settings than the run's can only begin with a period: then the layers are those of the new settings.
        Raises ValueError as `check_state_dict` does.
        """
        changed = self.check_state_dict(state)
        self._resumed = True
        self._begun_step = -1
        self.visit_counts = list(state["visit_counts"])
        self.block_visit_counts |= {
            name: count for name, count in state["block_visit_counts"].items() if name in self.block_visit_counts
        }
        if changed:
            self.period = state["step"] // self.config.lisa_interval_steps
            draw = self._draw(self.period)
            self.active_layers, self.active_blocks = draw.layers, draw.blocks
        else:
            self.period = state["period"]
            self.active_layers, self.active_blocks = tuple(state["active_layers"]), tuple(state["active_blocks"])
        self._activate()
        if self.partitions is not None:
            self._skipped_steps = self.engine.skipped_steps
            self.partitions.repartition(self._params_of_groups(), {})
            self._verify()
        self._unlogged = None
        if changed:
            self._open_record(state["step"], seconds=0.0, bytes_released=0)
        elif state["record"] is not None:
            self._unlogged = PeriodRecord(**state["record"])
        if self._watch is not None:
            self._watch.remember(self._sleeping_blocks())

    def check_state_dict(self, state: dict) -> list[str]:
        """The settings in which a saved run differs from this one.

        Raises ValueError when the state is of another model, or when they differ in the middle of a period.
        """
        if state["version"] != STATE_VERSION:
            raise UserError(f"the LISA state has version {state['version']}; this release reads {STATE_VERSION}.")
        if len(state["visit_counts"]) != len(self.blocks.layers):
            raise UserError(
                f"the LISA state is of a model with {len(state['visit_counts'])} decoder layers; this one has "
                f"{len(self.blocks.layers)}."
            )
        saved, mine, step = state["config"], self.config.to_dict(), state["step"]
        changed = [name for name in mine if name not in FREE_SETTINGS and mine[name] != saved.get(name)]
        if self._weights != state["weights"]:  # their file may have moved
            changed.append("lisa_weights_file")
        intervals = (saved["lisa_interval_steps"], self.config.lisa_interval_steps)
        if changed and any(step % interval for interval in intervals):
            listed = ", ".join(f"--{name} {mine[name]} (it had {saved.get(name)})" for name in changed)
            raise UserError(
                f"the run saved at step {step} had other settings than {listed}: they can only change where a period "
                f"begins, at a multiple of {math.lcm(*intervals)} steps. Give the settings it had, or resume from a "
                "checkpoint of such a step."
            )
        return changed


def initialize(
    model: torch.nn.Module,
    ds_config: str | dict,
    config: LisaConfig | None = None,
    *,
    lr: float = 1e-5,
    weight_decay: float = 0.0,
    optim: str = "adamw_torch",
    micro_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 1.0,
    output_dir: str | None = None,
) -> tuple[deepspeed.DeepSpeedEngine, LisaController]:
    """A DeepSpeed engine that trains `model` by LISA, and its controller: the short way for a loop of one's own.

    `ds_config` is a shipped short name (zero1, zero2, zero3, zero2_offload, ...), a path, or a dict; its "auto" values
    are filled in from the arguments. Call `lisa.on_step_begin()` before every step.
    """
    filled = load_ds_config(
        ds_config,
        model=model,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_grad_norm=max_grad_norm,
    )
    check_ds_config(filled)
    lisa = LisaController(model, config or LisaConfig())
    groups = lisa.param_groups(weight_decay)
    optimizer = build_optimizer(groups, optim, lr=lr, offload=uses_optimizer_offload(filled))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=filled)
    lisa.attach(engine, output_dir)
    return engine, lisa
