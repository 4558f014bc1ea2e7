"""What goes wrong without a word on a GPU is a problem on the simulated one, and what is right is none."""

import contextlib
import os

import pytest
import torch
from rehearsal import rehearse

GIVEN_OUT = "memory is given out that another stream still uses"
ON_HOST = "a tensor of the host in a collective"


def in_turn(names: list[str], **settings) -> dict:
    """In a process with a simulated GPU: what each function of this module returns, and kinds of the problems."""
    from simulated_gpu.problems import PROBLEMS

    found = {}
    for name in names:
        PROBLEMS.clear()
        function, _, argument = name.partition(" ")
        value = globals()[function](*([argument] if argument else []), **settings)
        found[name] = [value, sorted({problem.kind for problem in PROBLEMS.values()})]
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda")  # of memory that was used on another stream: no problem of the next one
    return {"found": found}


def found(names: list[str], world_size: int = 1, **settings) -> list[dict]:
    """What each rank found of each."""
    ranks = rehearse(world_size, kind="fault", module=__name__, name="in_turn", names=names, **settings)
    return [rank["found"] for rank in ranks]


def fork(begins: str = "") -> str:
    """CUDA does not survive a fork."""
    if begins:
        torch.cuda.synchronize()
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        message = "nothing"
        try:
            torch.cuda.get_device_capability()
        except RuntimeError as error:
            message = str(error)
        os.write(send, message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(receive, 4096).decode()


def use_on_another_stream(records: str = "") -> None:
    """Memory of the default stream, freed while another stream reads it."""
    side, ready = torch.cuda.Stream(), torch.ones(4096, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ready.sum()
    if records:
        ready.record_stream(side)
    del ready
    torch.zeros(4096, device="cuda")


def read_on_another_stream(waits: str = "") -> None:
    """A stream reads what the default stream writes."""
    side, values = torch.cuda.Stream(), torch.zeros(8, device="cuda")
    values += 1
    if waits:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        values.sum()
    torch.cuda.synchronize()


def read_on_the_host(waits: str = "") -> None:
    """The host reads a copy that is on its way to pinned memory."""
    values, host = torch.ones(8, device="cuda"), torch.zeros(8).pin_memory()
    host.copy_(values, non_blocking=True)
    if waits:
        torch.cuda.synchronize()
    host.tolist()


def add_tensors_of_two_devices() -> None:
    """A GPU refuses it."""
    torch.ones(8, device="cuda") + torch.ones(8)


def read_new_memory() -> bool:
    """Nobody may read it."""
    return torch.empty(8, device="cuda").sum().isnan().item()


def count_bytes() -> list[int]:
    """As CUDA's allocator rounds; beside what there was."""
    before = torch.cuda.memory_allocated()
    tensor = torch.zeros(100, device="cuda")
    assert tensor.is_cuda
    taken = torch.cuda.memory_allocated() - before
    del tensor
    return [taken, torch.cuda.memory_allocated() - before]


def reduce_a_tensor(how: str) -> float:
    """A collective, on NCCL's stream."""
    import torch.distributed as dist

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl")
    values = torch.ones(8, device="cpu" if how == "on the host" else "cuda")
    work = dist.all_reduce(values, async_op=True)
    if how != "not waited for":
        work.wait()
    return sum((values + 0).tolist())


def reduce_without_a_device() -> None:
    """Each rank at the first GPU, as `deepspeed.init_distributed` leaves it."""
    import torch.distributed as dist

    dist.init_process_group("nccl")
    dist.barrier()
    dist.all_reduce(torch.ones(8, device="cuda"))


ON_ONE_RANK = {  # what a function returns, and the problems
    "fork": ("nothing", []),
    "fork begun": (
        "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn' "
        "start method",
        [],
    ),
    "use_on_another_stream": (None, [GIVEN_OUT]),
    "use_on_another_stream recorded": (None, []),
    "read_on_another_stream": (None, ["race"]),
    "read_on_another_stream waits": (None, []),
    "read_on_the_host": (None, ["race"]),
    "read_on_the_host waits": (None, []),
    "add_tensors_of_two_devices": (None, ["tensors on two devices"]),
    "read_new_memory": (True, []),
    "count_bytes": ([512, 0], []),
}


def test_what_is_wrong_on_one_rank_is_a_problem():
    assert found([*ON_ONE_RANK]) == [{name: list(expected) for name, expected in ON_ONE_RANK.items()}]


def test_a_collective_takes_tensors_of_the_device_and_is_waited_for():
    names = ["reduce_a_tensor waited for", "reduce_a_tensor not waited for", "reduce_a_tensor on the host"]
    for right, too_early, on_host in map(dict.values, found(names, 2)):
        assert right == [16.0, []]
        assert too_early[1] == ["race"]
        assert ON_HOST in on_host[1]


def test_a_rank_has_a_gpu_of_its_own():
    kinds = [rank["reduce_without_a_device"][1] for rank in found(["reduce_without_a_device"], 2)]
    assert kinds == [[], ["a collective on another rank's GPU", "a tensor on another rank's GPU"]]


# Faults of LISA's own, in a loop


def loop_with(fault: str, **settings) -> None:
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
        "no-wait": (CopyStream, "wait", lambda self, *_: None),
        "no-hold": (CopyStream, "hold", lambda self, tensor: None),
        "no-order": (CopyStream, "after_compute", unordered),
        "message-on-the-host": (guards, "torch", OnHost()),
        "no-wait-before-a-save": (LisaController, "saved_states", saved_at_once),
        "nothing": (CopyStream, "wait", CopyStream.wait),
    }[fault]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*replaced)
        loop(**settings)


# Overlapping, DeepSpeed's backward pass waits for the device, which would hide what LISA does not wait for.
KEEP = {"ds_config": "zero2", "zero": {"overlap_comm": False}, "lisa_state": "keep", "lisa_always_on": "rest"}
KEEP |= {"lisa_activated_layers": 3}


@pytest.mark.parametrize(
    ("expected", "world_size", "changes"),
    [
        ({"no-wait": "race", "no-hold": GIVEN_OUT, "no-order": "race", "nothing": None}, 1, {}),
        # A rank that is alone sends none.
        ({"message-on-the-host": ON_HOST}, 2, {}),
        # The step before it began a period; what is written is read past all operators.
        ({"no-wait-before-a-save": "race", "nothing": None}, 1, {"steps": 4, "saves": True}),
    ],
    ids=["copies", "messages", "saves"],
)
def test_a_missing_line_of_the_library_is_a_problem(expected, world_size, changes):
    names = {f"loop_with {fault}": kind for fault, kind in expected.items()}
    (kinds, *_) = found([*names], world_size, **KEEP | changes)
    for name, kind in names.items():
        assert kind in kinds[name][1] if kind else kinds[name][1] == [], name
