"""What DeepSpeed's C++ ops leave behind."""

import os
from pathlib import Path

import pytest
from models import tiny_llama
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist


def names_left() -> list[str]:
    port = os.environ["MASTER_PORT"]  # which DeepSpeed has in the name
    # Ranks of the tests have released DeepSpeed's at their start: a file of that name takes its place.
    run = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{port}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{run}_{dist.get_rank()}").touch()
    engine, _ = lisa_dist.initialize(tiny_llama(), "zero2", lisa_dist.LisaConfig())
    dist.barrier()
    left = [path.name for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")]
    dist.barrier()
    engine.destroy()
    return left


@pytest.mark.usefixtures("cpu_ops")
def test_no_shared_memory_outlives_the_ranks():
    """Its names are gone while the ranks still use it, so that a killed rank leaves none of it."""
    assert run_ranks(names_left, 2) == [[], []]
