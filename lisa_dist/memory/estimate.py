"""Estimate the memory of a training step before it runs: by part, on each rank's device and host.

What the model itself allocates is counted on fake tensors (`trace.py`). `StepPlan` adds what DeepSpeed allocates, in
the sizes that it gives to partitions and buffers at each ZeRO stage:

    static        = weights + states + buffers
    peak_backward = static + peak of activations, gradients, buckets and reductions (`gradient_peak.py`)
    peak_step     = static + largest of: gradients and a gradient's norm, gradients that are left and a group's step

`StepMeter` in meter.py measures the same parts of a real step. All sizes are bytes of one rank. A plan is of the worst
period: the largest blocks that a period may train, with the lowest layers, since the backward pass ends at the lowest
active one where the embedding is frozen.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import FACTORED
from lisa_dist.core.frozen_forms import linear_4bit_bytes, quantized_bytes
from lisa_dist.core.selection import most_active, sampled_blocks, split_by_decay
from lisa_dist.kernels.adamw import chunk_bytes
from lisa_dist.kernels.dynamic_code import table_bytes
from lisa_dist.kernels.factored import factored_chunk_bytes, num_rows
from lisa_dist.memory.frozen_on_host import stored_bytes
from lisa_dist.memory.gradient_peak import (
    Peak,
    Reduction,
    SlicedReduction,
    backward_peak,
    backward_peak_stage_1,
    gathered_weights,
    kept_gradient_numel,
    slices_by_rank,
)
from lisa_dist.memory.trace import Arrival, FakeRun, FakeRuns, StepTrace
from lisa_dist.memory.workload import (
    GROUP_GRADIENTS,
    STATES,
    WEIGHTS,
    Group,
    Lora,
    MemoryParts,
    StageSettings,
    Trained,
    Workload,
    widest_periods,
)
from lisa_dist.optim.build import BITSANDBYTES_ADAMW, LISA_ADAMW
from lisa_dist.optim.factored import places
from lisa_dist.optim.moments import QUANTIZED_BLOCK
from lisa_dist.optim.row_gradient import chunk_numel
from lisa_dist.optim.states import Piece, pinned_block, pinned_bytes
from lisa_dist.zero import gradients
from lisa_dist.zero.layout import partition_numel, pieces_of_group, share_numel

# Bytes an element that AdamW on the host allocates while it steps, on top of masters, moments and gradients.
_HOST_STEP_BYTES = {"adamw_torch_fused": 0, "adamw_torch": 8, "bitsandbytes": 12}
_SMALLEST_QUANTIZED = 4096  # elements of a partition that bitsandbytes quantizes


@dataclass(frozen=True)
class StepEstimate:
    """The memory that one rank needs for the steps of a run, whatever their micro-batch is and what they train.

    `config`: of other methods than LISA one without periods; `optim` and `method` are --optim and --method.
    `accumulates`, `on_cpu`: as of `StepPlan`.
    """

    runs: FakeRuns
    config: LisaConfig
    world_size: int
    optim: str
    method: str = "lisa"
    lora: Lora | None = None
    accumulates: bool = False
    on_cpu: bool = False

    def run(self, workload: Workload) -> FakeRun:
        """The model that computes a micro-batch."""
        config = self.config
        of_layers: dict[str, Any] = {"by_module": config.by_module, "adapters": config.lisa_adapters}
        bits = 4 if self.lora is not None and self.lora.in_4_bits else config.frozen_form
        workload = replace(workload, frozen_bits=bits, streams=config.streams, **of_layers)
        return self.runs.of(workload, self.lora, config.lisa_layers_attribute)

    def of(
        self, settings: StageSettings, workload: Workload, trained: Trained | None, rank: int | None = None
    ) -> tuple[MemoryParts, dict[str, int]]:
        """Parts of device and host of a step that trains these blocks, for None all that is trainable."""
        run, config = self.run(workload), self.config
        by_rows = settings.reduces_rows(self.world_size, self.optim, self.method)
        return StepPlan(
            run,
            run.groups(trained, self.optim, config.state_bits, config.offloaded, by_rows),
            settings,
            self.world_size,
            optim=self.optim,
            master=config.lisa_master,
            rank=rank,
            accumulates=self.accumulates,
            on_cpu=self.on_cpu,
            plain=self.method != "lisa",
            keeps=config.lisa_state == "keep",
        ).parts()

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


@dataclass(frozen=True)
class StepPlan:
    """The memory of one rank in a step that trains these groups: one method a term of the formula above.

    `optim` and `master` are those of the run (--optim, --lisa_master). `rank`: which one is planned; by default the one
    that needs most. `accumulates`: a step has several micro-batches, and the gradients of the earlier ones wait for the
    last. `on_cpu`: host and device are one, and the parts of the device include those of the host. `plain`: DeepSpeed
    without the overrides of `zero/`, as other methods run it. `keeps`: --lisa_state keep.
    """

    run: FakeRun
    groups: Sequence[Group]
    settings: StageSettings
    world_size: int
    optim: str = "adamw_torch_fused"
    master: str = "fp32"
    rank: int | None = None
    accumulates: bool = False
    on_cpu: bool = False
    plain: bool = False
    keeps: bool = False

    def parts(self) -> tuple[MemoryParts, dict[str, int]]:
        """The parts of the device, and of the host by title, in bytes."""
        device, host = self._device(), self._host()
        return (device.with_host(host, self._gradients_beside_host_step()) if self.on_cpu else device), host

    def _device(self) -> MemoryParts:
        on_host = self._stage == 3 and self.settings.offload_param
        weights, states, buffers = 0 if on_host else self._weights(), self._states(on_host=False), self._buffers()
        static = weights + sum(states.values()) + buffers
        gradients, peak, step_peak = self._gradients(), self._backward_peak(), self._step_peak()
        return MemoryParts(
            weights=weights,
            always_on_states=states[True],
            active_states=states[False],
            buffers=buffers,
            activations=self._trace.activations,
            logits=self._trace.logits,
            gathered=self._gathered(is_first=True)(None),
            gradients=gradients + self._shared_weights(trained=True),  # which go with them, after the step
            peak_backward=static + peak.total,
            peak_step=static - self._persistent + step_peak + self._shared_weights(trained=True),
            gradients_by_then=peak.gradients,
            buckets_by_then=peak.buckets,
            pool=self._pool(peak, step_peak),
        )

    def _host(self) -> dict[str, int]:
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

    def _gradients_beside_host_step(self) -> int:
        """Bytes of gradients that wait while the largest group on the host steps, whose own has gone there."""
        on_host = [number for number, group in enumerate(self.groups) if group.on_host]
        if self._offloads or not on_host:
            return self._gradients()
        largest = max(on_host, key=lambda number: self._partitions[number])  # the first of them
        behind = self.groups[largest + 1 :]
        return max(sum(self._kept_of_group(group, rank) for group in behind) for rank in self._ranks)

    # What the terms share

    @cached_property
    def _trace(self) -> StepTrace:
        return self.run.trace(self.groups)

    @property
    def _ranks(self) -> Sequence[int]:
        """Those of which the one that needs most is planned."""
        return range(self.world_size) if self.rank is None else (self.rank,)

    @property
    def _stage(self) -> int:
        return self.settings.stage

    def _pieces(self, group: Group, rank: int) -> list[Piece]:
        return pieces_of_group(group.named_numels, self._stage, rank, self.world_size)

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

    @property
    def _largest_piece(self) -> int:
        """Elements of the largest gradient, or part of one, that a rank keeps for the step."""
        if self._stage == 3:
            return share_numel(self._largest_gradient // self._element, self.world_size)
        groups = [group for group in self.groups if not group.by_rows]
        pieces = [piece.length for rank in self._ranks for group in groups for piece in self._pieces(group, rank)]
        return max(pieces, default=0)

    @cached_property
    def _partitions(self) -> list[int]:
        """Elements of a rank's partition of each group."""
        return [partition_numel(group.numels, self._stage, self.world_size) for group in self.groups]

    @property
    def _partition_bytes(self) -> int:
        """Bytes of all partitions of a rank in the dtype of the weights."""
        return sum(self._partitions) * self._element

    @property
    def _stay_in_place(self) -> bool:
        """Whether gradients are not reduced, nor copied for it: of one rank (`gradients.kept_on_one_rank`)."""
        return self._alone and self.settings.plain_sums

    @property
    def _alone(self) -> bool:
        """Whether stages 1 and 2 have nothing to overlap on one rank, where LISA turns overlap_comm off."""
        return self.world_size == 1 and self._stage < 3 and not (self._offloads or self.plain)

    @property
    def _overlaps(self) -> bool:
        """Whether stages 1 and 2 reduce gradients beside the backward pass, for which they have a second bucket."""
        return self.settings.overlap_comm and self._stage < 3 and not self._alone

    @property
    def _bucket_bytes(self) -> int:
        return self.settings.reduce_bucket * self._element * (2 if self._overlaps else 1)

    @property
    def _has_8_bits(self) -> bool:
        return any(group.bits == 8 for group in self.groups)

    # Weights and states

    def _weights(self) -> int:
        numels = [parameter.numel() for parameter in self.run.model.parameters()]
        if self._stage == 3:
            return sum(share_numel(numel, self.world_size) for numel in numels) * self._element
        quantized = [matrix.parameter for matrix in self.run.quantized_matrices(self._trained)]
        elsewhere = sum(parameter.numel() for parameter in (*quantized, *self._trained))
        shapes = [one.shape for one in quantized]
        in_codes = quantized_bytes(shapes, self.run.workload.frozen_bits)
        if self.run.lora is not None and self.run.lora.in_4_bits:
            in_codes = linear_4bit_bytes(shapes, self.run.lora.is_nested)
        if self.run.workload.streams:  # two layers
            in_codes = 2 * max(stored_bytes(self.run, self.run.workload.frozen_bits))
        # Active weights lie in padded buffers.
        return (sum(numels) - elsewhere) * self._element + in_codes + self._partition_bytes * self.world_size

    def _states(self, on_host: bool) -> dict[bool, int]:
        """Bytes of masters and moments, on the host or the device, of always-trained blocks (True) and the others."""
        sizes = {True: 0, False: 0}
        for group in self.groups:
            if (group.on_host or self._offloads) == on_host:
                master = 4 if group.on_host or not self._steps_weights else 0
                sizes[group.always_on] += self._state_bytes(group, master)
        return sizes

    def _state_bytes(self, group: Group, master: int) -> int:
        """Bytes of the master (`master` bytes an element) and the moments of a group's partition, of the largest."""
        stage, world_size = self._stage, self.world_size
        return max(sum(group_state_buffers(group, stage, world_size, self.optim, master, rank)) for rank in self._ranks)

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
        return {rank: sum(self._kept_of_group(group, rank) for group in self.groups) for rank in self._ranks}

    def _gradients(self) -> int:
        """At the end of the backward pass, on the device; those of stage 3 are in buffers."""
        return 0 if self._stage == 3 or self._offloads else max(self._kept_gradients.values())

    def _buffers(self) -> int:
        tables = table_bytes() if self.optim == LISA_ADAMW and self._has_8_bits else 0
        if self._stage == 3:
            partitions = 0 if self._offloads else self._partition_bytes
            return self._bucket_bytes + self._persistent + self._shared_weights(trained=False) + partitions + tables
        return (self._largest_gradient if self._offloads else 0) + tables

    # Stage 3: whole weights

    @property
    def _persistent(self) -> int:
        """Bytes of small weights that are whole until the step, which lets go of them."""
        if self._stage < 3 or self._shares_are_whole:
            return 0
        numels = [parameter.numel() for parameter in self.run.model.parameters()]
        return sum(numel for numel in numels if numel <= self.settings.persistence_threshold) * self._element

    @property
    def _shares_are_whole(self) -> bool:
        """A rank that is alone has all of each parameter and takes it where it is; from the host it is sent."""
        return self.world_size == 1 and (self.on_cpu or not self.settings.offload_param)

    def _shared_weights(self, trained: bool) -> int:
        """Bytes of this rank's part of what its host has of all weights, for what trains between forward and step."""
        ranks, ours = self.settings.sharing_ranks, {id(parameter) for parameter in self._trained}
        if ranks == 1:
            return 0
        parameters = [one for one in self.run.model.parameters() if (id(one) in ours) == trained]
        shares = sum(share_numel(parameter.numel(), self.world_size) for parameter in parameters)
        return shares * self.world_size // ranks * self._element

    def _gathered(self, is_first: bool) -> Callable[[Arrival | None], int]:
        """As `gathered_weights` has it, in the first micro-batch of a step or in another."""
        if self._stage < 3 or self._shares_are_whole:
            return lambda arrival: 0
        settings = self.settings
        kept = settings.persistence_threshold, settings.max_reuse_distance, settings.max_live, settings.by_layers
        share = 0.0 if settings.sharing_ranks == 1 else 1 / settings.sharing_ranks
        return gathered_weights(self.run, self._trained, *kept, share, not is_first)

    # Peaks

    def _norm_scratch(self, numel: int) -> int:
        """Bytes allocated while the norm of a gradient of so many elements is taken, or while it is sent."""
        if self.plain or (self._stage == 3 and self._offloads):  # DeepSpeed's: fp64, of the whole gradient or a chunk
            in_chunks = self._stage == 3 and self._offloads
            return max(8 * min(numel, 250_000_000), 4 * numel) if in_chunks else 8 * numel
        if self._offloads:
            return 8 * min(numel, gradients.NORM_CHUNK)
        return 8 * min(numel, gradients.CPU_NORM_CHUNK) if self.on_cpu else 0

    def _backward_peak(self) -> Peak:
        sizes: dict[str, Any] = {
            "world_size": self.world_size,
            "element": self._element,
            "bucket_numel": 0 if self._stay_in_place else self.settings.reduce_bucket,
            "send_scratch": self._norm_scratch if self._offloads else None,
            "on_cpu": self.on_cpu,
            "gathered": self._gathered(is_first=not self.accumulates),
        }
        if self._stage == 3:
            return backward_peak(self._trace, Reduction(**sizes))
        sizes |= {"slices": slices_by_rank(self.groups, self._stage, self.world_size)}
        as_they_arrive = self._overlaps or (self.settings.overlap_comm and self._stay_in_place)
        follow = backward_peak if self._stage == 2 or as_they_arrive else backward_peak_stage_1
        peaks = [
            follow(
                self._trace,
                SlicedReduction(
                    rank=rank,
                    is_last=is_last,
                    bucket_bytes=self._bucket_bytes,
                    one_buffer=kept_bytes if self.plain and not self._offloads else None,
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
        at_end = Peak(self._trace.now, self._gradients() + self._rows_at_end())
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
        if self.on_cpu or self.plain or self._offloads or not self._overlaps:
            return 0, 0
        whole, bucket = [group for group in self.groups if not group.by_rows], self.settings.reduce_bucket
        cloned = max(
            sum(kept_gradient_numel(group, self._stage, rank, self.world_size, bucket) for group in whole)
            for rank in self._ranks
        )
        return self._bucket_bytes, self._element * cloned

    def _rows_at_end(self) -> int:
        """Bytes of rows of an embedding, beside those that are kept, while they go to the ranks that keep them."""
        group = next((group for group in self.groups if group.by_rows), None)
        if group is None or self.world_size == 1:
            return 0
        sent = 2 * min(self.run.workload.tokens, len(group.params[0])) * group.widths[0] * self._element
        return sent + max(self._kept_of_group(group, rank) for rank in self._ranks)

    def _step_peak(self) -> int:
        """On the device, on top of weights, states and buffers: of a gradient's norm or a group's step.

        Gradients that are kept by themselves go as their groups step, one after the other.
        """
        if self._offloads:
            return self._gradients()
        norm = self._norm_scratch(self._largest_piece)
        peaks = [self._gradients() + norm]
        for rank in self._ranks if self._stage < 3 else self._ranks[:1]:
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
            rows = sum(num_rows(piece.start, piece.length, group.widths[0]) for piece in self._pieces(group, rank))
            # Of several micro-batches nobody knows how many tokens they have together.
            tokens = rows if self.accumulates else self.world_size * self.run.workload.tokens
            return self._element * min(rows, tokens) * group.widths[0]
        return self._element * kept_gradient_numel(group, self._stage, rank, self.world_size)

    def _group_step(self, group: Group, partition: int) -> tuple[int, int]:
        """A group's gradient flat and in fp32, with itself still there; then that, and what AdamW takes."""
        if self.optim == LISA_ADAMW:  # takes gradients as they are; on CPU one chunk of the largest piece is copied
            pieces = [piece.length for rank in self._ranks for piece in self._pieces(group, rank)]
            piece = max(pieces, default=0)
            laid_out = min(piece, chunk_numel(self.on_cpu)) * self._element if group.by_rows else 0
            if group.bits == FACTORED:  # and the new roots and sums, of each row and column
                sums = 2 * self._state_bytes(group, 0)
                chunk = factored_chunk_bytes(piece, max(group.widths), self.master != "fp32")
                return 0, laid_out + sums + (chunk if self.on_cpu else 0)
            chunk = chunk_bytes(piece, group.bits == 8, self.master != "fp32")
            return 0, laid_out + (chunk if self.on_cpu else 0)
        if group.on_host:
            return 0, 0
        lengths = [[piece.length for piece in self._pieces(group, rank)] for rank in self._ranks]
        is_flat = all(of_rank == [partition] for of_rank in lengths)
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


def steps_weights(optim: str, master: str, weights: torch.dtype) -> bool:
    """Whether the optimizer steps the weights themselves, on the device, without a separate master."""
    return weights == torch.float32 or (optim == LISA_ADAMW and master != "fp32")


def group_state_buffers(
    group: Group, stage: int, world_size: int, optim: str, master: int = 4, rank: int = 0
) -> list[int]:
    """Bytes of the master (`master` bytes an element) and of the tensors of the moments of a rank's partition.

    Of each moment its values, or its codes, scales and bitsandbytes' table; of factored ones those of rows, columns and
    matrices.
    """
    partition = partition_numel(group.numels, stage, world_size)
    scales = math.ceil(partition / QUANTIZED_BLOCK) * 4
    moments = 2 * [4 * partition]
    if group.bits == FACTORED:
        pieces = pieces_of_group(group.named_numels, stage, rank, world_size)
        here = places([group.widths[int(piece.name)] for piece in pieces], pieces)
        moments = [4 * cut.stop for cut in here[-1].cuts.values()] if here else []
    elif group.bits == 8 and optim == LISA_ADAMW:
        moments = 2 * [partition, scales]
    elif group.bits == 8 and partition >= _SMALLEST_QUANTIZED:
        moments = 2 * [partition, scales, 256 * 4]
    return [partition * master, *moments]


def kept_states(
    run: FakeRun, config: LisaConfig, stage: int, world_size: int, optim: str, *, pinned: bool = True
) -> int:
    """Host bytes of --lisa_state keep, once every sampled block was active: the states of all that are inactive.

    `pinned`: in the blocks that torch allocates of pinned memory, as beside a GPU.
    """
    if config.lisa_activated_layers == 0:  # nothing is sampled, and nothing becomes inactive
        return 0
    sampled = [(name, run.blocks.outer(name)) for name in config.sampled]
    sampled += [("layers", layer) for layer in run.blocks.layers]
    # A kept master that is the weights goes to the host in their dtype.
    weights = run.workload.dtype
    master = weights.itemsize if steps_weights(optim, config.lisa_master, weights) else 4
    by_block: list[list[int]] = []
    for name, block in sampled:
        by_block.append([])
        for kind, params in split_by_decay(block).items():
            group = Group(tuple(params), run.bits(name, kind, optim, config.state_bits))
            by_block[-1] += group_state_buffers(group, stage, world_size, optim, master)
    active = most_active(config, [layer.numel for layer in run.blocks.layers])
    inactive = sorted(by_block, key=sum)[active:]
    buffers = Counter(nbytes for buffers in inactive for nbytes in buffers if nbytes)
    return sum(pinned_bytes(nbytes, count) if pinned else nbytes * count for nbytes, count in buffers.items())
