"""Ranks that die, hang or raise: the others end within a bounded time and say which rank it was.

A collective waits for all ranks, and neither gloo's nor NCCL's own timeouts bound every wait. So each rank puts a sign
of life into a store of its own, once a second. Rank 0, whose store it is, reads them all, and puts a summary there,
which the others read: what is sent is linear in ranks. A request to a stopped rank 0 never returns, whatever the
store's timeout: so one thread talks to the store and another looks at the clock, and the main thread does neither.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch import distributed as dist

HANG_TIMEOUT = 1800.0  # seconds for a step, unless --hang_timeout says otherwise
_INTERVAL = 1.0  # seconds between signs of life
_SILENCE = 120.0  # seconds after which a process without one is gone, however long a step may take
_GRACE = 10.0  # seconds for the main thread to find out by itself that another rank has failed
_FAILED = "failed: "
_SUMMARY = "summary"
_NAMED = 16  # ranks of a kind, at most, that a summary names
_NOBODY: dict[str, list[Any]] = {"failed": [], "silent": [], "more_silent": [], "behind": []}


class _Signs:
    """Rank 0's: the last sign of each rank, and when it last changed."""

    def __init__(self, world_size: int):
        self._signs, self._changed_at = ["0 0"] * world_size, [time.monotonic()] * world_size

    def summary(self, signs: Sequence[str]) -> dict[str, list[Any]]:
        """Summarize the signs: which ranks have failed, which are silent and for how many seconds, which are slowest.

        At most `_NAMED` ranks of a kind are named, of the silent ones those that have been silent longest. The others
        are counted by whole seconds of silence.
        """
        now, failed = time.monotonic(), [sign.startswith(_FAILED) for sign in signs]
        for rank, (sign, before) in enumerate(zip(signs, self._signs, strict=True)):
            if sign != before:
                self._changed_at[rank] = now
        self._signs = list(signs)
        seconds = [0.0 if gone else now - at for gone, at in zip(failed, self._changed_at, strict=True)]
        # A rank that fails this moment has no count any more.
        beats = [0 if gone else int(sign.split()[-1]) for gone, sign in zip(failed, signs, strict=True)]
        silent = [(rank, long) for rank, long in enumerate(seconds) if long > 1.5 * _INTERVAL]
        silent.sort(key=lambda one: -one[1])
        return {
            "failed": [(rank, signs[rank]) for rank, gone in enumerate(failed) if gone][:_NAMED],
            "silent": silent[:_NAMED],
            "more_silent": list(Counter(int(long) for _, long in silent[_NAMED:]).items()),
            "behind": [rank for rank, count in enumerate(beats) if count == min(beats)][:_NAMED],
        }


def _name_silent(summary: dict[str, list[Any]], seconds: float) -> str:
    """Name the ranks that a summary says have been silent for longer than `seconds`, and count the unnamed ones."""
    named = [rank for rank, silent in summary["silent"] if silent > seconds]
    more = sum(ranks for silent, ranks in summary["more_silent"] if silent > seconds)
    return f"{named}{f' and {more} more' if more else ''}" if named else ""


