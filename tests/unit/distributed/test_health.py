"""What a run says of its hosts, of ranks that differ, and of one that is slow."""

import json
import os
import re
import socket
import time
from unittest.mock import patch

import pytest
import torch
from cases import full
from models import save_tiny_llama, tiny_llama, token_batches
from ranks import run_ranks

import lisa_dist
from lisa_dist.config import UserError
from lisa_dist.distributed import health
from lisa_dist.distributed.health import ComputeTime, check_same_everywhere, describe_ranks
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.run import run


def compare(*of_rank: dict) -> str:
    """What a rank is told where each rank has one of the dicts."""
    rank = torch.distributed.get_rank()
    with patch.dict(os.environ, SLURMD_NODENAME=f"node{rank + 1}"):
        try:
            check_same_everywhere(of_rank[rank], "start all ranks alike")
        except UserError as error:
            return str(error)
    return "alike"


def test_ranks_that_differ_are_named_on_every_rank():
    same = {"torch": "2.13.0", "--learning_rate": 1e-5}
    assert run_ranks(compare, 2, same, dict(same)) == ["alike", "alike"]
    said = run_ranks(compare, 2, same, {"torch": "2.6.0", "--learning_rate": 1e-5, "triton": "3.9.0"})
    assert said[0] == said[1]
    assert said[0] == (
        "host node2, rank 1: torch is 2.6.0, not 2.13.0; triton is 3.9.0, not None, as on host node1, rank 0: start "
        "all ranks alike."
    )


def describe(host_of_rank: list[str]) -> list[tuple[str, str]]:
    with patch.dict(os.environ, SLURMD_NODENAME=host_of_rank[torch.distributed.get_rank()]):
        return describe_ranks(torch.device("cpu"))


def test_hosts_and_interconnect_are_described():
    for rows in run_ranks(describe, 2, ["node1", "node2"]):
        (_, hosts), (_, interconnect) = rows
        assert hosts == "node1: rank 0; node2: rank 1; CPU"
        assert re.fullmatch(r"gloo over lo \(127\.0\.0\.1\); all-reduce \d+\.\d\d GB/s a rank", interconnect)
    (_, hosts), (_, interconnect) = run_ranks(describe, 2, ["node1", "node1"])[0]
    assert hosts == "node1: ranks 0-1; CPU"
    assert interconnect.startswith("gloo within the host; all-reduce ")
    assert run_ranks(describe, 1, ["node1"]) == [[("hosts", "node1: rank 0; CPU")]]


@pytest.mark.parametrize(
    ("ranks", "said"),
    [([3], "rank 3"), ([0, 1, 2, 3], "ranks 0-3"), ([0, 2, 4], "ranks 0,2,4"), ([0, 1, 4, 6, 7], "ranks 0-1,4,6-7")],
)
def test_ranks_are_told_in_ranges(ranks, said):
    assert health._in_ranges(ranks) == said


@pytest.mark.parametrize(
    ("files", "variables", "said"),
    [
        (["mlx5_1", "mlx5_0"], {"NCCL_SOCKET_IFNAME": "eth0"}, "nccl, InfiniBand adapters mlx5_0, mlx5_1"),
        (["mlx5_0", "mlx5_1"], {"NCCL_IB_HCA": "mlx5_1"}, "nccl, InfiniBand adapters mlx5_1"),
        (["mlx5_0"], {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "eth0"}, "nccl over eth0 (NCCL_SOCKET_IFNAME)"),
        ([], {}, "nccl over lo (127.0.0.1)"),
    ],
)
def test_what_nccl_has_between_hosts(monkeypatch, files, variables, said):
    monkeypatch.setattr(health.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(health.os, "listdir", lambda folder: files)
    monkeypatch.setattr(health.os.path, "isdir", lambda folder: bool(files))
    for name in ("MASTER_ADDR", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert health._interconnect() == said


def many_spans() -> None:
    """Far more passes than a log sees: what is kept of them does not grow, and no second is lost."""
    model = torch.nn.Linear(1, 1)
    times = ComputeTime(model, torch.device("cpu"), waits=False)
    clock = iter(range(10**9))
    times._now = lambda: next(clock)  # each pass takes a second
    for _ in range(3 * health._MANY_SPANS):
        model(torch.zeros(1, 1))
    assert len(times._spans) < health._MANY_SPANS
    times._add_up()
    assert times._seconds == 3 * health._MANY_SPANS


def test_a_run_that_never_logs_keeps_little():
    run_ranks(many_spans, 1)


def slow_rank(ds_config: str, slow: int) -> tuple[int, float, str, tuple[int, float, str]]:
    engine, lisa = lisa_dist.initialize(tiny_llama(), ds_config, lisa_dist.LisaConfig.plain(), lr=1e-4)
    times = ComputeTime(engine.module, torch.device("cpu"), lisa.partitions.weights_are_sharded)
    batches = token_batches(4, rows=2)

    def train(steps: range) -> None:
        for step in steps:
            lisa.on_step_begin()
            engine.backward(engine(input_ids=batches[step, 0], labels=batches[step, 0]).loss)
            engine.step()

    train(range(2))
    times.slowest()
    if torch.distributed.get_rank() == slow:
        module = engine.module.model.layers[0].mlp.up_proj
        forward = module.forward
        module.forward = lambda *args: (time.sleep(0.5), forward(*args))[1]
    train(range(2, 4))
    found = times.slowest()
    engine.eval()
    with torch.no_grad():
        engine(input_ids=batches[0, 0])
    engine.destroy()
    return *found, times.slowest()


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("ds_config", [full("zero2"), "zero3"])
def test_a_slow_rank_is_named(ds_config):
    """Where forward passes wait for each other too; an evaluation does not count."""
    for slow in (0, 1):
        for rank, times, host, nothing in run_ranks(slow_rank, 2, ds_config, slow):
            assert rank == slow
            assert times > 1.5
            assert host == socket.gethostname()
            assert nothing == (0, 1.0, host)


def start(folder: str, *flags_of_rank: dict) -> str:
    """What ends a run whose ranks have been given different flags, or rows.jsonl in folders of their own."""
    rank = torch.distributed.get_rank()
    values = {"model_name_or_path": f"{folder}/model", "dataset_name": "rows.jsonl", "report_to": "none"}
    values |= {"output_dir": f"{folder}/out", "max_steps": 1} | flags_of_rank[rank]
    with pytest.MonkeyPatch.context() as here, pytest.raises(UserError) as error:
        here.chdir(values.pop("in"))
        run(parse_arguments([word for name, value in values.items() for word in (f"--{name}", str(value))]))
    return str(error.value)


@pytest.mark.usefixtures("cpu_ops")
def test_a_run_whose_ranks_differ_ends_at_the_start(tmp_path):
    save_tiny_llama(tmp_path / "model")
    rows = [json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) for n in range(8)]
    for host, lines in (("1", rows), ("2", [*rows[:-1], rows[0]])):
        (tmp_path / host).mkdir()
        (tmp_path / host / "rows.jsonl").write_text("\n".join(lines))
    first, second = {"in": tmp_path / "1"}, {"in": tmp_path / "2"}
    said = run_ranks(start, 2, str(tmp_path), first, first | {"learning_rate": 1e-3, "lisa_seed": 7})
    assert said[0] == said[1]
    assert ", rank 1: --learning_rate is 0.001, not 0.0002; --lisa_seed is 7, not 0, as on host " in said[0]
    said = run_ranks(start, 2, str(tmp_path), first, second)
    assert "rank 1: the content of --dataset_name rows.jsonl is 8 examples with checksum" in said[0]
