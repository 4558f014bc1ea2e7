"""When to switch, and the order of a switch.

One period, K optimizer steps long, as it runs on every rank::

    on_step_begin()                 step s, s % K == 0: the step before has written its weights back
      observe    adaptive alone: gradient norms of the layers whose period ends, from AdamW's moments, 8 gamma bytes
      sample     all compare their period: 8 W bytes gathered; rank 0 samples and broadcasts (period, outer block,
                 layers): 8 (gamma + 2) bytes
      activate   requires_grad of what is activated and what becomes inactive, whose gradients become None
      freeze     --lisa_frozen_bits alone: inactive layers become codes, activated ones are copied from their originals
      partition  ZeroPartitions.repartition: states of blocks that stay active move over, of activated ones are new
      verify     each rank hashes what it now holds and all compare: 8 W bytes gathered
    forward, backward, step         K times; on_step_begin() between them is one comparison
    ...

Source: Algorithm 1 of the LISA paper. A switch never happens inside the optimizer's step, where the last update of the
period would be lost.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.config import LisaConfig
from lisa_dist.core.activation_checkpointing import check_checkpointing, let_backward_end
from lisa_dist.core.adapters import add_adapters, merge_in_state
from lisa_dist.core.blocks import DecayRule, find_blocks, split_into_modules
from lisa_dist.core.engine_checks import check_engine, check_no_adapters, check_not_quantized, check_weights
from lisa_dist.core.frozen_layers import make_room_for_weights, quantize_frozen_layers
from lisa_dist.core.guards import (
    InactiveWeights,
    NonfiniteGuard,
    broadcast_active_set,
    compare_ranks,
    guard_switches,
    missed_switch,
)
from lisa_dist.core.layer_weights import observe_layers
from lisa_dist.core.live_bytes import live_tensor_bytes
from lisa_dist.core.period_log import PeriodLog, PeriodRecord, WeightMovement
from lisa_dist.core.run_state import STATE_VERSION, BlockChanges, changed_settings
from lisa_dist.core.sampling import ActiveSet
from lisa_dist.core.selection import BlockSelection, scale_rates
from lisa_dist.core.sequence_parallel import SequenceParallel
from lisa_dist.distributed.devices import prepare_device
from lisa_dist.optim.states import (
    CopyStream,
    HostStates,
    PartitionKey,
    PartitionState,
    Piece,
    check_steps_are_counted,
    states_to_carry,
)
from lisa_dist.run_folder import LOG_NAME
from lisa_dist.zero.cpu_ops import release_shared_memory
from lisa_dist.zero.overrides import override_construction
from lisa_dist.zero.partitions import ZeroPartitions
from lisa_dist.zero.stage3 import gather_by_layers
from lisa_dist.zero.stages import check_deepspeed


class LisaController:
    """Samples the active layers, freezes the rest, and switches both at the start of every period.

    Build it on the model before the optimizer exists: it finds the blocks and activates the layers of period 0. Then
    `param_groups` is for the optimizer, `attach` for the DeepSpeed engine, and `on_step_begin` for every step. Raises
    UserError for what LISA cannot train, RuntimeError when a switch was missed or ranks disagree.
    """

    def __init__(self, model: torch.nn.Module, config: LisaConfig, decaying: DecayRule | None = None):
        check_deepspeed()
        override_construction()
        self.config = config
        check_no_adapters(model, config.lisa_adapters)
        check_not_quantized(model)
        prepare_device()
        has_weights = not (config.frozen_flags and make_room_for_weights(model))
        self.blocks = find_blocks(model, config.lisa_layers_attribute)
        if config.by_module:
            self.blocks = split_into_modules(model, self.blocks)
        self.blocks.decay_by(model, decaying)
        check_weights(self.blocks)
        self.blocks.leave_out_frozen()
        if config.lisa_adapters is not None:
            add_adapters(model, self.blocks, config.lisa_adapters, config.lisa_seed)
        self.selection = BlockSelection(config, self.blocks)
        self.period = 0
        self.active = self.selection.sample(0)
        self.visit_counts = [0] * len(self.blocks.layers)
        self.block_visit_counts = {block.name: 0 for block in self.selection.sampled}
        self.is_attached = False
        self.changes = BlockChanges()
        self.change_logs = [self.changes]  # and of who else is to know
        self.tiles = contextlib.ExitStack()  # of MLPs, which a trainer has
        self.at_close: Callable[[], object] = lambda: None
        self.sequence: SequenceParallel | None = None  # where ranks share rows
        self.gathers_layers = False  # at once, of ZeRO-3
        self._log = PeriodLog()
        self._begun_step = -1  # the last step that on_step_begin has seen
        if dist.is_initialized():
            settings = [config.to_dict(), self.selection.weights, len(self.blocks.layers)]
            self._compare(settings, "have other --lisa_* settings or another model")
        self.frozen_layers = quantize_frozen_layers(
            model, self.blocks, config, self.selection.widest(self.active).layers, has_weights
        )
        if config.lisa_adapters is not None:  # after the hook of frozen layers, which puts originals there
            model.register_state_dict_post_hook(merge_in_state)
        self._activate()

    @property
    def active_layers(self) -> tuple[int, ...]:
        """The decoder layers, or with --lisa_unit module the modules, that train in this period."""
        return self.active.layers

    @property
    def active_blocks(self) -> tuple[str, ...]:
        """The outer blocks that train in this period in addition to the always-trained ones."""
        return self.active.blocks

    @property
    def records(self) -> list[PeriodRecord]:
        """The lines of the log so far, one a period."""
        return self._log.records

    # For the optimizer and the engine

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer, the same number and order in every period.

        With sampled outer blocks they cover every block that any period may train; `attach` then keeps period 0's.
        """
        return self.selection.param_groups(self.active, weight_decay)

    def gather_by_layers(self, model: Any, ds_config: dict[str, Any]) -> None:
        """Before the engine is built by a DeepSpeed config, changed in place: of ZeRO-3, see `zero/stage3.py`."""
        layers = list(model.get_submodule(self.blocks.layers_path).children())
        self.gathers_layers = gather_by_layers(model, layers, ds_config)

    def attach(self, engine: deepspeed.DeepSpeedEngine, output_dir: str | None = None) -> None:
        """Take over a DeepSpeed engine whose optimizer was built from `param_groups`.

        With `output_dir`, rank 0 writes a line for each period to lisa_log.jsonl and to lisa_movement.jsonl there.
        """
        config, partitions = self.config, ZeroPartitions(engine)
        check_engine(partitions, config, self.selection.names_of(group["params"] for group in self.param_groups()))
        check_checkpointing(engine.module)
        self.partitions, self.engine = partitions, engine
        let_backward_end(engine.module)
        self.host_states = HostStates(CopyStream(engine.device))
        partitions.optimizer.register_step_pre_hook(self.host_states.copies.wait)
        guard_switches(partitions, config.lisa_interval_steps, lambda: self.period)
        scale_rates(partitions.optimizer, config.lr_scales)
        self._nonfinite = NonfiniteGuard(engine, config.lisa_nonfinite)
        self._inactive_weights = InactiveWeights(partitions, config.lisa_debug)
        folder = output_dir if dist.get_rank() == 0 else None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._log.path = Path(folder) / LOG_NAME
        trainable = [block for block in self.blocks if block.name not in (*config.frozen, "outside")]
        self.movement = WeightMovement(partitions, trainable, folder)
        self.is_attached = True
        self.active = self._agree(self.active)
        if self.selection.sampled or config.by_module:
            self.activate_from_weights(self.active)
        else:
            partitions.apply_overrides(self.host_states.copies)
            self._verify()
        release_shared_memory()
        if not self._log.resumed:
            self._begin_record(engine.global_steps, seconds=0.0, bytes_released=0)

    # The loop

    def on_step_begin(self) -> bool:
        """Call before every step, or every micro-batch: switches when a period begins. Returns whether it did.

        It goes by the engine's own step count, so a period is K optimizer steps whatever the accumulation.
        """
        assert self.is_attached, "attach the controller to a DeepSpeed engine first"
        step: int = self.engine.global_steps
        if step == self._begun_step:
            return False
        self.check_finite()
        self._log.close(step, self._measure)
        period = step // self.config.lisa_interval_steps
        is_due = period != self.period
        if is_due:
            if period != self.period + 1 or step % self.config.lisa_interval_steps != 0:
                raise missed_switch(step, self.config.lisa_interval_steps, self.period)
            self._switch(period)
        self._begun_step = step
        return is_due

    def note_loss(self, loss: torch.Tensor) -> None:
        """Remember on this rank whether the loss of a micro-batch was finite, for `check_finite` to name the rank."""
        self._nonfinite.note_loss(loss)

    def check_finite(self) -> None:
        """Raise RuntimeError, on every rank, when DeepSpeed left the last step out and --lisa_nonfinite is stop."""
        self._nonfinite.check(f"period {self.period}, active layers {list(self.active_layers)}")

    def close(self) -> None:
        """Write the last period's line of the log, give model and output folder back; call after the last step."""
        try:
            self.check_finite()
            self._inactive_weights.check(self.period)
            self._log.close(self.engine.global_steps, self._measure)
            self.movement.end_period(self.period, self.engine.global_steps, self._trained)
        finally:
            self.release()

    def release(self) -> None:
        """Give model and output folder back, whatever has become of the run."""
        self.partitions.close()
        self.blocks.give_back()
        self.tiles.close()
        if self.sequence is not None:
            self.sequence.close()
        self.at_close()

    @property
    def rows_per_step(self) -> int:
        """Rows of a step on all ranks, each once."""
        return int(self.engine.train_batch_size()) // (self.sequence.size if self.sequence else 1)

    def live_bytes(self) -> int:
        """Bytes that tensors hold on this rank's device right now."""
        return live_tensor_bytes(self.engine.device)

    # A switch, in order

    def _switch(self, period: int) -> None:
        self._inactive_weights.check(self.period)
        started = time.perf_counter()
        self.note_changes()
        self.movement.end_period(self.period, self.engine.global_steps, self._trained)
        if self.selection.importance is not None:  # of the sampler "adaptive"
            observe_layers(self.selection.importance, self.active_layers, self.partitions, self.selection.layer_of)
        self.period = period
        self.active = self._agree(self.selection.sample(period))
        self._activate()
        get_accelerator().synchronize()  # here, so that copies to the host overlap the next step
        states = self.partitions.states()
        next_keys = self.selection.names_of(self.selection.params_of_groups(self.active))
        if self.config.lisa_state == "keep":  # states of blocks that become inactive
            pieces = self.partitions.pieces()
            for key in states.keys() - set(next_keys):
                self.host_states.put(key, states[key], pieces[key])
        carried = states_to_carry(states, self.config.lisa_state, next_keys, self.host_states)
        staying_bytes = sum(state.nbytes for key, state in carried.items() if key in states)
        released_bytes = sum(state.nbytes for state in states.values()) - staying_bytes
        is_changed = released_bytes > 0 or states.keys() != {key for key in next_keys if key}
        del states  # states that are dropped must be freed before those of activated blocks are allocated
        if is_changed:  # otherwise the same blocks go on with all they have
            self._repartition(carried)
        self._verify()
        self._begin_record(self.engine.global_steps, time.perf_counter() - started, released_bytes)

    def _agree(self, sampled: ActiveSet) -> ActiveSet:
        """Rank 0's sample for the period, on every rank."""
        self._compare(self.period, "are in another period")
        names = [block.name for block in self.selection.sampled]
        return broadcast_active_set(sampled, self.period, self.selection.most_active, names, self.engine.device)

    def _activate(self) -> None:
        """Let the active blocks alone require gradients; before `attach`, all that the optimizer is built over."""
        self.selection.activate(self.active if self.is_attached else self.selection.widest(self.active))

    def _repartition(self, carried: Mapping[PartitionKey, PartitionState]) -> None:
        if self.frozen_layers is not None:  # with --lisa_frozen_bits 8 or 4
            self.frozen_layers.switch(self.active_layers)
        self.partitions.repartition(self.selection.params_of_groups(self.active), carried, self.host_states.copies)

    def _verify(self) -> None:
        """Check that all ranks now have the same layers in the same partitions; with --lisa_debug, inactive weights."""
        weights = [f"{weight:.9g}" for weight in self.selection.weights_now or ()]  # last bits may be a host's own
        state = [self.period, self.active_layers, self.active_blocks, self.partitions.keys(), weights]
        self._compare(state, "hold other layers, partitions or sampling weights")
        self._inactive_weights.remember(self.selection.inactive(self.active))

    @property
    def _trained(self) -> list[str]:
        return [block.name for block in self.selection.trained(self.active)]

    def _compare(self, value: object, what_differs: str) -> None:
        compare_ranks(value, what_differs, f"period {self.period}, active layers {list(self.active_layers)}")

    # The log

    def _begin_record(self, step: int, seconds: float, bytes_released: int) -> None:
        for layer in self.active_layers:
            self.visit_counts[layer] += 1
        for block in self.active_blocks:
            self.block_visit_counts[block] += 1
        record = PeriodRecord(self.period, step, list(self.active_layers), list(self.active_blocks), seconds)
        record.bytes_released = bytes_released
        record.probabilities = self.selection.probabilities(self.active)
        self._log.open(record)

    def _measure(self) -> dict[str, int]:
        """Bytes of this rank, once the period's first step has made the moments, which are looked at here."""
        states = self.partition_states().values()
        check_steps_are_counted(states)
        return {
            "state_bytes_per_rank": sum(state.nbytes for state in states),
            "live_bytes": self.live_bytes(),
            "host_bytes": self.host_states.nbytes,
        }

    # State, for a save and a resume

    def partition_states(self) -> dict[PartitionKey, PartitionState]:
        """This rank's masters and optimizer states, keyed by the names of the parameters they were cut from."""
        return self.partitions.states()

    def note_changes(self) -> None:
        """Note for the next checkpoint, and whoever else is to know, which weights this period's steps have changed."""
        has_begun = self.engine.global_steps > self.period * self.config.lisa_interval_steps
        for log in self.change_logs if has_begun else ():
            log.note(self._trained, self.engine.global_steps)

    def forget_changes(self) -> None:
        """All weights have changed, and not by steps."""
        for log in self.change_logs:
            log.forget()

    def saved_states(self) -> tuple[dict[PartitionKey, PartitionState], dict[PartitionKey, list[Piece]]]:
        """What a checkpoint holds of this rank's optimizer: active and kept partitions, and the pieces of each."""
        get_accelerator().synchronize()  # copies to the host are not waited for
        states, pieces = self.partitions.states(), self.partitions.pieces()
        return states | self.host_states.states, pieces | self.host_states.pieces

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to activate the same layers before it loads the optimizer."""
        return {
            "version": STATE_VERSION,
            "step": self.engine.global_steps if self.is_attached else 0,
            "period": self.period,
            "active_layers": list(self.active_layers),
            "active_blocks": list(self.active_blocks),
            "visit_counts": list(self.visit_counts),
            "block_visit_counts": dict(self.block_visit_counts),
            "record": self._log.state_dict(),
            "config": self.config.to_dict(),
            **self.selection.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Activate the layers of a saved run; with an engine attached, partition them with masters from the weights.

        Where other settings begin a period the layers are those of the new settings. Raises UserError as
        `check_state_dict` does.
        """
        changed = self.check_state_dict(state)
        self._log.resume()
        self._begun_step = -1
        self.visit_counts = list(state["visit_counts"])
        counts = state["block_visit_counts"]
        self.block_visit_counts |= {name: counts[name] for name in self.block_visit_counts if name in counts}
        self.selection.load_state_dict(state)
        if changed:
            self.period = state["step"] // self.config.lisa_interval_steps
            active = self.selection.sample(self.period)
        else:
            self.period = state["period"]
            active = ActiveSet(tuple(state["active_layers"]), tuple(state["active_blocks"]))
        if self.frozen_layers is not None and not self.is_attached:
            self.frozen_layers.switch(self.selection.widest(active).layers)
        self.activate_from_weights(active)
        if changed:
            self._begin_record(state["step"], seconds=0.0, bytes_released=0)
        else:
            self._log.open(None if state["record"] is None else PeriodRecord(**state["record"]))

    def activate_from_weights(self, active: ActiveSet) -> None:
        """Let these blocks train, with masters from the weights as they are and fresh moments; between two steps."""
        self.active = active
        self._activate()
        if self.is_attached:
            self._nonfinite.resume()
            get_accelerator().synchronize()
            self._repartition({})
            self._verify()

    def check_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Describe the settings that differ from a saved run's. Raises UserError as `changed_settings` does."""
        return changed_settings(state, self.config, len(self.blocks.layers), self.selection.weights)
