"""Estimate the memory of a training step before it runs: by part, on each rank's device and host.

What the model itself allocates is counted on fake tensors (`trace.py`). `plan_memory` adds what DeepSpeed allocates, in
the sizes that it gives to partitions and buffers at each ZeRO stage:

    static        = weights + states + buffers
    peak_backward = static + peak of activations, gradients, buckets and reductions (`gradient_peak.py`)
    peak_step     = static + largest of: gradients and a gradient's norm, gradients that are left and a group's step

`StepMeter` in meter.py measures the same parts of a real step. All sizes are bytes of one rank. A plan is of the worst
period: the largest blocks that a period may train, with the lowest layers, since the backward pass ends at the lowest
active one where the embedding is frozen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import FACTORED
from lisa_dist.core.frozen_layers import held_bytes
from lisa_dist.core.selection import sampled_blocks
from lisa_dist.kernels.adamw import chunk_bytes
from lisa_dist.kernels.dynamic_code import table_bytes
from lisa_dist.kernels.factored import factored_chunk_bytes, num_rows
from lisa_dist.memory.gradient_peak import (
    Peak,
    backward_peak,
    backward_peak_stage_1,
    gathered_weights,
    kept_gradient_numel,
    norm_scratch_in_chunks,
    norm_scratch_of_deepspeed,
    norm_scratch_on_cpu,
    reduction_stage_3,
    reduction_stages_1_2,
    slices_by_rank,
)
from lisa_dist.memory.parts import GROUP_GRADIENTS, STATES, WEIGHTS, MemoryParts
from lisa_dist.memory.states import group_state_bytes, steps_weights
from lisa_dist.memory.trace import Arrival, FakeRun, FakeRuns, StepTrace
from lisa_dist.memory.workload import Group, StageSettings, Trained, Workload, widest_periods
from lisa_dist.optim.build import BITSANDBYTES_ADAMW, LISA_ADAMW
from lisa_dist.optim.row_gradient import slab_numel
from lisa_dist.optim.states import pinned_block
from lisa_dist.zero.layout import partition_numel, pieces_of_group, share_numel

# Bytes an element that AdamW on the host allocates while it steps, on top of masters, moments and gradients.
_HOST_STEP_BYTES = {"adamw_torch_fused": 0, "adamw_torch": 8, "bitsandbytes": 12}


@dataclass(frozen=True)
class StepEstimate:
    """The memory that one rank needs for the steps of a run, whatever their micro-batch is and what they train.

    `config`: of other methods than LISA one without periods; `optim` and `method` are --optim and --method.
    `accumulates`, `on_cpu`: as for `plan_memory`.
    """

    runs: FakeRuns
    config: LisaConfig
    world_size: int
    optim: str
    method: str = "lisa"
    lora_rank: int = 0
    accumulates: bool = False
    on_cpu: bool = False
    _groups: dict[tuple[Workload, Trained | None, bool], list[Group]] = field(default_factory=dict)

    def run(self, workload: Workload) -> FakeRun:
        """The model that computes a micro-batch."""
        config = self.config
        workload = replace(workload, frozen_bits=config.lisa_frozen_bits, by_module=config.by_module)
        return self.runs.of(workload, self.lora_rank, config.lisa_layers_attribute)

    def of(
        self, settings: StageSettings, workload: Workload, trained: Trained | None, rank: int | None = None
    ) -> tuple[MemoryParts, dict[str, int]]:
        """Parts of device and host of a step that trains these blocks, for None all that is trainable."""
        run, config = self.run(workload), self.config
        by_rows = settings.reduces_rows(self.optim, self.method)
        key = workload, trained, by_rows
        if key not in self._groups:
            self._groups[key] = run.groups(trained, self.optim, config.state_bits, config.offloaded, by_rows)
        groups = self._groups[key]
        return plan_memory(
            run,
            groups,
            run.trace(groups),
            settings,
            self.world_size,
            optim=self.optim,
            master=config.lisa_master,
            rank=rank,
            accumulates=self.accumulates,
            on_cpu=self.on_cpu,
            plain=self.method != "lisa",
            keeps=config.lisa_state == "keep",
        )

    def worst(self, settings: StageSettings, workload: Workload) -> tuple[MemoryParts, dict[str, int]]:
        """The most that a period's step may need, on the device and on the host."""
        periods: Sequence[Trained | None] = [None]
        if self.method == "lisa":
            blocks = self.run(workload).blocks
            sampled = sampled_blocks(self.config, blocks)
            periods = widest_periods(self.config, blocks, sampled, workload.checkpointed_layers)
        planned = [self.of(settings, workload, period) for period in periods]
        parts = max((parts for parts, _ in planned), key=lambda parts: parts.needed)
        return parts, max((host for _, host in planned), key=lambda host: sum(host.values()))


