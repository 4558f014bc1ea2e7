"""Streams, events and the host: whose work comes after whose?

Every piece of work has a number. Each stream, and the host, knows up to which number it comes after the work of each
other: a vector clock.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

import torch

HOST = -1
Clock = dict[int, int]


class Clocks:
    """The clocks of one process."""

    def __init__(self) -> None:
        self.of: dict[int, Clock] = {HOST: {}, 0: {}}
        self.waits: Counter[str] = Counter()  # of the host, by reason
        self._number = 0
        self._streams = 0
        self._current = threading.local()

    @property
    def current(self) -> "Stream":
        """The stream on which work is begun."""
        stack = getattr(self._current, "stack", ())
        return stack[-1] if stack else DEFAULT

    @contextlib.contextmanager
    def on(self, stream: "Stream") -> Iterator[None]:
        """Begin work on a stream."""
        if not hasattr(self._current, "stack"):
            self._current.stack = []
        self._current.stack.append(stream)
        try:
            yield
        finally:
            self._current.stack.pop()

    def new_stream(self) -> int:
        """The number of a stream that has no work yet."""
        self._streams += 1
        self.of[self._streams] = {}
        return self._streams

    def begin(self, who: int) -> int:
        """A new piece of work of a stream, or of the host; its number. What the host has seen comes before it."""
        self._number += 1
        if who != HOST:
            self.come_after(who, self.of[HOST])
        self.of[who][who] = self._number
        return self._number

    def come_after(self, who: int, clock: Clock) -> None:
        """From here on the work of `who` comes after all that `clock` says."""
        mine = self.of[who]
        for other, number in clock.items():
            mine[other] = max(mine.get(other, 0), number)

    def host_waits(self, stream: int, why: str) -> None:
        """The host waits until a stream is done."""
        self.waits[why] += 1
        self.come_after(HOST, self.of[stream])

    def host_waits_for_all(self, why: str) -> None:
        """The host waits until the device is done."""
        self.waits[why] += 1
        for stream in [stream for stream in self.of if stream != HOST]:
            self.come_after(HOST, self.of[stream])

    def sees(self, who: int, other: int, number: int) -> bool:
        """Whether the work of `who` comes after that work of `other`."""
        return who == other or self.of[who].get(other, 0) >= number


class Stream:
    """torch.cuda.Stream."""

    of_collectives = False

    def __init__(self, device: object = None, priority: int = 0, **_: object) -> None:
        self.id = CLOCKS.new_stream()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    @property
    def cuda_stream(self) -> int:
        return self.id

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, other: "Stream") -> None:
        CLOCKS.come_after(self.id, CLOCKS.of[other.id])

    def wait_event(self, event: "Event") -> None:
        CLOCKS.come_after(self.id, event.clock)

    def synchronize(self) -> None:
        CLOCKS.host_waits(self.id, "stream")

    def query(self) -> bool:
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.id == self.id

    def __hash__(self) -> int:
        return self.id


class Event:
    """torch.cuda.Event."""

    def __init__(self, *_: object, **__: object) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict(CLOCKS.of[(stream or CLOCKS.current).id])

    def wait(self, stream: Stream | None = None) -> None:
        (stream or CLOCKS.current).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        CLOCKS.waits["event"] += 1
        CLOCKS.come_after(HOST, self.clock)

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


CLOCKS = Clocks()
DEFAULT = Stream.__new__(Stream)
DEFAULT.id = 0
