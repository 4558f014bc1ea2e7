"""States of sleeping blocks, alone: the order of copies on a device with streams, and buffers that serve again."""

import contextlib

import pytest
import torch

from lisa_dist.errors import UserError
from lisa_dist.optim.states import (
    CopyStream,
    HostStates,
    PartitionState,
    buffers_of_block,
    check_steps_are_counted,
    pinned_block,
    pinned_bytes,
)


class Stream:
    """Writes down what a CUDA stream is told."""

    def __init__(self, name: str, told: list):
        self.name, self.told = name, told

    def wait_stream(self, other) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


def test_copies_see_what_was_computed_and_the_step_waits_for_them(monkeypatch):
    told: list[str] = []
    compute, side = Stream("compute", told), Stream("side", told)

    @contextlib.contextmanager
    def on(stream):
        told.append(f"on {stream.name}")
        yield
        told.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    copies = CopyStream(torch.device("cuda"))
    with copies.after_compute():
        told.append("copy")
    copies.wait()
    assert told == ["side waits for compute", "on side", "copy", "off side", "compute waits for side"]


class OnADevice(HostStates):
    """As where the states are on a device: each is copied, into memory that need not be pinned."""

    def __init__(self):
        super().__init__(CopyStream())
        self.made: list[torch.Tensor] = []

    def _moves(self, value: torch.Tensor) -> bool:
        return True

    def _new_block(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        self.made.append(torch.empty(numel, dtype=dtype))
        return self.made[-1]


def test_buffers_of_what_was_activated_serve_what_becomes_inactive_next():
    states = OnADevice()
    one = PartitionState(torch.arange(8.0), {"exp_avg": torch.ones(8), "step": torch.tensor(3.0)})
    states.put(("a",), one, [])
    assert len(states.made) == 2
    assert states.nbytes == one.nbytes
    taken = states.take(("a",))
    assert torch.equal(taken.master, one.master)
    assert taken.master is not one.master
    assert taken.optimizer_state["step"] is one.optimizer_state["step"]
    assert states.nbytes == one.nbytes - 4, "spare buffers count too"
    other = PartitionState(torch.zeros(8), {"exp_avg": torch.full((8,), 2.0), "step": torch.tensor(1.0)})
    states.put(("b",), other, [])
    assert len(states.made) == 2, "no new ones"
    assert states.nbytes == other.nbytes
    assert torch.equal(states.states[("b",)].optimizer_state["exp_avg"], other.optimizer_state["exp_avg"])
    states.put(("c",), one, [])
    assert len(states.made) == 4
    assert states.take(("a",)) is None
    states.clear()
    assert states.states == {}


@pytest.mark.parametrize(("nbytes", "count"), [(1 << 20, 1), ((1 << 20) + 1, 7), (1_268_000_000, 3), (7, 1), (5, 3)])
def test_buffers_share_a_block_that_they_fill(nbytes, count):
    """A layer of LLaMA-2-13B has 317 M elements: 1.27 GB in fp32, for which torch would take 2.1."""
    assert buffers_of_block(nbytes) == count
    block = pinned_block(nbytes * count)
    assert block & (block - 1) == 0
    assert nbytes * count <= block <= 1.25 * nbytes * count
    assert pinned_bytes(nbytes, 3 * count - 1) == (3 if count > 1 else 2) * block


def test_what_a_block_has_more_is_spare():
    states = OnADevice()
    one = PartitionState(torch.arange(5.0), {"exp_avg": torch.ones(5), "exp_avg_sq": torch.full((5,), 2.0)})
    states.put(("a",), one, [])
    assert [block.numel() for block in states.made] == [15]  # 60 of 64 bytes
    assert states.nbytes == 60
    kept = states.take(("a",))
    assert torch.equal(kept.master, one.master)
    assert all(torch.equal(kept.optimizer_state[name], moment) for name, moment in one.optimizer_state.items())
    states.put(("b",), one, [])
    assert len(states.made) == 1


def test_states_that_are_on_the_host_stay_where_they_are():
    """Without streams copies are in order."""
    states = HostStates(CopyStream(torch.device("cpu")))
    one = PartitionState(torch.arange(8.0), {"exp_avg": torch.ones(8)})
    states.put(("a",), one, [])
    assert states.take(("a",)).master.data_ptr() == one.master.data_ptr()
    states.copies.wait()
    assert states.nbytes == 0


def test_an_optimizer_that_counts_no_steps_is_refused():
    """By which a resume would find its moments."""
    master = torch.zeros(3)
    check_steps_are_counted([PartitionState(master, {}), PartitionState(master, {"step": 1, "moment": master})])
    with pytest.raises(UserError, match="the optimizer's state has no count `step`"):
        check_steps_are_counted([PartitionState(master, {}), PartitionState(master, {"momentum_buffer": master})])
