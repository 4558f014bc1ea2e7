"""How long a step takes, and what a rank holds, by calculation: from counted traffic and given speeds.

Of a step on N ranks, of `rows` rows a rank:

    step     = forward + backward + communication + optimizer
    communication = sum over collectives: calls * latency(N) + bytes * on_the_wire(N) / bandwidth(N)
    on_the_wire(N) = (N-1)/N, of an all-reduce twice as much; latency: of so many hops of a ring, N-1, or twice as many

Calls and bytes are counted in steps of real DeepSpeed on two ranks: of stages 1 and 2 every active element is reduced
(DeepSpeed all-reduces its buckets and keeps a slice) and gathered once after the step; of stage 3
every weight is gathered as often as DeepSpeed lets it go and wants it again, and active gradients are reduce-scattered.
What is counted does not depend on N, but for padding and for slices at the borders of partitions.

On this machine, where C cores do everything:

    forward + backward = max(1, N/C) (fixed + rows * seconds of a row)     optimizer = max(1, N/C) seconds / N
    latency and bandwidth: max(1, N/C) times slower than of two ranks

Fixed, row and optimizer are measured on single ranks, as many of them at a time as there are cores; the rest by single
collectives of two ranks. Steps of 2, 4 and 8 ranks are predicted from that; no second of theirs goes into it.
Assumed: ranks share the cores evenly, and none waits for another but in a collective's own time. This checks what both
machines have in common: the counted traffic, rings, and that compute, communication and AdamW add up.

On GPUs, 2 bytes an element, gradient checkpointing of all layers, by calculation alone:

    forward = F_f / (flops * mfu)     backward = (F_b + F_f of the layers again) / (flops * mfu)
    optimizer = 50 bytes * active elements / N / memory bandwidth
    bandwidth(N) = intra within a node, else min(intra, GPUs of a node * inter); latency(N) by hops within and between

F: matrix products and causal attention, flops_of_step in common/arms.py. 50 bytes: gradient to fp32 6, norm 2,
clipping 8, AdamW on fp32 master and moments 28, master to weights 6. Calls and bytes are counted on the same model with
every matrix, and every threshold of DeepSpeed, smaller by the same factor, at two depths, and drawn out to all layers.
Assumed: rings of all GPUs, whose way between nodes takes all NICs of a node; nothing else on the network; no straggler;
no host time between kernels (it is in mfu); the shipped DeepSpeed configs, which do not overlap. Memory is planned as
`lisa-dist plan` does it.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from benchmarks.common.arms import FULL, Arm, flops_of_step, model_of
from lisa_dist.core.blocks import Blocks, find_blocks
from lisa_dist.core.selection import sampled_blocks
from lisa_dist.ds_config import read_ds_config
from lisa_dist.memory.estimate import plan_memory
from lisa_dist.memory.trace import FakeRun
from lisa_dist.memory.workload import StageSettings, Trained, Workload, widest_periods

KINDS = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor")
SMALL, LARGE = 2**12, 2**20  # elements of the collectives that are timed
OPTIMIZER_BYTES = 50  # that an active element moves to and from a GPU's memory in AdamW's step


class Sent(NamedTuple):
    """Collectives of one kind in a step: how many, and elements of all together, input or output as is whole."""

    calls: float
    elements: float


Traffic = dict[str, Sent]  # by kind


# Collectives


def times_around(kind: str) -> int:
    """How often a ring passes everything around: an all-reduce is a reduce-scatter and an all-gather."""
    return 2 if kind == "all_reduce" else 1


def hops(kind: str, ranks: int) -> int:
    """Steps of a ring, one after another."""
    return times_around(kind) * (ranks - 1)


def on_the_wire(kind: str, ranks: int) -> float:
    """What a rank sends, as a part of what the collective is about."""
    return times_around(kind) * (ranks - 1) / ranks


@dataclass(frozen=True)
class Gloo:
    """Ranks of one machine, by collectives of two of them."""

    cores: int
    latency: dict[str, float]  # seconds of a hop
    bandwidth: dict[str, float]  # bytes a second that a rank sends

    def crowding(self, ranks: int) -> float:
        """How much longer what needs a core takes, since ranks share them."""
        return max(1.0, ranks / self.cores)

    def seconds(self, kind: str, sent: Sent, ranks: int, element: int = 4) -> float:
        """Seconds of collectives."""
        waiting = sent.calls * hops(kind, ranks) * self.latency[kind]
        sending = sent.elements * element * on_the_wire(kind, ranks) / self.bandwidth[kind]
        return (waiting + sending) * self.crowding(ranks) / self.crowding(2)

    @classmethod
    def of(cls, cores: int, seconds: dict[str, dict[int, float]]) -> "Gloo":
        """From seconds of one collective on two ranks, by kind and elements: a line through two sizes."""
        latency, bandwidth = {}, {}
        for kind, of_size in seconds.items():
            an_element = max((of_size[LARGE] - of_size[SMALL]) / (LARGE - SMALL), 1e-12)
            latency[kind] = max(of_size[SMALL] - SMALL * an_element, 0.0) / hops(kind, 2)
            bandwidth[kind] = 4 * on_the_wire(kind, 2) / an_element
        return cls(cores, latency, bandwidth)


def flag(default: float, about: str):
    """A field that is a flag of scaling.py."""
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Gpus:
    """GPUs in nodes; bandwidths in 10**9 bytes a second."""

    flops: float = flag(989e12, "peak of a GPU; the default is an H100's in bf16")
    mfu: float = flag(0.45, "of the peak that matrix products reach")
    memory_gbs: float = flag(3350, "of a GPU's own memory")
    intra_gbs: float = flag(450, "of a GPU within its node and one direction; NVLink")
    inter_gbs: float = flag(50, "of a GPU between nodes; a NIC of 400 Gb/s for each")
    gpus_per_node: float = flag(8, "whole GPUs")
    call_us: float = flag(8.4, "of a collective before its first hop; as NCCL has it of a ring")
    intra_hop_us: float = flag(3.4, "of a hop within a node; the same")
    inter_hop_us: float = flag(9.6, "of a hop between nodes; the same")

    def bandwidth(self, gpus: int) -> float:
        """Bytes a second that every GPU of a ring can send at a time."""
        inter = self.gpus_per_node * self.inter_gbs
        return 1e9 * (self.intra_gbs if gpus <= self.gpus_per_node else min(self.intra_gbs, inter))

    def seconds(self, kind: str, sent: Sent, gpus: int, element: int = 2) -> float:
        """Seconds of collectives."""
        if gpus == 1:
            return 0.0
        between = times_around(kind) * (-(-gpus // self.gpus_per_node) - 1)
        latency = self.call_us + (hops(kind, gpus) - between) * self.intra_hop_us + between * self.inter_hop_us
        sending = sent.elements * element * on_the_wire(kind, gpus) / self.bandwidth(gpus)
        return sent.calls * latency / 1e6 + sending


def seconds_of(on: Gloo | Gpus, traffic: Traffic, ranks: int) -> float:
    """Seconds of a step's collectives."""
    return sum(on.seconds(kind, sent, ranks) for kind, sent in traffic.items())


