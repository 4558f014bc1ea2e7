"""What a run logs of each period: a line in lisa_log.jsonl, and how far each block's weights have moved.

The movement is measured on a sample of each block's weights, as the model has them: what bf16 rounds away is no
movement. Rank 0 keeps the sample as it was at the start and at the block's last look, 64 KiB each a block, on the host.
Under ZeRO-3 each rank puts in what it has, in one reduction of 64 KiB a block; else nothing is sent. A block of at most
`SAMPLE` elements is measured exactly, a larger one to about 1%.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.numpy import load_file, save_file
from torch import distributed as dist

from lisa_dist.core.blocks import Block
from lisa_dist.run_folder import MOVEMENT_LOG, append_line
from lisa_dist.zero.parameters import local_weights, parameter_numel
from lisa_dist.zero.partitions import ZeroPartitions

MOVEMENT_FILE = "lisa_movement.safetensors"
SAMPLE = 2**14  # elements of a block


@dataclass
class PeriodRecord:
    """One line of lisa_log.jsonl. Seconds are of the switch; bytes are of this rank, after the period's first step.

    `blocks` are the sampled outer blocks; `host_bytes` are states of inactive blocks that wait on the host;
    `probabilities`, of samplers with weights, are those of each layer to be sampled.
    """

    period: int
    step: int
    layers: list[int]
    blocks: list[str]
    seconds: float
    state_bytes_per_rank: int = 0
    bytes_released: int = 0
    live_bytes: int = 0
    host_bytes: int = 0
    probabilities: list[float] = field(default_factory=list)


class PeriodLog:
    """The records of a run in `records`, written to `path` where one is set, each after its period's first step."""

    def __init__(self) -> None:
        self.records: list[PeriodRecord] = []
        self.resumed = False
        self.path: Path | None = None
        self._open: PeriodRecord | None = None
        self._begun = False

    def resume(self) -> None:
        """A state has been loaded: the lines of the steps before it stay, those of later ones go."""
        self.resumed, self._begun = True, False

    def open(self, record: PeriodRecord | None) -> None:
        """A period begins; its bytes are not known yet. None: there is no line to be written before the next switch."""
        self._open = record
        if record is not None:
            self.records = [earlier for earlier in self.records if earlier.step < record.step]

    def close(self, step: int, measure: Callable[[], dict[str, int]]) -> None:
        """Complete the period's record by what `measure` gives, and write it, if its first step has been taken."""
        record = self._open
        if record is None or step == record.step:
            return
        self._open = None
        vars(record).update(measure())
        self.records.append(record)
        if self.path is not None:
            before = record.step if self.resumed else 0
            append_line(self.path, vars(record), None if self._begun else lambda earlier: earlier["step"] < before)
            self._begun = True

    def state_dict(self) -> dict[str, Any] | None:
        """The record that is still open, for a resumed run to complete."""
        return None if self._open is None else vars(self._open).copy()


