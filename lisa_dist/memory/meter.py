"""What a step really takes of memory, in the parts that planning.py plans.

On CPU every allocation of the step is counted, so the parts are exact; there the host is the device, and what a plan
has on the host is in them. On a GPU they come from the caching allocator's counters. A measured step is slower than
others.
"""

import gc
import time

import torch

from lisa_dist.core.controller import LisaController
from lisa_dist.core.live_bytes import live_storages
from lisa_dist.memory.estimate import MemoryParts
from lisa_dist.memory.trace import part_of
from lisa_dist.memory.tracker import AllocationTracker


class StepMeter:
    """`with StepMeter(lisa) as meter:` around one whole optimizer step; then `meter.parts`.

    Of several micro-batches the first one's forward pass is measured, and the peak of all. The step should not be the
    first of its period, which makes the moments.
    """

    parts: MemoryParts | None = None

    def __init__(self, lisa: LisaController):
        self._lisa, self._engine = lisa, lisa.engine
        self._on_gpu = self._engine.device.type == "cuda"
        vocab_size = self._engine.module.config.get_text_config().vocab_size
        self._tracker = AllocationTracker(lambda tensor: part_of(tensor, vocab_size))

    def __enter__(self):
        gc.collect()  # what is garbage already would be let go of within the step
        storages = [] if self._on_gpu else live_storages()
        self._tracker.add((torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages), "static")
        self._static = self._now()
        self._after_forward = self._after_backward = None
        self._logits = self._gathered = 0
        self._backward, self._step = self._engine.backward, self._engine.optimizer.step
        self._engine.backward, self._engine.optimizer.step = self._end_forward, self._end_backward
        self._begin_phase()
        self._tracker.__enter__()
        self._tracks = True
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._stop_tracking()
        del self._engine.backward, self._engine.optimizer.step
        if error is not None or self._after_backward is None:
            return
        peak_step = self._peak()
        always_on, active = self._state_bytes()
        weights = self._weight_bytes()
        self.parts = MemoryParts(
            weights=weights,
            always_on_states=always_on,
            active_states=active,
            buffers=self._static - weights - always_on - active,
            activations=self._after_forward - self._static - self._logits - self._gathered,
            logits=self._logits,
            gathered=self._gathered,
            gradients=self._after_backward - self._static,
            peak_backward=self._peak_backward,
            peak_step=peak_step,
        )

    def _end_forward(self, *args, **kwargs):
        if self._after_forward is None:
            self._after_forward = self._now()
            self._logits = self._tracker.bytes["logits"]
            self._gathered = self._lisa.partitions.gathered_bytes()
            if self._on_gpu:  # the allocator counts by itself; it does not know logits from activations
                self._stop_tracking()
        return self._backward(*args, **kwargs)

    def _end_backward(self, *args, **kwargs):
        self._wait_for_releases()
        self._after_backward, self._peak_backward = self._now(), self._peak()
        self._begin_phase()
        return self._step(*args, **kwargs)

    def _stop_tracking(self) -> None:
        if self._tracks:
            self._tracker.__exit__(None, None, None)
        self._tracks = False

    def _weight_bytes(self) -> int:
        held = [self._lisa.partitions.local_weights(parameter) for parameter in self._engine.module.parameters()]
        return sum(weights.nbytes for weights in held if self._is_here(weights))

    def _state_bytes(self) -> tuple[int, int]:
        """Bytes of always-on and of other states; on a GPU of those that are on it."""
        always_on = {
            name for block in self._lisa.config.always_on for name in self._lisa.blocks.outer(block).parameters
        }
        sums = {True: 0, False: 0}
        for key, state in self._lisa.partition_states().items():
            sums[key[0] in always_on] += state.nbytes if self._is_here(state.master) else 0
        return sums[True], sums[False]

    def _is_here(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cuda" or not self._on_gpu

    def _wait_for_releases(self) -> None:
        """Gloo's threads let go of a bucket only some time after its reduction has ended."""
        quiet, before = 0, self._now()
        while not self._on_gpu and quiet < 10:
            time.sleep(0.01)
            quiet, before = quiet + 1 if self._now() == before else 0, self._now()

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self._on_gpu else self._tracker.now

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._on_gpu else self._tracker.peak

    def _begin_phase(self) -> None:
        torch.cuda.reset_peak_memory_stats() if self._on_gpu else self._tracker.begin_phase()
