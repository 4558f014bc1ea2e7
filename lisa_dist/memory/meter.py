"""Measure the memory of a real step, in the parts that `estimate.py` estimates.

On CPU every allocation of the step is counted, so the parts are exact; there host and device are one, and the parts
include those of the host. On a GPU they come from the caching allocator's counters. A measured step is slower than
others.
"""

import contextlib
import gc
import time
from typing import Any

import torch

from lisa_dist.core.controller import LisaController
from lisa_dist.core.live_bytes import AllocationTracker, live_storages
from lisa_dist.memory.trace import part_of
from lisa_dist.memory.workload import MemoryParts
from lisa_dist.patches import patched
from lisa_dist.zero.parameters import local_tensors

_STABLE_POLLS = 10  # without a change of memory, after which no thread is expected to free any


class StepMeter:
    """`start` before one whole optimizer step and `stop` after it; then `parts`.

    Of several micro-batches the first one's forward pass is measured, and the peak of all. The step should not be the
    first of its period, which allocates the moments. `parts` is None where no whole step was run. On a GPU logits are
    among the activations.
    """

    def __init__(self, lisa: LisaController) -> None:
        self.parts: MemoryParts | None = None
        assert lisa.is_attached, "attach the controller to a DeepSpeed engine first"
        self._lisa, self._engine = lisa, lisa.engine
        self._on_gpu = self._engine.device.type == "cuda"
        vocab_size = self._engine.module.config.get_text_config().vocab_size
        self._tracker = AllocationTracker(lambda tensor: part_of(tensor, vocab_size))
        self._measuring = contextlib.ExitStack()
        self._static = self._logits = self._gathered = self._peak_backward = 0
        self._after_forward: int | None = None
        self._after_backward: int | None = None
        self._backward, self._optimizer_step = self._engine.backward, self._engine.optimizer.step

    def start(self) -> None:
        """Begin to measure: before the step's first forward pass."""
        gc.collect()  # garbage would be freed within the step
        storages = [] if self._on_gpu else live_storages()
        self._tracker.add((torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages), "static")
        self._static = self._now()
        # No hook is called at these two places, and so the methods are replaced. After the forward pass: the module's
        # hook comes while its outputs are there, and before a trainer computes its loss of them; the loss's gradient
        # hook knows no loss that is made outside. Before the step: ZeRO's optimizers have no step hooks, and torch's,
        # inside, is called when the gradients' norm has been taken.
        self._measuring.enter_context(patched(self._engine, "backward", self._end_forward, of="step_meter"))
        self._measuring.enter_context(patched(self._engine.optimizer, "step", self._end_backward, of="step_meter"))
        self._begin_phase()
        # A GPU's allocator counts by itself, and kernels that are compiled as they are called (flex attention) cannot
        # be under the tracker.
        if not self._on_gpu:
            self._measuring.enter_context(self._tracker)

    def stop(self, failed: bool = False) -> None:
        """End the measurement after the step, and set `parts`, unless the step has `failed`."""
        self._measuring.close()
        if failed or self._after_forward is None or self._after_backward is None:
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

    def _end_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take the place of the engine's `backward`."""
        if self._after_forward is None:
            self._after_forward = self._now()
            self._logits = self._tracker.bytes["logits"]
            self._gathered = self._lisa.partitions.gathered_bytes()
        return self._backward(*args, **kwargs)

    def _end_backward(self, *args: Any, **kwargs: Any) -> Any:
        """Take the place of the optimizer's `step`."""
        self._wait_for_releases()
        self._after_backward, self._peak_backward = self._now(), self._peak()
        self._begin_phase()
        return self._optimizer_step(*args, **kwargs)

    def _weight_bytes(self) -> int:
        tensors = [tensor for parameter in self._engine.module.parameters() for tensor in local_tensors(parameter)]
        once = {(tensor.data_ptr(), tensor.nbytes): tensor for tensor in tensors}  # tables of codes are shared
        return sum(tensor.nbytes for tensor in once.values() if self._is_on_device(tensor))

    def _state_bytes(self) -> tuple[int, int]:
        """Bytes of the states of always-trained and of other blocks; on a GPU only of those on the GPU."""
        outer = [self._lisa.blocks.outer(block).parameters for block in self._lisa.config.always_on]
        always_on = {name for parameters in outer for name in parameters}
        sums = {True: 0, False: 0}
        for key, state in self._lisa.partition_states().items():
            sums[key[0] in always_on] += state.nbytes if self._is_on_device(state.master) else 0
        return sums[True], sums[False]

    def _is_on_device(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cuda" or not self._on_gpu

    def _wait_for_releases(self) -> None:
        """Wait until memory is stable: Gloo's threads free a bucket some time after its reduction has ended."""
        stable_polls, before = 0, self._now()
        while not self._on_gpu and stable_polls < _STABLE_POLLS:
            time.sleep(0.01)
            stable_polls, before = stable_polls + 1 if self._now() == before else 0, self._now()

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self._on_gpu else self._tracker.now

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._on_gpu else self._tracker.peak

    def _begin_phase(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._tracker.begin_phase()