class Watchdog:
    """`with Watchdog(timeout): ...` around a training loop that calls `beat()` at least once in `timeout` seconds.

    All ranks enter it together. When a rank has no sign of life, has not come on for `timeout` seconds, or has left the
    block by an exception, every other rank prints which one and ends with exit status 1. 0 seconds: off.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._silence = min(timeout, _SILENCE)
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._on = timeout > 0 and self._world_size > 1
        self._beats, self._last_beat = 0, time.monotonic()
        self._steps_ended = False
        self._failure: str | None = None
        self._done = threading.Event()
        self._store: dist.TCPStore | None = None  # kept until no rank asks it: with rank 0's object its server ends
        self._exchanging: threading.Thread | None = None
        # Rank 0's last summary, and when it was another; what the store's thread writes and the other reads.
        self._summary = _NOBODY
        self._answered_at = 0.0

    def beat(self) -> None:
        """The main thread has come on."""
        self._beats += 1
        self._last_beat = time.monotonic()

    def end_steps(self) -> None:
        """There are no more steps to wait for, only what ends a run, such as an upload; dead ranks are still seen."""
        self._steps_ended = True

    def __enter__(self) -> "Watchdog":
        if self._on:
            self._store = self._connect()
            self._answered_at = time.monotonic()
            self.beat()
            threads = [
                threading.Thread(target=target, args=args, name="lisa_dist watchdog", daemon=True)
                for target, args in ((self._exchange, (self._store,)), (self._watch, ()))
            ]
            self._exchanging = threads[0]
            for thread in threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._exchanging is None:  # it is off
            return
        if error is not None:
            self._fail(error)
            return
        try:
            dist.barrier()  # from here on nobody's silence is a fault
        except RuntimeError as lost:
            self._fail(lost)
            raise
        self._done.set()
        self._exchanging.join(self._silence)  # a request may be on its way
        dist.barrier()  # nobody needs rank 0's store any more
        self._store = None

    def _fail(self, error: BaseException) -> None:
        """The main thread has raised: tell the others, and say which rank is behind it, if another one is."""
        self._failure = f"{type(error).__name__}: {error}"
        others = self._failed_ranks()  # those that raised first
        time.sleep(6 * _INTERVAL)  # a summary may be two old
        silent = self._silent_ranks(3 * _INTERVAL)
        if silent:
            self._say(f"rank(s) {silent} no longer answer: they were killed or have stopped")
        elif others and self._failure not in others:
            self._say(others)
        self._done.set()

    def _connect(self) -> dist.TCPStore:
        host, patience = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=self._silence)
        port: list[Any] = [0]
        if self._rank == 0:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            port = [store.port]
        dist.broadcast_object_list(port, src=0)
        if self._rank != 0:
            store = dist.TCPStore(host, port[0], is_master=False, wait_for_workers=False, timeout=patience)
        store.set(str(self._rank), "0 0")
        if self._rank == 0:
            store.set(_SUMMARY, json.dumps([0, self._summary]))
        dist.barrier()
        return store

    def _exchange(self, store: dist.TCPStore) -> None:
        """The store's thread: one sign of life a second, and what rank 0 makes of everybody's."""
        count, last, keys = 0, 0, [str(rank) for rank in range(self._world_size)]
        of_all = _Signs(self._world_size)
        while not self._done.wait(_INTERVAL):
            count += 1
            sign = f"{count} {self._beats}" if self._failure is None else f"{_FAILED}{self._failure}"
            try:
                store.set(str(self._rank), sign)
                if self._rank == 0:
                    summary = of_all.summary([one.decode() for one in store.multi_get(keys)])
                    store.set(_SUMMARY, json.dumps([count, summary]))
                number, summary = json.loads(store.get(_SUMMARY))
            except RuntimeError:
                self._answered_at = -float("inf")  # rank 0's process has ended
                return
            if number != last:
                last, self._summary, self._answered_at = number, summary, time.monotonic()

    def _watch(self) -> None:
        """The clock's thread: ends the process when another rank is gone and the main thread does not notice."""
        while not self._done.wait(_INTERVAL):
            if self._failure is not None:  # the main thread is on its way out
                return
            if self._failed_ranks():
                self._done.wait(_GRACE)
                if self._failure is None and not self._done.is_set():
                    self._end(self._failed_ranks())
                continue  # the main thread has noticed
            hangs = not self._steps_ended and time.monotonic() - self._last_beat > self._timeout
            # A rank that has stopped may have given a sign after the last step that the others still count.
            seconds = min(self._silence, 3 * _INTERVAL) if hangs else self._silence
            if silent := self._silent_ranks(seconds):
                self._end(f"rank(s) {silent} have given no sign of life for {seconds:.0f} s")
            elif hangs:
                faulthandler.dump_traceback()
                last = self._summary["behind"]
                self._end(f"no step for {self._timeout:.0f} s (--hang_timeout); furthest behind: rank(s) {last}")

    def _silent_ranks(self, seconds: float) -> str:
        """Name the ranks that have been silent for longer than `seconds`; an empty text if there are none."""
        summary, age = self._summary, time.monotonic() - self._answered_at
        if age > seconds:
            return "" if self._rank == 0 or any(rank == 0 for rank, _ in summary["failed"]) else "[0]"
        return _name_silent(summary, seconds - age)

    def _failed_ranks(self) -> str:
        return "; ".join(f"rank {rank} has {sign}" for rank, sign in self._summary["failed"])

    def _end(self, reason: str) -> None:
        self._say(reason)
        os._exit(1)  # the main thread is in a collective that will not return

    def _say(self, text: str) -> None:
        way_out = "go on from the last checkpoint with --resume_from_checkpoint true"
        print(f"lisa-dist, rank {self._rank}: {text.removesuffix('.')}; {way_out}", file=sys.stderr, flush=True)
