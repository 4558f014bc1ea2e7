"""What goes wrong without a word on a GPU is a problem on the simulated one, and what is right is none."""

import contextlib
import os

import pytest
import torch
from rehearsal import rehearse

# Each function below runs in a process with a simulated GPU; `found` is what it returns and the problems.


def found(name: str, world_size: int = 1, **arguments) -> dict:
    """What rank 0 found."""
    return rehearse(world_size, may_raise=True, kind="fault", module=__name__, name=name, **arguments)[0]


def kinds(outcome: dict) -> set[str]:
    return {problem.split(":")[0] for problem in outcome["problems"]}


def use_on_another_stream(records: bool) -> None:
    """Memory of the default stream, freed while another stream reads it."""
    side, ready = torch.cuda.Stream(), torch.ones(4096, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ready.sum()
    if records:
        ready.record_stream(side)
    del ready
    torch.zeros(4096, device="cuda")


def read_on_another_stream(waits: bool) -> None:
    """A stream reads what the default stream writes."""
    side, values = torch.cuda.Stream(), torch.zeros(8, device="cuda")
    values += 1
    if waits:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        values.sum()
    torch.cuda.synchronize()


def read_on_the_host(waits: bool) -> dict:
    """The host reads a copy that is on its way to pinned memory."""
    values, host = torch.ones(8, device="cuda"), torch.zeros(8).pin_memory()
    host.copy_(values, non_blocking=True)
    if waits:
        torch.cuda.synchronize()
    return {"values": host.tolist()}


def add_tensors_of_two_devices() -> None:
    """A GPU refuses it."""
    torch.ones(8, device="cuda") + torch.ones(8)


def reduce_a_tensor(device: str, waits: bool = True) -> dict:
    """A collective, on NCCL's stream."""
    import torch.distributed as dist

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    values = torch.ones(8, device=device)
    work = dist.all_reduce(values, async_op=True)
    if waits:
        work.wait()
    return {"values": (values + 0).tolist()}


def reduce_without_a_device() -> None:
    """Each rank at the first GPU, as `deepspeed.init_distributed` leaves it."""
    import torch.distributed as dist

    dist.init_process_group("nccl")
    dist.barrier()
    dist.all_reduce(torch.ones(8, device="cuda"))


def read_new_memory() -> dict:
    """Nobody may read it."""
    return {"sum": torch.empty(8, device="cuda").sum().isnan().item()}


def count_bytes() -> dict:
    """As CUDA's allocators round."""
    tensor, pinned = torch.zeros(100, device="cuda"), torch.zeros(5 << 18, pin_memory=True)
    from simulated_gpu.memory import MEMORY

    found = {"device": torch.cuda.memory_allocated(), "pinned": MEMORY.pinned_reserved}
    assert pinned.is_pinned()
    assert tensor.is_cuda
    del tensor, pinned
    again = torch.zeros(6 << 18, pin_memory=True)  # takes the block that was freed
    return found | {
        "device after": torch.cuda.memory_allocated(),
        "pinned after": MEMORY.pinned_reserved,
        "n": len(again),
    }


def fork_after_the_beginning(begins: bool) -> dict:
    """CUDA does not survive a fork."""
    if begins:
        torch.cuda.synchronize()
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        message = ""
        try:
            torch.cuda.get_device_capability()
        except RuntimeError as error:
            message = str(error)
        os.write(send, message.encode() or b"nothing")
        os._exit(0)
    os.waitpid(child, 0)
    return {"child": os.read(receive, 4096).decode()}


def test_memory_that_another_stream_uses_is_not_given_out():
    assert kinds(found("use_on_another_stream", records=False)) == {
        "memory is given out that another stream still uses"
    }
    assert not kinds(found("use_on_another_stream", records=True))


def test_streams_wait_for_each_other():
    assert kinds(found("read_on_another_stream", waits=False)) == {"race"}
    assert not kinds(found("read_on_another_stream", waits=True))


def test_the_host_waits_for_what_it_reads():
    outcome = found("read_on_the_host", waits=False, early=0)
    assert kinds(outcome) == {"race"}
    assert outcome["values"] == [0.0] * 8
    outcome = found("read_on_the_host", waits=True, early=0)
    assert not kinds(outcome)
    assert outcome["values"] == [1.0] * 8


def test_tensors_are_on_one_device():
    assert kinds(found("add_tensors_of_two_devices")) == {"tensors on two devices"}


def test_a_collective_takes_tensors_of_the_device():
    assert "a tensor of the host in a collective" in kinds(found("reduce_a_tensor", 2, device="cpu"))
    assert not kinds(found("reduce_a_tensor", 2, device="cuda"))


def test_a_collective_is_waited_for():
    outcome = found("reduce_a_tensor", 2, device="cuda", waits=False, early=0)
    assert kinds(outcome) == {"race"}
    assert outcome["values"] != [2.0] * 8
    assert found("reduce_a_tensor", 2, device="cuda", early=0)["values"] == [2.0] * 8


def test_a_rank_has_a_gpu_of_its_own():
    outcome = rehearse(2, kind="fault", module=__name__, name="reduce_without_a_device")
    assert [bool(kinds(one)) for one in outcome] == [False, True]
    assert kinds(outcome[1]) == {"a tensor on another rank's GPU", "a collective on another rank's GPU"}


def test_new_memory_has_nothing_in_it():
    assert found("read_new_memory")["sum"]


def test_bytes_are_rounded_as_cuda_rounds_them():
    outcome = found("count_bytes")
    assert outcome["device"] == 512
    assert outcome["device after"] == 0
    assert outcome["pinned"] == outcome["pinned after"] == 8 << 20


def test_cuda_does_not_survive_a_fork():
    assert "Cannot re-initialize CUDA in forked subprocess" in found("fork_after_the_beginning", begins=True)["child"]
    assert found("fork_after_the_beginning", begins=False)["child"] == "nothing"


# Faults of LISA's own, in a loop


def loop_with(fault: str, **settings) -> dict:
    """A loop in which one line of the library is missing."""
    from rehearsal import loop

    from lisa_dist.core import guards
    from lisa_dist.core.controller import LisaController
    from lisa_dist.optim.states import CopyStream

    @contextlib.contextmanager
    def unordered(self):
        with torch.cuda.stream(self._side):
            yield

    def saved_at_once(self):
        states, pieces = self.partitions.states(), self.partitions.pieces()
        return states | self.host_states.states, pieces | self.host_states.pieces

    class OnHost:
        def __getattr__(self, name):
            return getattr(torch, name)

        def tensor(self, content, **kwargs):
            return torch.tensor(content, **kwargs | ({"device": "cpu"} if isinstance(content, list) else {}))

    replaced = {
        "no wait": (CopyStream, "wait", lambda self, *_: None),
        "no hold": (CopyStream, "hold", lambda self, tensor: None),
        "no order": (CopyStream, "after_compute", unordered),
        "message on the host": (guards, "torch", OnHost()),
        "no wait before a save": (LisaController, "saved_states", saved_at_once),
        "nothing": (CopyStream, "wait", CopyStream.wait),
    }[fault]
    setattr(*replaced)
    return loop(**settings)


# Overlapping, DeepSpeed's backward pass waits for the device, which would hide what LISA does not wait for.
KEEP = {
    "ds_config": "zero2",
    "zero": {"overlap_comm": False},
    "lisa_state": "keep",
    "lisa_always_on": "rest",
    "lisa_activated_layers": 3,
}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("nothing", None),
        ("no wait", "race"),
        ("no hold", "memory is given out that another stream still uses"),
        ("no order", "race"),
        ("message on the host", "a tensor of the host in a collective"),
    ],
)
def test_a_missing_line_of_the_library_is_a_problem(fault, kind):
    ranks = 2 if fault == "message on the host" else 1  # a rank that is alone sends none
    outcome = found("loop_with", ranks, fault=fault, early=0, **KEEP)
    assert kind in kinds(outcome) if kind else not kinds(outcome), outcome["problems"]


def test_a_save_waits_for_what_is_on_its_way_to_the_host():
    """The step before it began a period; what is written is read past all operators."""
    faults = ("nothing", "no wait before a save")
    right, wrong = (found("loop_with", fault=fault, early=0, steps=8, saves=True, **KEEP) for fault in faults)
    assert not kinds(right)
    assert kinds(wrong) == {"race"}