# Steps by the model


class SingleRank(NamedTuple):
    """Seconds of a step on one rank with all cores busy."""

    fixed: float  # of forward and backward, whatever the rows
    of_a_row: float
    optimizer: float


def step_here(gloo: Gloo, alone: SingleRank, traffic: Traffic, ranks: int, rows: int) -> float:
    """Seconds of a step of `rows` rows a rank on this machine."""
    compute = alone.fixed + alone.of_a_row * rows + alone.optimizer / ranks
    return gloo.crowding(ranks) * compute + seconds_of(gloo, traffic, ranks)


class Work(NamedTuple):
    """What an arm has to do: operations of a token, forward and backward, and elements that train."""

    operations: float
    active: int


def step_on_gpus(gpus: Gpus, work: Work, traffic: Traffic, count: int, tokens: int) -> dict[str, float]:
    """Seconds of a step of `tokens` tokens a GPU, and of its parts."""
    compute = tokens * work.operations / (gpus.flops * gpus.mfu)
    communication = seconds_of(gpus, traffic, count)
    optimizer = OPTIMIZER_BYTES * work.active / count / (1e9 * gpus.memory_gbs)
    seconds = compute + communication + optimizer
    return {"compute": compute, "communication": communication, "optimizer": optimizer, "seconds": seconds}


def work_of(config: PretrainedConfig, arm: Arm, length: int) -> Work:
    """Of rows of `length` tokens, every layer checkpointed: one forward pass of all layers more."""
    forward = flops_of_step(config, FULL, 1, length) / 3  # whose backward pass is twice its forward pass
    blocks = blocks_of(config)
    # A layer is computed again up to its last product, whose result nobody wants.
    *_, last = (one for one in blocks.layers[0].parameters.values() if one.ndim > 1)
    head = blocks.embed if blocks.tied else blocks.head
    not_again = sum(one.numel() for one in head.parameters.values()) + len(blocks.layers) * last.numel()
    operations = flops_of_step(config, arm, 1, length) + forward - 2 * not_again
    return Work(operations, active_elements(config, arm))


def active_elements(config: PretrainedConfig, arm: Arm) -> int:
    """Elements that train in a step of LISA's arms or full training's."""
    blocks = blocks_of(config)
    if arm.method == "full":
        return sum(block.numel for block in blocks)
    outer = sum(blocks.outer(name).numel for name in arm.config.always_on)
    return outer + arm.config.lisa_activated_layers * blocks.layers[0].numel


def blocks_of(config: PretrainedConfig) -> Blocks:
    return find_blocks(model_of(config))


class Memory:
    """Plans of an arm for any number of GPUs, rows of `length` tokens in bf16: the step itself is traced once."""

    def __init__(self, config: PretrainedConfig, arm: Arm, length: int):
        self._plain = arm.method != "lisa"
        self._run = run = FakeRun(config, Workload(length, 1, torch.bfloat16, config.num_hidden_layers))
        periods: list[Trained | None] = [None]
        if not self._plain:
            sampled = sampled_blocks(arm.config, run.blocks)
            periods = widest_periods(arm.config, run.blocks, sampled, config.num_hidden_layers)
        self._periods = [(groups, run.trace(groups)) for groups in map(run.groups, periods)]

    def peak(self, ds_config: str, gpus: int) -> int:
        """Bytes of the rank that holds most, in the worst period."""
        settings = StageSettings.of(read_ds_config(ds_config), self._run.hidden_size)
        plans = (plan_memory(self._run, *period, settings, gpus, plain=self._plain)[0] for period in self._periods)
        return max(parts.peak for parts in plans)
