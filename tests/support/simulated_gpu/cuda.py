"""A CUDA that is not there: CPU tensors that say they are on a GPU, with streams, an allocator and NCCL.

`install()` makes the process believe that it has a GPU: torch.cuda answers, DeepSpeed's own CUDA accelerator runs, and
every branch for a GPU is taken. The arithmetic is done on the CPU. What is simulated, and what goes wrong without a
word on a real GPU and is a problem here:

clocks.py   streams, events and the host are vector clocks, by which copies and collectives that nobody has waited for
            are seen.
memory.py   every storage is on the device, on the host or pinned; it knows who touched which bytes, and what was not
            ordered after it. New memory is full of NaN. The allocators round as CUDA's do.
modes.py    what Python and operators ask of devices: tensors on two devices, and on another rank's.
cuda.py     (this file) torch.cuda itself, and its refusal to run in a forked process.
nccl.py     collectives on a stream of their own that take no tensor of the host.

Not simulated: kernels (torch's run in their place), the order of kernels on one stream, NCCL's own memory.
"""

import collections
import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from simulated_gpu import nccl
from simulated_gpu.clocks import CLOCKS, DEFAULT, Event, Stream
from simulated_gpu.memory import MEMORY
from simulated_gpu.modes import Devices, Operators, read_on_host, record_stream

_GIB = 1 << 30
_PROPERTIES = types.SimpleNamespace(
    major=9, minor=0, total_memory=80 * _GIB, name="NVIDIA H100 (simulated)", multi_processor_count=132, uuid="none"
)
_IN_FORKED = (
    "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn' start "
    "method"
)


class _Context:
    """CUDA in this process: begun by what needs a device, and of no use in a process that was forked after that."""

    def __init__(self) -> None:
        self.begun_in: int | None = None
        self.device = 0

    def begin(self) -> None:
        if self.begun_in not in (None, os.getpid()):
            raise RuntimeError(_IN_FORKED)
        self.begun_in = os.getpid()


CONTEXT = _Context()


def install() -> None:
    """Make this process believe that it has a GPU, from now on."""
    answer()
    torch.Tensor.record_stream = record_stream
    nccl.install()
    _hand_on_devices()
    _pin_batches()
    _be_found_by_accelerate()
    _see_what_is_saved()
    Operators().__enter__()
    Devices().__enter__()


def answer() -> None:
    """Have torch.cuda alone answer as where there is a GPU, for what is imported after this."""
    for name, reply in _ANSWERS.items():
        setattr(torch.cuda, name, reply)
    for name in ("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all"):
        setattr(torch.cuda.random, name, _ANSWERS[name])
    torch.accelerator.current_stream = torch.cuda.current_stream  # which optimizers ask, from torch 2.15 on


def _beginning(answer: Callable) -> Callable:
    """The same, of what begins CUDA."""

    @functools.wraps(answer)
    def call(*args: Any, **kwargs: Any) -> Any:
        CONTEXT.begin()
        return answer(*args, **kwargs)

    return call


def _set_device(device: Any) -> None:
    CONTEXT.device = device if isinstance(device, int) else torch.device(device).index or 0


def _empty_cache() -> None:
    CLOCKS.host_waits_for_all("empty_cache")  # cudaFree waits for the device


def _reset_peak(device: Any = None) -> None:
    MEMORY.peak = MEMORY.now


@contextlib.contextmanager
def _stream(stream: Stream | None) -> Any:
    with contextlib.nullcontext() if stream is None else CLOCKS.on(stream):
        yield


def _bytes(device: Any = None) -> int:
    return MEMORY.now


