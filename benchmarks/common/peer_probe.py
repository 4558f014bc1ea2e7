"""Runs a trainer's own command line in its own Python, and notes of its steps the CPU seconds, tokens and live bytes.

python peer_probe.py RECORD STEPS MODULE WORD ...

It needs nothing but torch and transformers, whose Trainer every peer's is built on. Each rank writes RECORD.RANK and
ends after step STEPS: CPU seconds between the ends of steps; of every micro-batch examples, tokens, and labels that
count; bytes of all storages that live before the last step, without gradients.
"""

import sys

sys.path.pop(0)  # this folder, whose modules could hide packages of the same name

import functools
import gc
import json
import os
import runpy
import time
from pathlib import Path

import transformers

LIVE_BYTES = Path(__file__).parents[2] / "lisa_dist" / "core" / "live_bytes.py"  # which imports torch alone


class Probe(transformers.TrainerCallback):
    """Notes every step of the Trainer that it is added to, and writes the notes after the last."""

    def __init__(self, record: str, last: int):
        self._record, self._last = f"{record}.{os.environ.get('RANK', 0)}", last
        self._ended: float | None = None
        self._live_bytes = 0
        self.batches: list[tuple[int, ...]] = []
        self._seconds: list[float] = []

    def on_step_end(self, args, state, control, **_):
        now = time.process_time()
        self._seconds += [] if self._ended is None else [now - self._ended]
        if state.global_step == self._last - 1:  # not after the last, where some peers have switched already
            gc.collect()
            self._live_bytes = runpy.run_path(str(LIVE_BYTES))["live_tensor_bytes"]()
        if state.global_step == self._last:
            found = {"seconds": self._seconds, "batches": self.batches, "live_bytes": self._live_bytes}
            Path(self._record).write_text(json.dumps(found))
            os._exit(0)  # nobody wants the model
        self._ended = time.process_time()


def watch(record: str, last: int) -> None:
    """From now on every Trainer has the probe."""
    probe, trainer = Probe(record, last), transformers.Trainer
    train, training_step = trainer.train, trainer.training_step

    @functools.wraps(train)
    def watched_train(self, *args, **kwargs):
        self.add_callback(probe)
        return train(self, *args, **kwargs)

    @functools.wraps(training_step)
    def watched_step(self, model, inputs, *args, **kwargs):
        probe.batches.append((*inputs["input_ids"].shape, int((inputs["labels"][:, 1:] != -100).sum())))
        return training_step(self, model, inputs, *args, **kwargs)

    trainer.train, trainer.training_step = watched_train, watched_step


if __name__ == "__main__":
    record, last, module, *words = sys.argv[1:]
    watch(record, int(last))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