def plan_memory(
    run: FakeRun,
    groups: Sequence[Group],
    trace: StepTrace,
    settings: StageSettings,
    world_size: int,
    *,
    optim: str = "adamw_torch_fused",
    master: str = "fp32",
    rank: int | None = None,
    accumulates: bool = False,
    on_cpu: bool = False,
    plain: bool = False,
    keeps: bool = False,
) -> tuple[MemoryParts, dict[str, int]]:
    """The parts of one rank's device memory, and of its host memory, in bytes.

    `optim` and `master` are those of the run (--optim, --lisa_master). `rank`: which one is planned; by default the one
    that needs most. `accumulates`: a step has several micro-batches, and the gradients of the earlier ones wait for the
    last. `on_cpu`: host and device are one, and the parts of the device include those of the host. `plain`: DeepSpeed
    without the overrides of `zero/`, as other methods run it. `keeps`: --lisa_state keep.
    """
    ranks = range(world_size) if rank is None else (rank,)
    step = _Step(run, groups, trace, settings, world_size, optim, master, ranks, accumulates, on_cpu, plain, keeps)
    device, host = step.device(), step.host()
    return (device.with_host(host, step.gradients_beside_host_step()) if on_cpu else device), host


@dataclass(frozen=True)
class _Step:
    """The arguments of `plan_memory`, and what follows from them: one method a term of the formula above."""

    run: FakeRun
    groups: Sequence[Group]
    trace: StepTrace
    settings: StageSettings
    world_size: int
    optim: str
    master: str
    ranks: Sequence[int]
    accumulates: bool
    on_cpu: bool
    plain: bool
    keeps: bool

    def device(self) -> MemoryParts:
        """The parts of the device."""
        weights, states, buffers = self._device_weights(), self._states(on_host=False), self._buffers()
        static = weights + sum(states.values()) + buffers
        gradients, peak, step_peak = self._gradients(), self._backward_peak(), self._step_peak()
        return MemoryParts(
            weights=weights,
            always_on_states=states[True],
            active_states=states[False],
            buffers=buffers,
            activations=self.trace.activations,
            logits=self.trace.logits,
            gathered=self._gathered(None),
            gradients=gradients,
            peak_backward=static + peak.total,
            peak_step=static + step_peak,
            gradients_by_then=peak.gradients,
            buckets_by_then=peak.buckets,
            pool=self._pool(peak, step_peak),
        )

    def host(self) -> dict[str, int]:
        """The parts of the host, by title."""
        states = self._states(on_host=True)
        host = {STATES[is_always_on]: size for is_always_on, size in states.items() if size}
        if self._stage == 3:
            if self.settings.offload_param:
                host[WEIGHTS] = self._weights()
            if self._offloads:
                host["gradients"] = self._partition_bytes
        elif self._offloads:
            if self.accumulates:
                host["gradients that wait"] = max(self._kept_gradients.values())
            host["weights of the active blocks"] = self._partition_bytes
            host["buffers"] = self._largest_gradient
        if self._offloads:
            host["gradients in fp32"] = sum(self._partitions) * 4
            if self._stage < 3 and self.settings.pins and not self.on_cpu:  # masters, gradients, weights of each group
                pinned = [size * numel for numel in self._partitions for size in (4, 4, self._element)]
                pinned.append(self._largest_gradient)
                host["rounding of pinned memory"] = sum(pinned_block(nbytes) - nbytes for nbytes in pinned)
        elif any(states.values()):
            host[GROUP_GRADIENTS] = self._host_step()
        return host

    def gradients_beside_host_step(self) -> int:
        """Bytes of gradients that wait while the largest group on the host steps, whose own has gone there."""
        on_host = [number for number, group in enumerate(self.groups) if group.on_host]
        if self._offloads or not on_host:
            return self._gradients()
        largest = max(on_host, key=lambda number: self._partitions[number])  # the first of them
        behind = self.groups[largest + 1 :]
        return max(sum(self._kept_of_group(group, rank) for group in behind) for rank in self.ranks)

    # What the terms share

    @property
    def _stage(self) -> int:
        return self.settings.stage

    @property
    def _offloads(self) -> bool:
        """Whether DeepSpeed offloads the whole optimizer; `Group.on_host` is of single groups."""
        return self.settings.offload_optimizer

    @property
    def _element(self) -> int:
        """Bytes of an element of weights and gradients."""
        return self.run.workload.dtype.itemsize

    @cached_property
    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.groups for parameter in group.params]

    @cached_property
    def _largest_gradient(self) -> int:
        whole = [numel for group in self.groups if not group.by_rows for numel in group.numels]
        return max(whole, default=0) * self._element

    @cached_property
    def _partitions(self) -> list[int]:
        """Elements of a rank's partition of each group."""
        return [partition_numel(group.numels, self._stage, self.world_size) for group in self.groups]

    @property
    def _partition_bytes(self) -> int:
        """Bytes of all partitions of a rank in the dtype of the weights."""
        return sum(self._partitions) * self._element

    @property
    def _overlaps(self) -> bool:
        """Whether gradients are reduced beside the backward pass."""
        return self.settings.overlap_comm and not self._stay_in_place

    @property
    def _stay_in_place(self) -> bool:
        """Whether gradients are not reduced, nor copied for it: of one rank (`gradients.kept_on_one_rank`)."""
        alone = self.world_size == 1 and self._stage < 3 and self.settings.plain_sums
        return alone and not (self._offloads or self.plain)

    @property
    def _bucket_bytes(self) -> int:
        buckets = 2 if self._overlaps and self._stage < 3 else 1
        return self.settings.reduce_bucket * self._element * buckets

    @property
    def _has_8_bits(self) -> bool:
        return any(group.bits == 8 for group in self.groups)

    # Weights and states

    def _weights(self) -> int:
        numels = [parameter.numel() for parameter in self.run.model.parameters()]
        if self._stage == 3:
            return sum(share_numel(numel, self.world_size) for numel in numels) * self._element
        held = [module.weight.numel() for module in self.run.held_modules(self._trained)]
        frozen = sum(numels) - sum(held) - sum(parameter.numel() for parameter in self._trained)
        in_codes = held_bytes(held, self.run.workload.frozen_bits)
        # Active weights lie in padded buffers.
        return frozen * self._element + in_codes + self._partition_bytes * self.world_size

    def _device_weights(self) -> int:
        return 0 if self._stage == 3 and self.settings.offload_param else self._weights()

    def _states(self, on_host: bool) -> dict[bool, int]:
        """Bytes of masters and moments, on the host or the device, of always-trained blocks (True) and the others."""
        sizes = {True: 0, False: 0}
        for group in self.groups:
            if (group.on_host or self._offloads) == on_host:
                master = 4 if group.on_host or not self._steps_weights else 0
                sizes[group.always_on] += group_state_bytes(
                    group, self._stage, self.world_size, self.optim, master, self.ranks
                )
        return sizes

    @property
    def _steps_weights(self) -> bool:
        """Whether groups on the device have no masters; DeepSpeed's own always have."""
        is_lisa = not (self._offloads or self.plain)
        return is_lisa and steps_weights(self.optim, self.master, self.run.workload.dtype)

    @property
    def _leaving(self) -> int:
        """Bytes that a stream still copies to the host after a switch, beside the states that have come."""
        if not self.keeps or self.on_cpu or self._offloads:
            return 0
        groups = zip(self.groups, self._partitions, strict=True)
        sampled = sum(numel for group, numel in groups if not (group.always_on or group.on_host))
        return self._states(on_host=False)[False] + sampled * self._element * self._steps_weights

    # Gradients and buffers

    @cached_property
    def _kept_gradients(self) -> dict[int, int]:
        """By rank, stages 1 and 2: bytes of the gradients that are kept for the step, each parameter's whole."""
        return {rank: sum(self._kept_of_group(group, rank) for group in self.groups) for rank in self.ranks}

    def _gradients(self) -> int:
        """At the end of the backward pass, on the device; those of stage 3 are in buffers."""
        return 0 if self._stage == 3 or self._offloads else max(self._kept_gradients.values())

    def _buffers(self) -> int:
        tables = table_bytes() if self.optim == LISA_ADAMW and self._has_8_bits else 0
        if self._stage == 3:
            persistent = 0 if self._shares_are_whole else self._persistent_weights()
            return self._bucket_bytes + persistent + (0 if self._offloads else self._partition_bytes) + tables
        return (self._largest_gradient if self._offloads else 0) + tables

    # Stage 3: whole weights

    @property
    def _shares_are_whole(self) -> bool:
        """A rank that is alone has all of each parameter and takes it where it is; from the host it is sent."""
        return self.world_size == 1 and (self.on_cpu or not self.settings.offload_param)

    def _persistent_weights(self) -> int:
        numels = [parameter.numel() for parameter in self.run.model.parameters()]
        return sum(numel for numel in numels if numel <= self.settings.persistence_threshold) * self._element

    @cached_property
    def _gathered(self) -> Callable[[Arrival | None], int]:
        if self._stage < 3 or self._shares_are_whole:
            return lambda arrival: 0
        settings = self.settings
        return gathered_weights(self.run, self._trained, settings.persistence_threshold, settings.max_reuse_distance)

    # Peaks

    @property
    def _norm_scratch(self) -> Callable[[int], int]:
        """Bytes allocated while the norm of a gradient of so many elements is taken, or while it is sent."""
        if self.plain or (self._stage == 3 and self._offloads):
            return norm_scratch_of_deepspeed(self._stage, self._offloads)
        if self._offloads:
            return norm_scratch_in_chunks
        return norm_scratch_on_cpu if self.on_cpu else lambda numel: 0

    def _backward_peak(self) -> Peak:
        sizes = {"element": self._element, "bucket_numel": self.settings.reduce_bucket}
        send_scratch = self._norm_scratch if self._offloads else None
        if self._stage == 3:
            reduction = reduction_stage_3(
                self.world_size, send_scratch=send_scratch, on_cpu=self.on_cpu, gathered=self._gathered, **sizes
            )
            return backward_peak(self.trace, reduction)
        slices = slices_by_rank(self.groups, self._stage, self.world_size)
        if self._stay_in_place:
            sizes["bucket_numel"] = 0
        sizes["bucket_bytes"] = self._bucket_bytes
        waits = self._stage == 1 and not self.settings.overlap_comm
        follow = backward_peak_stage_1 if waits else backward_peak
        peaks = [
            follow(
                self.trace,
                reduction_stages_1_2(
                    slices,
                    rank,
                    one_buffer=kept_bytes if self.plain and not self._offloads else None,
                    send_scratch=send_scratch,
                    is_last=is_last,
                    **sizes,
                ),
                self.accumulates and self._stage == 1,
            )
            for rank, kept_bytes in self._kept_gradients.items()
            for is_last in {True, self._stage == 1 or not self.accumulates}
        ]
        peak = max(peaks, key=lambda peak: peak.total)
        waiting = self._gradients() if self.accumulates and self._stage == 2 else 0
        peak = peak._replace(gradients=peak.gradients + waiting)
        at_end = Peak(self.trace.now, self._gradients() + self._rows_at_end())
        return max(peak, at_end, key=lambda one: one.total)

    def _pool(self, peak: Peak, step_peak: int) -> int:
        """Bytes beyond the peak: of the reduction stream's pool, or of states that leave, beside that pool.

        Until the step buckets and gradients cloned out of them are part of the peaks; but no other stream can use that
        memory afterwards, in the next forward pass either.
        """
        buckets, cloned, highest = *self._in_stream, max(peak.total, step_peak)
        leaving = self._leaving + buckets + cloned if self._leaving else 0
        if not buckets:
            return max(0, leaving - highest)
        arrived = max(0, peak.gradients - (self._gradients() - cloned))  # of them, at the peak of the backward pass
        at_backward = peak.total + cloned - min(cloned, arrived) + buckets - peak.buckets
        return max(at_backward, step_peak + buckets, leaving) - highest

    @property
    def _in_stream(self) -> tuple[int, int]:
        """Bytes of buckets and of gradients cloned out of them, where DeepSpeed's reduction stream has its own pool."""
        if self.on_cpu or self.plain or self._offloads or self._stage == 3 or not self._overlaps:
            return 0, 0
        whole, bucket = [group for group in self.groups if not group.by_rows], self.settings.reduce_bucket
        cloned = max(
            sum(kept_gradient_numel(group, self._stage, rank, self.world_size, bucket) for group in whole)
            for rank in self.ranks
        )
        return self._bucket_bytes, self._element * cloned

    def _rows_at_end(self) -> int:
        """Bytes of rows of an embedding, beside those that are kept, while they go to the ranks that keep them."""
        group = next((group for group in self.groups if group.by_rows), None)
        if group is None or self.world_size == 1:
            return 0
        tokens = min(self.run.workload.tokens, len(group.params[0]))
        sent = 2 * tokens * group.widths[0] * self._element
        return sent + max(self._kept_of_group(group, rank) for rank in self.ranks)

    def _step_peak(self) -> int:
        """On the device, on top of weights, states and buffers: of a gradient's norm or a group's step.

        Gradients that are kept by themselves go as their groups step, one after the other.
        """
        if self._offloads:
            return self._gradients()
        norm = self._norm_scratch(share_numel(self._largest_gradient // self._element, self.world_size))
        peaks = [self._gradients() + norm]
        for rank in self.ranks if self._stage < 3 else self.ranks[:1]:
            kept = [self._kept_of_group(group, rank) for group in self.groups]
            for number, (group, partition) in enumerate(zip(self.groups, self._partitions, strict=True)):
                left = kept if self.plain else kept[number:]
                before, while_stepping = self._group_step(group, partition)
                gone = 0 if self.plain or self.optim == LISA_ADAMW or group.on_host else kept[number]
                peaks.append(sum(left) + max(before, while_stepping - gone))
        return max(peaks)

    def _kept_of_group(self, group: Group, rank: int) -> int:
        """Bytes of the gradients of a group that wait for its step; those of stage 3 are in buffers."""
        if self._stage == 3:
            return 0
        if group.by_rows:
            pieces = pieces_of_group(group.named_numels, self._stage, rank, self.world_size)
            rows = sum(num_rows(piece.start, piece.length, group.widths[0]) for piece in pieces)
            # Of several micro-batches nobody knows how many tokens they have together.
            tokens = rows if self.accumulates else self.world_size * self.run.workload.tokens
            return self._element * min(rows, tokens) * group.widths[0]
        return self._element * kept_gradient_numel(group, self._stage, rank, self.world_size)

    def _group_step(self, group: Group, partition: int) -> tuple[int, int]:
        """Of one group: its gradient flat and in fp32, with itself still there; then that, and what AdamW takes."""
        if self.optim == LISA_ADAMW:  # takes gradients as they are; on CPU one chunk of the largest piece is copied
            piece = max(_largest_piece(group, self._stage, rank, self.world_size) for rank in self.ranks)
            laid_out = min(piece, slab_numel(self.on_cpu)) * self._element if group.by_rows else 0
            if group.bits == FACTORED:  # and the new roots and sums, of each row and column
                sums = 2 * group_state_bytes(group, self._stage, self.world_size, self.optim, 0, self.ranks)
                chunk = factored_chunk_bytes(piece, max(group.widths), self.master != "fp32")
                return 0, laid_out + sums + (chunk if self.on_cpu else 0)
            chunk = chunk_bytes(piece, group.bits == 8, self.master != "fp32")
            return 0, laid_out + (chunk if self.on_cpu else 0)
        if group.on_host:
            return 0, 0
        pieces = [pieces_of_group(group.named_numels, self._stage, rank, self.world_size) for rank in self.ranks]
        is_flat = all([piece.length for piece in of_rank] == [partition] for of_rank in pieces)
        flat = 0 if is_flat else self._element
        in_fp32 = 4 if self._element < 4 else 0
        adamw = 8 if self.optim == "adamw_torch" and group.bits == 32 else 0
        in_buffer = self._stage == 3 and is_flat and self._element == 4  # and counted there
        return partition * (flat + in_fp32), partition * ((0 if in_buffer else 4) + adamw)

    def _host_step(self) -> int:
        """On the host, while its largest group steps: gradients as they came, in fp32, AdamW's own, new weights.

        From a GPU the gradients of all its groups come at once, and the weights are cast before they go.
        """
        sizes = [partition for group, partition in zip(self.groups, self._partitions, strict=True) if group.on_host]
        sent = max(sizes) * self._element
        if not self.on_cpu:
            sent = sum(pinned_block(size * self._element) for size in (*sizes, max(sizes)))
        if self.optim == LISA_ADAMW:  # takes gradients as they are, wherever they are
            return 0 if self.on_cpu else sent
        kind = "bitsandbytes" if self._has_8_bits or self.optim in BITSANDBYTES_ADAMW else self.optim
        in_fp32 = 4 if self._element < 4 else 0
        return sent + max(sizes) * (in_fp32 + _HOST_STEP_BYTES[kind])


def _largest_piece(group: Group, stage: int, rank: int, world_size: int) -> int:
    """Elements of the parameter of a group of which a rank's partition has most."""
    pieces = pieces_of_group(group.named_numels, stage, rank, world_size)
    return max((piece.length for piece in pieces), default=0)
