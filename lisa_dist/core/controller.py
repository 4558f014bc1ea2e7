"""When to switch, and the order of a switch.

One period, K optimizer steps long, as it runs on every rank::

    on_step_begin()                 step s, s % K == 0: the step before has written its weights back
      look       adaptive alone: gradient norms of the layers that end, from AdamW's moments, 8 gamma bytes summed
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
from collections.abc import Callable, Iterable

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.config import LisaConfig, UserError
from lisa_dist.core.blocks import find_blocks
from lisa_dist.core.checkpointing import check_checkpointing, let_backward_end
from lisa_dist.core.groups import split_by_decay
from lisa_dist.core.guards import NonfiniteGuard, SleepingWeights
from lisa_dist.core.importance import observe_layers
from lisa_dist.core.live_bytes import live_tensor_bytes
from lisa_dist.core.movement import WeightMovement
from lisa_dist.core.period_log import PeriodLog, PeriodRecord
from lisa_dist.core.sampling import Draw
from lisa_dist.core.selection import BlockSelection
from lisa_dist.core.warmup import WakeWarmup
from lisa_dist.optim.states import CopyStream, HostStates, PartitionKey, PartitionState, Piece, states_to_carry
from lisa_dist.zero.cpu_ops import release_shared_memory
from lisa_dist.zero.overrides import override_construction
from lisa_dist.zero.partitions import ZeroPartitions
from lisa_dist.zero.stages import check_deepspeed

STATE_VERSION = 1
# Settings that a resumed run may give otherwise at any step: they do not decide on layers or groups of the period that
# it is in.
FREE_SETTINGS = (
    "lisa_state",
    "lisa_offload",
    "lisa_master",
    "lisa_nonfinite",
    "lisa_layers_attribute",
    "lisa_weights_file",
    "lisa_importance",
    "lisa_importance_decay",
    "lisa_importance_temperature",
    "lisa_importance_floor",
    "lisa_lr_power",
    "lisa_wake_warmup_steps",
    "lisa_debug",
)


class LisaController:
    """Draws the active layers, freezes the rest, and switches both at the start of every period.

    Build it on the model before the optimizer exists: it finds the blocks and activates the layers of period 0. Then
    `param_groups` is for the optimizer, `attach` for the DeepSpeed engine, and `on_step_begin` for every step.

    Raises ValueError for a model or an engine that LISA cannot train, RuntimeError when a switch was missed or ranks
    disagree.
    """

    def __init__(self, model: torch.nn.Module, config: LisaConfig):
        check_deepspeed()
        override_construction()
        self.config = config
        self.blocks = find_blocks(model, config.lisa_layers_attribute)
        self.selection = BlockSelection(config, self.blocks)
        self.period = 0
        self.active = self.selection.draw(0)
        self.visit_counts = [0] * len(self.blocks.layers)
        self.block_visit_counts = {block.name: 0 for block in self.selection.sampled}
        self.engine: deepspeed.DeepSpeedEngine | None = None
        self.partitions: ZeroPartitions | None = None
        self._log = PeriodLog()
        self.host_states: HostStates | None = None
        self._nonfinite: NonfiniteGuard | None = None
        self._watch: SleepingWeights | None = None
        self._warmup: WakeWarmup | None = None
        self.movement: WeightMovement | None = None  # of weights, once there is an engine
        self._begun_step = -1  # the last step that on_step_begin has seen
        if dist.is_initialized():
            held = [config.to_dict(), self.selection.weights, len(self.blocks.layers)]
            self._compare(held, "have other --lisa_* settings or another model")
        self._activate()

    @property
    def active_layers(self) -> tuple[int, ...]:
        """The decoder layers that train in this period."""
        return self.active.layers

    @property
    def active_blocks(self) -> tuple[str, ...]:
        """The outer blocks that train in this period beside those that are always on."""
        return self.active.blocks

    @property
    def records(self) -> list[PeriodRecord]:
        """The lines of the log so far, one a period."""
        return self._log.records

    # For the optimizer and the engine

    def param_groups(self, weight_decay: float = 0.0) -> list[dict]:
        """Parameter groups for the optimizer, the same number and order in every period.

        Where outer blocks are drawn, those of all that a period may train: `attach` cuts them down to period 0's.
        """
        return self.selection.param_groups(self.active, weight_decay)

    def attach(self, engine: deepspeed.DeepSpeedEngine, output_dir: str | None = None) -> None:
        """Take over a DeepSpeed engine whose optimizer was built from `param_groups`.

        With `output_dir`, rank 0 writes a line for each period to lisa_log.jsonl and to lisa_movement.jsonl there.
        """
        self.partitions = ZeroPartitions(engine)
        self.engine = engine
        let_backward_end(engine.module)
        self.host_states = HostStates(CopyStream(engine.device))
        self.partitions.before_step(self.host_states.copies.wait)
        self.partitions.before_step(self._refuse_missed_step)
        if self.config.lisa_wake_warmup_steps:
            optimizer, steps = self.partitions.optimizer, self.config.lisa_wake_warmup_steps
            self._warmup = WakeWarmup(optimizer, steps, self._steps_of_period)
        if self.config.lisa_state == "keep" and engine.zero_round_robin_gradients():
            raise UserError(
                "the DeepSpeed config has round_robin_gradients = true: with --lisa_state keep it must be false."
            )
        self._check_masters()
        check_checkpointing(engine.module)
        self._nonfinite = NonfiniteGuard(engine, self.config.lisa_nonfinite)
        mine = self.selection.names_of(group["params"] for group in self.param_groups())
        theirs = self.partitions.keys()
        if mine != theirs:
            raise UserError(
                f"the engine optimizes {len(theirs)} groups of parameters that are not the {len(mine)} groups of the "
                "active blocks: build its optimizer from param_groups() of this controller, and keep "
                "zero_optimization.sub_group_size larger than a block."
            )
        trainable = [block for block in self.blocks if block.name not in (*self.config.frozen, "outside")]
        self.movement = WeightMovement(self.partitions, trainable)
        if output_dir is not None and dist.get_rank() == 0:
            self._log.write_to(output_dir)
            self.movement.write_to(output_dir)
        self.active = self._agree()
        if self.selection.sampled:
            self._activate()
            self.partitions.wait_for_device()
            self.partitions.repartition(self.selection.params_of_groups(self.active), {}, self.host_states.copies)
        else:
            self.partitions.adapt()
        self._verify()
        release_shared_memory()
        if self.config.lisa_debug:
            self._watch = SleepingWeights(self.partitions)
            self._watch.remember(self.selection.asleep(self.active))
        engine.module.register_forward_pre_hook(self._refuse_missed_switch)
        if not self._log.resumed:
            self._begin_record(engine.global_steps, seconds=0.0, bytes_released=0)

    def _check_masters(self) -> None:
        keys = "bf16_master_weights_and_grads and bf16_optimizer_states in the bf16 section of the DeepSpeed config"
        wanted, found = self.config.lisa_master == "bf16_sr", self.partitions.keeps_no_masters
        if wanted and not (found and self.partitions.coding == "lisa"):
            raise UserError(
                f"--lisa_master bf16_sr: the engine was built with masters, or with another optimizer; set {keys}, and "
                'take build_optimizer(..., "lisa_adamw"), as lisa_dist.initialize does.'
            )
        if found and not wanted:
            raise UserError(
                f"--lisa_master fp32: the engine keeps no masters in fp32, by {keys}; leave them out, or use "
                "--lisa_master bf16_sr with --optim lisa_adamw."
            )

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
        self._log.close(step, self._measure)
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
        if self.config.lisa_state != "keep" or self.config.lisa_activated_layers == 0:  # what sleeps never wakes
            return
        for block in self.selection.asleep(self.active):
            group = block.name if block.name in self.block_visit_counts else "slot0"
            for kind, params in split_by_decay(block).items():
                (key,) = self.selection.names_of([params])
                pieces, numel = self.partitions.layout(params)
                fields = read(key, pieces, numel)
                if fields is not None:
                    self.host_states.put(key, self.partitions.state_of(f"{group}/{kind}", pieces, fields), pieces)

    def live_bytes(self) -> int:
        """Bytes that tensors hold on this rank's device right now."""
        return live_tensor_bytes(self.engine.device)

    def note_loss(self, loss: torch.Tensor) -> None:
        """Remember on this rank whether the loss of a micro-batch was finite, for `check_finite` to name the rank."""
        self._nonfinite.note_loss(loss)

    def check_finite(self) -> None:
        """Raise RuntimeError, on every rank, when DeepSpeed left the last step out and --lisa_nonfinite is stop.

        Weights and states are as they were before that step. In fp16 leaving steps out is the loss scaler's work.
        """
        self._nonfinite.check(f"period {self.period}, active layers {list(self.active_layers)}")

    def close(self) -> None:
        """Write the last period's line of the log; call after the last step."""
        self.check_finite()
        if self._watch is not None:
            self._watch.check(self.period)
        self._log.close(self.engine.global_steps, self._measure)
        self._note_movement()

    # A switch, in order

    def _switch(self, period: int) -> None:
        if self._watch is not None:
            self._watch.check(self.period)
        started = time.perf_counter()
        self._note_movement()
        observe_layers(self)
        self.period = period
        self.active = self._agree()
        self._activate()
        params_of_groups = self.selection.params_of_groups(self.active)
        self.partitions.wait_for_device()  # here, so that what is kept goes to the host while the next period begins
        states = self.partitions.states()
        next_keys = self.selection.names_of(params_of_groups)
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
            self.partitions.repartition(params_of_groups, carried, self.host_states.copies)
        if self._warmup is not None:
            fresh = [key for key in next_keys if key not in carried or not carried[key].optimizer_state]
            self._warmup.wake(self._groups_of(fresh))
        self._verify()
        self._begin_record(self.engine.global_steps, time.perf_counter() - started, released)
        if self._watch is not None:
            self._watch.remember(self.selection.asleep(self.active))

    def _note_movement(self) -> None:
        """Look at the weights of the blocks whose period ends."""
        asleep = self.selection.asleep(self.active)
        trained = [block.name for block in self.blocks if block.parameters and block not in asleep]
        self.movement.end_period(self.period, self.engine.global_steps, trained)

    def _groups_of(self, keys: list[PartitionKey]) -> set[str]:
        """The names of the parameter groups that hold these partitions now."""
        groups = zip(self.partitions.optimizer.param_groups, self.partitions.keys(), strict=True)
        return {group["lisa_group"] for group, key in groups if key in keys}

    def _steps_of_period(self) -> int:
        """Steps that have been taken of this period."""
        return self.engine.global_steps - self.period * self.config.lisa_interval_steps

    def _agree(self) -> Draw:
        """Rank 0's draw for the period, on every rank."""
        self._compare(self.period, "are in another period")
        draw, names = self.selection.draw(self.period), [block.name for block in self.selection.sampled]
        block = names.index(draw.blocks[0]) if draw.blocks else -1
        padding = [-1] * (self.config.lisa_activated_layers - len(draw.layers))
        message = [self.period, block, *draw.layers, *padding]
        message = torch.tensor(message, dtype=torch.int64, device=self.engine.device)
        dist.broadcast(message, src=0)
        period, block, *layers = message.tolist()
        assert period == self.period
        return Draw(tuple(layer for layer in layers if layer >= 0), (names[block],) if block >= 0 else ())

    def _activate(self) -> None:
        """Let exactly the active blocks require gradients; before there is an engine, all that its optimizer is for."""
        attached = self.partitions is not None
        self.selection.activate(self.active if attached else self.selection.widest(self.active))

    def _verify(self) -> None:
        """Check that all ranks now hold the same layers in the same partitions."""
        held = [self.period, self.active_layers, self.active_blocks, self.partitions.keys(), self.selection.weights_now]
        self._compare(held, "hold other layers, partitions or weights of the draw")

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

    # A switch must not be missed

    def _refuse_missed_switch(self, module: torch.nn.Module, *_) -> None:
        step = self.engine.global_steps
        if module.training and torch.is_grad_enabled() and step // self.config.lisa_interval_steps != self.period:
            raise RuntimeError(self._missed(step))

    def _refuse_missed_step(self, *_) -> None:
        """The same at the optimizer's step, whatever mode the model is in: no forward pass but training leads here."""
        step = self.engine.global_steps
        if step // self.config.lisa_interval_steps != self.period:
            raise RuntimeError(self._missed(step))

    def _missed(self, step: int) -> str:
        interval = self.config.lisa_interval_steps
        return (
            f"step {step} is in period {step // interval} (of {interval} steps), but the layers of period "
            f"{self.period} are still active: call on_step_begin() before every step."
        )

    # The log

    def _begin_record(self, step: int, seconds: float, bytes_released: int) -> None:
        for layer in self.active_layers:
            self.visit_counts[layer] += 1
        for block in self.active_blocks:
            self.block_visit_counts[block] += 1
        drawn = list(self.active_layers), list(self.active_blocks)
        odds = self.selection.probabilities(self.active)
        self._log.open(PeriodRecord(self.period, step, *drawn, seconds, 0, bytes_released, 0, probabilities=odds))

    def _measure(self) -> dict[str, int]:
        """Bytes of this rank, once the period's first step has made the moments."""
        return {
            "state_bytes_per_rank": sum(state.nbytes for state in self.partition_states().values()),
            "live_bytes": self.live_bytes(),
            "host_bytes": self.host_states.nbytes,
        }

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
            "record": self._log.state_dict(),
            "config": self.config.to_dict(),
            "weights": self.selection.weights,
            "importance": None if self.selection.importance is None else self.selection.importance.state_dict(),
            "woken": [] if self._warmup is None else sorted(self._warmup.woken),
        }

    def load_state_dict(self, state: dict) -> None:
        """Activate the layers of a saved run; with an engine attached, partition them with masters from the weights.

        Other settings than the run's can only begin with a period: then the layers are those of the new settings.
        Raises ValueError as `check_state_dict` does.
        """
        changed = self.check_state_dict(state)
        self._log.resumed = True
        self._begun_step = -1
        self.visit_counts = list(state["visit_counts"])
        self.block_visit_counts |= {
            name: count for name, count in state["block_visit_counts"].items() if name in self.block_visit_counts
        }
        # Norms of gradients and of updates are numbers of two kinds: by another --lisa_importance they begin anew.
        same_kind = state["config"].get("lisa_importance") == self.config.lisa_importance
        if self.selection.importance is not None and state.get("importance") is not None and same_kind:
            self.selection.importance.load_state_dict(state["importance"])
        if self._warmup is not None:
            self._warmup.wake(() if changed else state.get("woken", ()))
        if changed:
            self.period = state["step"] // self.config.lisa_interval_steps
            self.active = self.selection.draw(self.period)
        else:
            self.period = state["period"]
            self.active = Draw(tuple(state["active_layers"]), tuple(state["active_blocks"]))
        self._activate()
        if self.partitions is not None:
            self._nonfinite.resume()
            self.partitions.wait_for_device()
            self.partitions.repartition(self.selection.params_of_groups(self.active), {}, self.host_states.copies)
            self._verify()
        if changed:
            self._begin_record(state["step"], seconds=0.0, bytes_released=0)
        else:
            self._log.open(None if state["record"] is None else PeriodRecord(**state["record"]))
        if self._watch is not None:
            self._watch.remember(self.selection.asleep(self.active))

    def begin_afresh(self, keys: Iterable[PartitionKey]) -> None:
        """These partitions have fresh moments, by other settings than a saved run's: they warm up as woken ones do."""
        if self._warmup is not None:
            self._warmup.wake(self._groups_of(list(keys)))

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
        if self.selection.weights != state["weights"]:  # their file may have moved
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
