"""Ranks that die, hang or raise: the others end within a bounded time and say which rank it was.

A collective waits for all ranks, and neither gloo's nor NCCL's own timeouts bound every wait. So a thread of each rank
writes a sign of life into a store of its own, once a second, and reads those of the others. The store is rank 0's; when
rank 0 is the one to go, the others see that the store does not answer.
"""

import faulthandler
import os
import sys
import threading
import time
from datetime import timedelta

from torch import distributed as dist

_INTERVAL = 1.0  # seconds between signs of life
_SILENCE = 120.0  # a process without one is gone, however long a step may take
_GRACE = 10.0  # seconds for the main thread to find out by itself that another rank has failed
_FAILED = b"failed"


class Watchdog:
    """`with Watchdog(timeout): ...` around a training loop that calls `beat()` at least once in `timeout` seconds.

    All ranks enter it together. When a rank has no sign of life, has not come on for `timeout` seconds, or has left the
    block by an exception, every other rank prints which one and ends with exit status 1. 0 seconds: off.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._silence = min(timeout, _SILENCE)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._beats, self._last_beat = 0, time.monotonic()
        self._keys = [f"rank {rank}" for rank in range(self._world_size)]
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """The main thread has come on."""
        self._beats += 1
        self._last_beat = time.monotonic()

    def __enter__(self):
        if self._timeout > 0 and self._world_size > 1:
            self._store = self._connect()
            self.beat()
            self._thread = threading.Thread(target=self._watch, name="lisa_dist watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._thread is None:
            return
        if error is None:
            dist.barrier()  # from here on nobody's silence is a fault
        self._done.set()
        self._thread.join()
        if error is None:
            dist.barrier()  # nobody needs rank 0's store any more
        else:
            self._explain(f"{kind.__name__}: {error}")

    def _connect(self) -> dist.TCPStore:
        host, patience = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=self._silence)
        port = [None]
        if self._rank == 0:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            port = [store.port]
        dist.broadcast_object_list(port, src=0)
        if self._rank != 0:
            store = dist.TCPStore(host, port[0], is_master=False, wait_for_workers=False, timeout=patience)
        store.set(self._keys[self._rank], "begins")
        dist.barrier()
        return store

    # The thread

    def _watch(self) -> None:
        """One sign of life a second, and a look at everybody else's."""
        count, seen = 0, {}
        while not self._done.wait(_INTERVAL):
            count += 1
            try:
                self._store.set(self._keys[self._rank], f"{count} {self._beats}")
                signs = self._store.multi_get(self._keys)
            except RuntimeError as error:
                self._end(f"rank 0 no longer answers ({type(error).__name__})")
            now = time.monotonic()
            for rank, sign in enumerate(signs):
                if sign.startswith(_FAILED):
                    if not self._done.wait(_GRACE):  # most often its end has the main thread raise too
                        self._end(f"rank {rank} has {sign.decode()}")
                elif rank not in seen or seen[rank][0] != sign:
                    seen[rank] = (sign, now)
                elif now - seen[rank][1] > self._silence:
                    self._end(f"rank {rank} has given no sign of life for {self._silence:.0f} s")
            if now - self._last_beat > self._timeout:
                faulthandler.dump_traceback()
                beats = [int(sign.split()[-1]) for sign in signs]
                last = [rank for rank, count in enumerate(beats) if count == min(beats)]
                self._end(f"no step for {self._timeout:.0f} s (--hang_timeout); furthest behind are the ranks {last}")

    def _end(self, reason: str) -> None:
        self._say(reason)
        os._exit(1)  # the main thread is in a collective that will not return

    # An exception in the main thread

    def _explain(self, failure: str) -> None:
        """Tell the others, and say which rank is behind it: one that is silent, else the first that failed."""
        try:
            if self._store.add("failures", 1) == 1:
                self._store.set("first to fail", str(self._rank))
            self._store.set(self._keys[self._rank], f"failed: {failure}")
            before = self._store.multi_get(self._keys)
            time.sleep(3 * _INTERVAL)
            after = self._store.multi_get(self._keys)
            first_to_fail = int(self._store.get("first to fail"))
        except RuntimeError as error:
            self._say(f"rank 0 no longer answers ({type(error).__name__})")
            return
        silent = [rank for rank, signs in enumerate(zip(before, after, strict=True)) if signs[0] == signs[1]]
        silent = [rank for rank in silent if not after[rank].startswith(_FAILED)]
        if silent:
            self._say(f"ranks {silent} no longer answer: they were killed or have stopped")
        elif after[first_to_fail] != after[self._rank]:
            self._say(f"rank {first_to_fail} has {after[first_to_fail].decode()}")

    def _say(self, text: str) -> None:
        way_out = "go on from the last checkpoint with --resume_from_checkpoint true"
        print(f"lisa-dist, rank {self._rank}: {text.removesuffix('.')}; {way_out}", file=sys.stderr, flush=True)
