"""SIGTERM and SIGUSR1, and Ctrl-C of the command line: finish the step, save, and end well.

Schedulers send one of them before they take a machine away, often to some ranks only and now and then twice. All ranks
must stop after the same step, so they agree on it in every step: 8 bytes over gloo, which no GPU waits for.
"""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist

from lisa_dist.distributed.ranks import gloo_group

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ONE_SIGNAL = 2.0  # seconds: launchers and schedulers both pass a signal on, so it may come twice
INTERRUPT_FILE = "LISA_DIST_INTERRUPT_FILE"  # the variable of a file that is there once `--gpus` has received Ctrl-C
_received: list[tuple[int, float]] = []  # the first signal and when it came
_pipe: list[int] = []
_forking = threading.local()  # .mask: the signals a thread that forks had blocked


def catch_stop_signals() -> dict[int, Any]:
    """From now on a first signal is recorded for `StopSignals`, and a second one ends the process at once.

    Returns the handlers that were in place. Only a process's main thread can do this; others get an empty dict.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    if not _pipe:
        # Python runs handlers between the main thread's bytecodes, and that thread may be in a collective that does
        # not return. The byte that a signal writes here reaches another thread whatever the main thread does.
        _pipe.extend(os.pipe())
        os.set_blocking(_pipe[1], False)
        signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(_pipe[0],), name="lisa_dist signals", daemon=True).start()
        _register_at_fork()
    return {number: signal.signal(number, _receive) for number in _SIGNALS}


class StopSignals:
    """`with StopSignals() as stop: ...` around a training loop that calls `stop.agree()` after every step.

    `stopped_by` is the name of the signal that the ranks have agreed on, None before.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self._previous: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> "StopSignals":
        if dist.is_initialized() and dist.get_backend() != "gloo":
            self._group = gloo_group()
        self._previous = catch_stop_signals()
        # Of a process that ends with the run Ctrl-C too. In a notebook or a script it stays an exception, and before
        # training too, when there is nothing to save.
        if _receive in self._previous.values() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, _receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if _receive not in self._previous.values():  # not a process that ends with the run
            _received.clear()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def agree(self) -> str | None:
        """The name of a signal that any rank has received, on every rank; each calls it after the same step."""
        number = torch.tensor([_received[0][0] if _received else 0])
        if dist.is_initialized():
            dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        self.stopped_by = signal.Signals(int(number)).name if number else None
        return self.stopped_by


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """In the body a signal ends the process at once, as if nobody caught it: in a wait before there is what to save."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # no other can set a handler
    caught = [number for number in _SIGNALS if in_main_thread and signal.getsignal(number) is _receive]
    for number in caught:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, _receive)


def _receive(number: int, frame: FrameType | None) -> None:
    """Takes the place of the default, which would end the process; `_listen` does the work."""


def _listen(read_end: int) -> None:
    while byte := os.read(read_end, 1):
        number, now = byte[0], time.monotonic()
        if signal.getsignal(number) is not _receive:
            continue
        if not _received:
            _received.append((signal.SIGINT if _is_ctrl_c_of_launcher(number) else number, now))
            if number == signal.SIGINT:
                print(
                    "Ctrl-C: the run saves after this step and ends; another one, some seconds later, ends it at once",
                    flush=True,
                )
        elif now - _received[0][1] > _ONE_SIGNAL:
            os._exit(128 + number)  # asked again: at once


def _is_ctrl_c_of_launcher(number: int) -> bool:
    """Return whether a SIGTERM stands for a Ctrl-C that the process with `--gpus` has received."""
    path = os.environ.get(INTERRUPT_FILE)
    return number == signal.SIGTERM and path is not None and os.path.exists(path)


@functools.cache
def _register_at_fork() -> None:
    """Once: a child that trains itself has these hooks already."""
    os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_forget_in_child)


def _block_signals() -> None:
    """A signal to a child that still has our handlers would be lost on it, and reach us through the pipe: it waits."""
    # Noted first: these calls run the handlers of other signals, which may raise.
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_SIGNALS, signal.SIGINT))


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _forget_in_child() -> None:
    """A forked worker of a data loader or a pool ends by SIGTERM as usual, and tells this process nothing.

    Ctrl-C reaches it with this process, whose last steps need its rows: it ignores that.
    """
    try:
        signal.set_wakeup_fd(-1)
        _pipe.clear()  # its thread is not here
        _received.clear()
        for number in _SIGNALS:
            if signal.getsignal(number) is _receive:
                signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is _receive:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    finally:
        _unblock_signals()
