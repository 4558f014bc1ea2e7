"""communication.py, traffic.py of benchmarks/cost: the counter counts what it is given, formulas what ranks send."""

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist

from benchmarks.cost import communication, traffic

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


def test_what_is_cut_into_equal_parts_is_padded():
    """Three ranks, 2 bytes an element: widths that two ranks can share have nothing to pad."""
    numel, groups = {"large": 7, "asleep": 4, "small": 1}, [["large", "asleep"], ["small"]]
    one_pass = [
        traffic.Visit(True, 0, ("large", "asleep", "small")),
        traffic.Visit(False, 0, ("large", "asleep", "small")),
    ]
    layout = traffic.Layout(numel, groups, ["large", "small"], {}, one_pass)

    def step(stage: int) -> dict[str, int]:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 1}
        return dict(traffic.step_bytes(layout, traffic.Settings(3, 2, traffic.DeepSpeedZeroConfig(**zero))))

    of_stage_2 = {"all_reduce": 2 * (7 + 1), "all_gather_into_tensor": 2 * (12 + 6), "control: all_reduce": 2 * 4 + 1}
    of_stage_3 = {"reduce_scatter_tensor": 2 * (9 + 3), "all_gather_into_tensor": 2 * (9 + 6 + 3)}
    assert step(2) == of_stage_2
    assert step(3) == of_stage_3 | {"control: all_reduce": 2 * 8}


def test_what_goes_over_the_wire_in_rings():
    assert traffic.on_wire({"all_reduce": 8, "control: all_reduce": 4, "all_gather_into_tensor": 16}, 4) == 18 + 12
    assert traffic.on_wire({"reduce_scatter_tensor": 16}, 1) == 0
    step, switch = traffic.Counter(broadcast=200), traffic.Counter(all_gather=400)
    moments = {"step": step, "first step": step, "second step": step + step, "switch": switch}
    assert traffic.mean_of_period(moments, 2) == (20 * 100 + 100 + 200) / 20
    assert traffic.mean_of_period({"step": step}, 2) == 100


def count_methods(names: tuple[str, ...], ds_config: str | dict, dtype: str) -> dict[str, dict]:
    """On a rank: what these methods send."""
    config, counting = communication.shrunk_config(*MODEL), communication.Counting()
    settings = {"interval": communication.INTERVAL, "dtype": getattr(torch, dtype)}
    methods = {method.name: method for method in communication.SIDE_BY_SIDE}
    return {name: counting.count(8, methods[name], config, ds_config, **settings) for name in names}


def check(names: tuple[str, ...], ds_config: str | dict, dtype: str = "float32") -> dict[str, dict]:
    """Counted is what the formula says, on every rank; what was counted."""
    settings = communication.Settings.of(ds_config, communication.shrunk_config(*MODEL), WORLD, getattr(torch, dtype))
    of_ranks = run_ranks(count_methods, WORLD, names, ds_config, dtype)
    for method in [method for method in communication.SIDE_BY_SIDE if method.name in names]:
        counted = [rank[method.name] for rank in of_ranks]
        was, active = counted[0]["was"], counted[0]["active"]
        layout = communication.layout_of(method, *MODEL, active)
        formula = communication.bytes_by_formula(method, layout, settings, was, active)
        assert set(formula) == set(communication.MOMENTS if method.name == "lisa" else ["step"])
        for moment, found in formula.items():
            for rank in counted:
                assert rank[moment]["bytes"] == dict(+found), f"{method.name}, {moment}"
    return of_ranks[0]


@pytest.mark.parametrize(("ds_config", "dtype"), [("zero1", "float32"), ("zero2", "float32"), ("zero2", "bfloat16")])
def test_stages_1_and_2_send_what_the_formula_says(ds_config, dtype):
    steps = {name: counted["step"]["bytes"] for name, counted in check(METHODS, ds_config, dtype).items()}
    norms = 4 * (2 * 2 + 3)  # of two layers, embed, norm and head; callback's go one by one
    assert steps["callback"]["all_reduce"] == steps["lisa"]["all_reduce"] - norms < steps["full"]["all_reduce"]
    gathered = {name: step["all_gather_into_tensor"] for name, step in steps.items()}
    assert gathered["lisa"] < gathered["callback"] == gathered["full"], "a callback gathers what sleeps, too"


def test_stage_3_as_shipped_gathers_a_small_model_once():
    numel = sum(communication.layout_of(communication.FULL, *MODEL, ()).numel.values())
    steps = {name: counted["step"]["bytes"] for name, counted in check(METHODS, "zero3").items()}
    assert {step["all_gather_into_tensor"] for step in steps.values()} == {4 * numel}
    assert steps["full"]["reduce_scatter_tensor"] == 4 * numel > steps["lisa"]["reduce_scatter_tensor"]


@pytest.mark.parametrize("keeps", ["keeps half", "keeps none"])
def test_stage_3_gathers_twice_what_it_does_not_keep(keeps):
    numel = sum(communication.layout_of(communication.FULL, *MODEL, ()).numel.values())
    counted = check(("lisa", "lora r16"), communication.ds_configs(numel)[f"zero3, {keeps}"])
    gathered = counted["lisa"]["step"]["bytes"]["all_gather_into_tensor"] / 4
    assert numel < gathered < 2 * numel
