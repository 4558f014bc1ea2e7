"""SIGTERM and SIGUSR1: finish the step, save, and end well.

Schedulers send one of them before they take a machine away, often to some ranks only and now and then twice. All ranks
must stop after the same step, so they agree on it in every step: 8 bytes over gloo, which no GPU waits for.
"""

import os
import signal
import threading
import time

import torch
from torch import distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ONE_SIGNAL = 2.0  # seconds: launchers and schedulers both pass a signal on, so it may come twice


class StopSignals:
    """`with StopSignals() as stop: ...` around a training loop that asks `stop.agreed()` after every step."""

    def __init__(self):
        self._received, self._received_at = 0, 0.0
        self._previous: dict = {}
        self._group = None

    def __enter__(self):
        if dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def agreed(self) -> str | None:
        """The name of a signal that any rank has received, on every rank; each calls it after the same step."""
        number = torch.tensor([self._received])
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(number.item()).name if number.item() else None

    def _receive(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._received_at = number, now
        elif now - self._received_at > _ONE_SIGNAL:
            os._exit(128 + number)  # asked again: at once
