"""Which silent ranks the watchdog names."""

import json

from lisa_dist.distributed import watchdog


def test_the_ranks_that_are_silent_longest_are_named(monkeypatch):
    """Of 64 ranks 0 to 31 are 2 s late, and 40 to 59 have said nothing for 122 s."""
    clock = iter([0.0, 0.0, 120.0, 122.0])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    signs, gone = watchdog._Signs(64), range(40, 60)
    signs.summary(["1 1"] * 64)
    signs.summary(["1 1" if rank in gone else "2 2" for rank in range(64)])
    summary = signs.summary(["1 1" if rank in gone else "2 2" if rank < 32 else "3 3" for rank in range(64)])
    summary = json.loads(json.dumps(summary))  # as the store holds it
    assert watchdog._name_silent(summary, 120.0) == f"{list(range(40, 56))} and 4 more"
    assert watchdog._name_silent(summary, 1.9) == f"{list(range(40, 56))} and 36 more"
    assert watchdog._name_silent(summary, 130.0) == ""
