"""Gloo that says it is NCCL: collectives of the device's tensors alone, on a stream of their own.

NCCL's stream waits for the stream on which a collective is called. That stream waits for the collective at once, or
with `async_op` when `wait` is called; until then nobody knows what the results' memory has in it.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from simulated_gpu.clocks import CLOCKS, Stream
from simulated_gpu.memory import MEMORY
from simulated_gpu.modes import local_rank, tensors_in
from simulated_gpu.problems import report
from torch.distributed import distributed_c10d as c10d

# Of each collective the argument that it writes to, by place.
_RESULTS = {
    "all_reduce": 0, "broadcast": 0, "reduce": 0, "all_gather": 0, "all_gather_into_tensor": 0, "gather": 1,
    "_all_gather_base": 0, "_reduce_scatter_base": 0, "reduce_scatter_tensor": 0, "reduce_scatter": 0,
    "all_to_all_single": 0, "all_to_all": 0, "scatter": 0, "recv": 0, "send": None, "barrier": None,
}  # fmt: skip
_OF_OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


class _Nccl:
    """Which groups say that they are NCCL's."""

    def __init__(self) -> None:
        self.is_backend = False
        self.gloo_groups: set[Any] = set()
        self.inside = False  # a collective, which may call another
        self._stream: Stream | None = None

    def owns(self, group: Any) -> bool:
        return self.is_backend and group not in self.gloo_groups

    @property
    def stream(self) -> Stream:
        if self._stream is None:
            self._stream = Stream()
            self._stream.of_collectives = True
        return self._stream


NCCL = _Nccl()


class _Work:
    """The handle of a collective that was called with `async_op`."""

    def __init__(self, stream: Stream, number: int) -> None:
        self._clock = {**CLOCKS.of[stream.id], stream.id: number}

    def wait(self, timeout: Any = None) -> bool:
        CLOCKS.come_after(CLOCKS.current.id, self._clock)
        return True

    def is_completed(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.wait()


def install() -> None:
    """Replace torch.distributed's functions."""
    dist.is_nccl_available = c10d.is_nccl_available = lambda: True
    start, new_group, backend_of = dist.init_process_group, dist.new_group, dist.get_backend
    device_of_objects = c10d._get_object_coll_device

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        NCCL.is_backend = backend in ("nccl", None)
        return start("gloo" if NCCL.is_backend else backend, *args, **kwargs)

    def make_group(*args: Any, **kwargs: Any) -> Any:
        backend = kwargs.get("backend")
        if backend == "nccl":
            kwargs["backend"] = "gloo"
        group = new_group(*args, **kwargs)
        if backend == "gloo":
            NCCL.gloo_groups.add(group)
        return group

    def get_backend(group: Any = None) -> str:
        return "nccl" if NCCL.owns(group) else backend_of(group)

    dist.init_process_group = c10d.init_process_group = init_process_group
    dist.new_group = c10d.new_group = make_group
    dist.get_backend = c10d.get_backend = get_backend
    c10d._get_object_coll_device = lambda group=None: "cuda" if NCCL.owns(group) else device_of_objects(group)
    for name in (*_RESULTS, *_OF_OBJECTS):
        if hasattr(c10d, name):
            setattr(dist, name, _strict(name, getattr(c10d, name)))


def _strict(name: str, collective: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        groups = [one for one in (*args, kwargs.get("group")) if isinstance(one, dist.ProcessGroup)]
        if NCCL.inside or not NCCL.owns(groups[0] if groups else None):
            return collective(*args, **kwargs)
        current = torch.cuda.current_device()
        if current != local_rank():
            text = f"{name}: the current device is {current}, LOCAL_RANK is {os.environ.get('LOCAL_RANK')}"
            report("a collective on another rank's GPU", text)
        if name in _OF_OBJECTS:
            return collective(*args, **kwargs)
        return _run(name, collective, args, kwargs)

    return call


def _run(name: str, collective: Callable, args: tuple, kwargs: dict) -> Any:
    is_async = bool(kwargs.pop("async_op", False)) or any(one is True for one in args[2:])
    args = tuple(False if one is True else one for one in args)
    tensors = tensors_in([*args, *kwargs.values()])
    if outside := [tensor for tensor in tensors if tensor.numel() and MEMORY.place_of(tensor) == "cpu"]:
        report("a tensor of the host in a collective", f"{name} of {[(tuple(t.shape), t.dtype) for t in outside]}")
    stream, caller = NCCL.stream, CLOCKS.current
    stream.wait_stream(caller)
    place = _RESULTS[name]
    first = [args[place]] if place is not None and len(args) > place else []
    results = tensors_in(first or list(kwargs.values())[:1] if place is not None else [])
    NCCL.inside = True
    try:
        with CLOCKS.on(stream):
            collective(*args, **kwargs)
            number = CLOCKS.begin(stream.id)
            for tensor in tensors:
                is_result = any(tensor is result for result in results)
                MEMORY.touch(tensor, is_result, stream.id, number, name)
    finally:
        NCCL.inside = False
    work = _Work(stream, number)
    if is_async:
        return work
    work.wait()
    return None
