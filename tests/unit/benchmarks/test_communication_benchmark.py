"""communication.py of benchmarks/cost: the counter counts what it is given, and an ordinary step of each method."""

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist

from benchmarks.cost import communication

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("cpu_ops")]

MODEL = ("llama3.1-8b", 128, 3)  # 32 wide, keys and values narrower than queries
METHODS = ("lisa", "full", "callback")
WORLD = 2


def count_by_hand() -> dict[str, int]:
    """On a rank: one collective of each kind, of sizes that differ."""
    with communication.CollectiveCounter() as counter:
        dist.all_reduce(torch.ones(3))
        dist.reduce(torch.ones(5), dst=0)
        dist.broadcast(torch.ones(7, dtype=torch.bfloat16), src=0)
        dist.reduce_scatter_tensor(torch.ones(11), torch.ones(11 * WORLD))
        dist.all_gather_into_tensor(torch.ones(13 * WORLD), torch.ones(13))
        dist.all_gather([torch.ones(17) for _ in range(WORLD)], torch.ones(17))
        dist.all_reduce(torch.ones((), dtype=torch.float64))
        dist.broadcast(torch.ones(4, dtype=torch.int64), src=0)
        dist.barrier()
        torch.ones(100) + 1  # sends nothing
    return dict(counter.bytes)


def test_the_counter_counts_the_whole_tensor_of_each_collective():
    weights = {"all_reduce": 4 * 3, "reduce": 4 * 5, "broadcast": 2 * 7, "reduce_scatter_tensor": 4 * 11 * WORLD}
    weights |= {"all_gather_into_tensor": 4 * 13 * WORLD, "all_gather": 4 * 17 * WORLD}
    control = {"control: all_reduce": 8, "control: broadcast": 8 * 4, "control: barrier": 0}
    assert run_ranks(count_by_hand, WORLD) == [weights | control] * WORLD


def test_what_goes_over_the_wire_in_rings():
    sent = {"all_reduce": 8, "control: all_reduce": 4, "all_gather_into_tensor": 16}
    assert communication.on_wire(sent, 4) == 18 + 12
    assert communication.on_wire({"reduce_scatter_tensor": 16}, 1) == 0


def count_methods(names: tuple[str, ...], ds_config: str | dict) -> dict[str, dict]:
    """On a rank: what these methods send."""
    config, counting = communication.shrunk_config(*MODEL), communication.Counting()
    methods = {method.name: method for method in communication.SIDE_BY_SIDE}
    return {name: counting.count(8, methods[name], config, ds_config) for name in names}


def check(names: tuple[str, ...], ds_config: str | dict) -> dict[str, dict]:
    """What an ordinary step sends, the same on every rank."""
    first, second = run_ranks(count_methods, WORLD, names, ds_config)
    assert first == second
    return {name: one["moments"]["step"]["counted"] for name, one in first.items()}


def numel() -> int:
    return sum(one.numel() for one in communication.model_of(communication.shrunk_config(*MODEL)).parameters())


def test_stages_1_and_2_reduce_what_trains_and_gather_what_the_optimizer_has():
    steps = check(METHODS, "zero2")
    assert steps["full"]["all_reduce"] == 4 * numel() > steps["lisa"]["all_reduce"]
    gathered = {name: step["all_gather_into_tensor"] for name, step in steps.items()}
    assert gathered["lisa"] < gathered["callback"] == gathered["full"], "a callback gathers what is frozen, too"


def test_stage_3_as_shipped_gathers_a_small_model_once():
    steps = check(METHODS, "zero3")
    assert {step["all_gather_into_tensor"] for step in steps.values()} == {4 * numel()}
    assert steps["full"]["reduce_scatter_tensor"] == 4 * numel() > steps["lisa"]["reduce_scatter_tensor"]


@pytest.mark.parametrize("keeps", ["keeps half", "keeps none"])
def test_stage_3_gathers_twice_what_it_does_not_keep(keeps):
    counted = check(("lisa", "lora r16"), communication.ds_configs(numel())[f"zero3, {keeps}"])
    assert numel() < counted["lisa"]["all_gather_into_tensor"] / 4 < 2 * numel()
