"""The helper that runs ranks sees failures, deaths and hangs."""

import os
import time

import pytest
from ranks import RankError, run_ranks
from torch import distributed as dist


def rank_and_world() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def fail_on_rank_1() -> None:
    assert dist.get_rank() != 1, "rank 1 fails on purpose"


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_every_rank_answers():
    assert run_ranks(rank_and_world, 2) == [(0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("function", "said"),
    [(fail_on_rank_1, "rank 1 fails on purpose"), (die_on_rank_1, "rank 1 died"), (hang_on_rank_1, "rank 1 hung")],
)
def test_what_goes_wrong_on_one_rank_is_seen(function, said):
    with pytest.raises(RankError, match=said):
        run_ranks(function, 2, timeout=60 if function is not hang_on_rank_1 else 4)
    assert run_ranks(rank_and_world, 2) == [(0, 2), (1, 2)], "the next test gets fresh ranks"