class WeightMovement:
    """The movement of blocks; rank 0 has in `lines`, and in `folder`, what each period moved. All ranks call all of it.

    A line: the period, the step before which it was looked at, and for each block that trained "update", the L2 norm of
    what the period added to its weights, "moved", that of all since the run began, and "relative", that in parts of the
    norm at the start.
    """

    def __init__(self, partitions: ZeroPartitions, blocks: Iterable[Block], folder: str | None):
        self.lines: list[dict[str, Any]] = []
        self._partitions = partitions
        self._samples = {block.name: _BlockSample(block) for block in blocks if block.parameters}
        self._path = None if folder is None else Path(folder) / MOVEMENT_LOG
        self._begun = False  # whether a line is written since the last load
        self._looked_at = 0
        self._began = 0  # the step at which the period began; lines of an earlier run up to it stay
        self.restart()

    def restart(self) -> None:
        """Count from the weights of now."""
        self._start = self._look(self._samples)
        self._latest = dict(self._start)

    def end_period(self, period: int, step: int, trained: Iterable[str]) -> None:
        """Look at the blocks that trained, by name, and add a line, unless no step was taken since the last."""
        if step == self._looked_at:
            return
        self._looked_at = step
        blocks: dict[str, dict[str, float]] = {}
        for name, now in self._look(trained).items():
            norm = self._samples[name].norm
            moved, at_start = norm(now - self._start[name]), norm(self._start[name])
            blocks[name] = {
                "update": norm(now - self._latest[name]),
                "moved": moved,
                "relative": moved / at_start if at_start else math.nan,
            }
            self._latest[name] = now
        if dist.get_rank() != 0:
            return
        line = {"period": period, "step": step, "blocks": blocks}
        if self._path is not None:
            append_line(self._path, line, None if self._begun else lambda earlier: earlier["step"] <= self._began)
            self._begun = True
        self.lines.append(line)

    def save(self, path: Path) -> None:
        """What a resumed run needs to go on; rank 0 alone has it."""
        samples = {f"start:{name}": value for name, value in self._start.items()}
        save_file(samples | {f"latest:{name}": value for name, value in self._latest.items()}, path)

    def load(self, path: Path | None, step: int, began: int) -> None:
        """Go on at `step`, in a period that began at `began`, with what was saved, or from the weights of now."""
        self.restart()
        self._began = self._looked_at = began
        self._begun, self.lines = False, [line for line in self.lines if line["step"] <= began]
        if path is None or dist.get_rank() != 0:
            return
        saved = load_file(path)
        for name, sample in self._samples.items():
            if saved.get(f"start:{name}", numpy.empty(0)).size == sample.numel:
                self._start[name] = saved[f"start:{name}"]
                if began < step:  # else other settings begin a period here
                    self._latest[name] = saved[f"latest:{name}"]

    def _look(self, names: Iterable[str]) -> dict[str, numpy.ndarray]:
        """The samples of blocks now, in fp32; on other ranks than 0 nothing. The host waits once for all of them."""
        rank, sharded = dist.get_rank(), self._partitions.weights_are_sharded
        seen = {}
        for name in names if rank == 0 or sharded else ():
            local = [local_weights(parameter) for parameter in self._samples[name].parameters]
            found = self._samples[name].of(local, rank if sharded else 0)
            if sharded:
                found = found.to(self._partitions.engine.device)
                dist.reduce(found, dst=0)
            if rank == 0:
                seen[name] = _to_host(found)
        get_accelerator().synchronize()
        return {name: numpy.array(found) for name, found in seen.items()}


class _BlockSample:
    """Which elements of a block are looked at: of every parameter its part, spread over it, the same in every run."""

    def __init__(self, block: Block):
        self.parameters = list(block.parameters.values())
        numels = [parameter_numel(parameter) for parameter in self.parameters]
        # Where the parameter of a block is large, a period of its width must not meet one of the sample's: jitter.
        draws = numpy.random.default_rng(0)
        self.positions, weights = [], []
        for numel in numels:
            count = min(numel, max(1, math.ceil(SAMPLE * numel / sum(numels))))
            jitter = draws.random(count) if count < numel else 0.0
            self.positions.append(numpy.floor((numpy.arange(count) + jitter) * numel / count).astype(numpy.int64))
            weights.append(numpy.full(count, numel / count))
        self._weights = numpy.concatenate(weights)  # elements that each of the sample stands for
        self.numel = self._weights.size

    def of(self, local: list[torch.Tensor], rank: int) -> torch.Tensor:
        """The sample in fp32, of what this rank has of each parameter, with zeros for what others have."""
        seen, begin = torch.zeros(self.numel, device=local[0].device), 0
        for positions, mine in zip(self.positions, local, strict=True):
            first = rank * mine.numel()
            # Positions rise, so those of a shard lie side by side.
            low, high = numpy.searchsorted(positions, (first, first + mine.numel()))
            index = _to_device(positions[low:high] - first, mine.device)
            seen[begin + low : begin + high] = mine.detach().view(-1).index_select(0, index)
            begin += len(positions)
        return seen

    def norm(self, sampled: numpy.ndarray) -> float:
        """The L2 norm of the whole block, by its sample."""
        return math.sqrt(float(self._weights @ numpy.square(sampled, dtype=numpy.float64)))


def _to_device(indices: numpy.ndarray, device: torch.device) -> torch.Tensor:
    """Indices on a device, which does not wait for them; in 32 bits where those are enough."""
    narrow = torch.from_numpy(indices if indices.max(initial=0) >= 2**31 else indices.astype(numpy.int32))
    return narrow if device.type == "cpu" else narrow.pin_memory().to(device, non_blocking=True)


def _to_host(seen: torch.Tensor) -> numpy.ndarray | torch.Tensor:
    """The values, from a device in pinned memory, to be read when the device has been waited for."""
    if seen.device.type == "cpu":
        return seen.numpy().copy()  # a view would keep the tensor alive, among those whose bytes a run accounts for
    return torch.empty_like(seen, device="cpu", pin_memory=True).copy_(seen, non_blocking=True)
