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
_received: list[tuple[int, float]] = []  # the first signal and when it came


def catch_stop_signals() -> dict:
    """From now on a first signal is noted, for `StopSignals` to ask for, and a second one ends the process at once.

    Returns the handlers that were in place. Only a process's main thread can do this; others get an empty dict.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, _receive) for number in _SIGNALS}


class StopSignals:
    """`with StopSignals() as stop: ...` around a training loop that asks `stop.agreed()` after every step."""

    def __init__(self):
        self._previous: dict = {}
        self._group = None

    def __enter__(self):
        if dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        self._previous = catch_stop_signals()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if _receive not in self._previous.values():  # not a process that ends with the run
            _received.clear()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def agreed(self) -> str | None:
        """The name of a signal that any rank has received, on every rank; each calls it after the same step."""
        number = torch.tensor([_received[0][0] if _received else 0])
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(number.item()).name if number.item() else None


def _receive(number: int, frame) -> None:
    now = time.monotonic()
    if not _received:
        _received.append((number, now))
    elif now - _received[0][1] > _ONE_SIGNAL:
        os._exit(128 + number)  # asked again: at once