_ANSWERS: dict[str, Any] = {
    # What begins CUDA
    "_lazy_init": CONTEXT.begin,
    "set_device": _beginning(_set_device),
    "current_device": _beginning(lambda: CONTEXT.device),
    "synchronize": _beginning(lambda device=None: CLOCKS.host_waits_for_all("synchronize")),
    "current_stream": _beginning(lambda device=None: CLOCKS.current),
    "default_stream": _beginning(lambda device=None: DEFAULT),
    "get_device_properties": _beginning(lambda device=None: _PROPERTIES),
    "get_device_capability": _beginning(lambda device=None: (_PROPERTIES.major, _PROPERTIES.minor)),
    "get_device_name": _beginning(lambda device=None: _PROPERTIES.name),
    "mem_get_info": _beginning(lambda device=None: (70 * _GIB, _PROPERTIES.total_memory)),
    "get_rng_state": _beginning(lambda device=None: torch.get_rng_state()),
    "set_rng_state": _beginning(lambda state, device=None: None),
    "get_rng_state_all": _beginning(lambda: [torch.get_rng_state()]),
    "set_rng_state_all": _beginning(lambda states: None),
    "Stream": Stream,
    "Event": Event,
    "stream": _stream,
    # What does not
    "is_available": lambda: True,
    "is_initialized": lambda: CONTEXT.begun_in == os.getpid(),
    "_is_in_bad_fork": lambda: CONTEXT.begun_in not in (None, os.getpid()),
    "device_count": lambda: int(os.environ.get("LOCAL_SIZE", "1")),
    "is_bf16_supported": lambda *_, **__: True,
    "is_current_stream_capturing": lambda: False,
    "memory_allocated": _bytes,
    "memory_reserved": _bytes,
    "max_memory_allocated": lambda device=None: MEMORY.peak,
    "max_memory_reserved": lambda device=None: MEMORY.peak,
    "memory_stats": lambda device=None: collections.defaultdict(int),
    "reset_peak_memory_stats": _reset_peak,
    "empty_cache": _empty_cache,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "device": lambda device: contextlib.nullcontext(),
    "cudart": lambda: types.SimpleNamespace(cudaHostRegister=MEMORY.register, cudaHostUnregister=MEMORY.unregister),
    "nvtx": types.SimpleNamespace(range_push=lambda message: None, range_pop=lambda: None),
}


def nvml(free: int) -> Any:
    """The module pynvml where NVML says that so many bytes are free."""
    return types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(free=free),
    )


def _hand_on_devices() -> None:
    """Have `Devices` answer in what autograd calls, for which it turns function modes off."""
    from deepspeed.runtime.base_optimizer import BackwardHookStateManager

    function, hooks = torch.autograd.function.BackwardCFunction, torch.autograd.graph.saved_tensors_hooks
    function.apply = _with_devices(function.apply)
    BackwardHookStateManager.run_grad_acc_post_hooks = _with_devices(BackwardHookStateManager.run_grad_acc_post_hooks)
    for name in ("register_post_accumulate_grad_hook", "register_hook"):
        register = getattr(torch.Tensor, name)
        setattr(torch.Tensor, name, lambda self, hook, register=register: register(self, _with_devices(hook)))
    start = hooks.__init__
    hooks.__init__ = lambda self, pack, unpack: start(self, _with_devices(pack), _with_devices(unpack))


def _pin_batches() -> None:
    """A DataLoader asks torch.accelerator, which is not simulated."""
    iterator = torch.utils.data.dataloader._SingleProcessDataLoaderIter
    start = iterator.__init__

    def begin(self: Any, loader: Any) -> None:
        start(self, loader)
        self._pin_memory = loader.pin_memory

    iterator.__init__ = begin


def _be_found_by_accelerate() -> None:
    """From 1.16 on it asks torch.accelerator too."""
    for name, module in list(sys.modules.items()):
        if name.startswith("accelerate.") and hasattr(module, "get_torch_accelerator_backend"):
            module.get_torch_accelerator_backend = lambda *_, **__: ("cuda", torch.cuda)  # type: ignore[attr-defined]


def _see_what_is_saved() -> None:
    """safetensors reads the host's tensors by address."""
    evaluate = safetensors.torch._evaluate_tensors_for_save

    def see(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            read_on_host(tensor)
        evaluate(tensors)

    safetensors.torch._evaluate_tensors_for_save = see


def _with_devices(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_function_stack():
            return function(*args, **kwargs)
        with Devices():
            return function(*args, **kwargs)

    return call
