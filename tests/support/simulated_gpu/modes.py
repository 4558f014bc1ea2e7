"""What Python and operators ask of devices, answered as on a machine with a GPU.

`Operators` is below autograd: it places what is made, orders what is touched, and refuses what a GPU would refuse.
`Devices` is above it: factories, `.to`, `.device`, `.pin_memory`. Every tensor is a tensor of the CPU underneath.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from simulated_gpu.clocks import CLOCKS, HOST, Stream
from simulated_gpu.memory import MEMORY, poison
from simulated_gpu.problems import report
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that take tensors of both places.
_MIXING = ("aten::copy_", "aten::_to_copy", "aten::set_", "aten::index", "aten::index_put_", "aten::_foreach_copy_")
# Operators for whose answer the host waits.
_ASKING = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::is_nonzero")
# Operators that look at no element.
_NAMING = ("aten::detach", "aten::alias", "aten::record_stream", "aten::set_")
_PINNING_IS_FOR_THE_HOST = "Only dense CPU tensors can be pinned"


def local_rank() -> int:
    """The index of this rank's GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class Operators(TorchDispatchMode):
    """Operators of a machine with a GPU."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, placing = dict(kwargs or {}), MEMORY.next_place
        name = function._schema.name
        device, pinned = kwargs.get("device"), kwargs.get("pin_memory")
        if device is not None and device.type == "cuda":
            if pinned:
                raise RuntimeError(_PINNING_IS_FOR_THE_HOST)
            kwargs["device"], placing = torch.device("cpu"), ("cuda", False)
        elif pinned:
            kwargs["pin_memory"], placing = False, ("cpu", True)
        inputs = [*tensors_in(args), *tensors_in(kwargs.values())]
        places = {MEMORY.place_of(tensor) for tensor in inputs}
        self._check_places(name, inputs)
        result = function(*args, **kwargs)
        outputs = tensors_in((result,))
        place, is_pinned = placing or ("cuda" if "cuda" in places else "cpu", False)
        for tensor in outputs:
            if MEMORY.storage(tensor, place, is_pinned).place == "cuda" and _makes_empty(name):
                poison(tensor)
        if not _looks_at_no_element(function, name) and inputs + outputs:
            self._order(function, args, kwargs, inputs, outputs, on_device="cuda" in (*places, place))
        return result

    def _check_places(self, name: str, inputs: list[torch.Tensor]) -> None:
        places = {MEMORY.place_of(tensor) for tensor in inputs if tensor.dim() > 0}
        if len(places) > 1 and name not in _MIXING and not name.startswith("c10d"):
            shown = [(MEMORY.place_of(tensor), tuple(tensor.shape)) for tensor in inputs]
            report("tensors on two devices", f"{name} got {shown}")

    def _order(
        self,
        function: Any,
        args: Sequence[Any],
        kwargs: dict,
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
        on_device: bool,
    ) -> None:
        name, stream = function._schema.name, CLOCKS.current.id
        who = stream if on_device else HOST
        number = CLOCKS.begin(who)
        written = {id(tensor) for tensor in (*outputs, *_written(function, args, kwargs))}
        for tensor in inputs:
            if id(tensor) not in written:
                MEMORY.touch(tensor, False, who, number, name)
        for tensor in inputs + outputs:
            if id(tensor) in written:
                MEMORY.touch(tensor, True, who, number, name)
        if name in ("aten::copy_", "aten::_foreach_copy_"):
            self._wait_for_copies(name, args, kwargs, inputs)
        if name in _ASKING and on_device:
            CLOCKS.host_waits(stream, f"{name.split('::')[1]} of a tensor of the device")

    def _wait_for_copies(self, name: str, args: Sequence[Any], kwargs: dict, inputs: list[torch.Tensor]) -> None:
        """The host waits for a copy that crosses, unless its side is pinned and it was asked not to."""
        crossing = [tensor for tensor in inputs if MEMORY.place_of(tensor) == "cpu"]
        if not crossing or len(crossing) == len(inputs) or CLOCKS.current.of_collectives:  # gloo's own buffers
            return
        asked = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        pageable = [tensor for tensor in crossing if not MEMORY.storage(tensor).pinned]
        if not asked or pageable:
            MEMORY.counts["pageable"] += sum(tensor.nbytes for tensor in pageable)
            CLOCKS.host_waits(CLOCKS.current.id, "copy between host and device")
        else:
            MEMORY.counts["pinned"] += sum(tensor.nbytes for tensor in crossing)


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors with elements among arguments, in lists too."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided and not value.is_meta:
                found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def _written(function: Any, args: Sequence[Any], kwargs: dict) -> list[torch.Tensor]:
    """The arguments that an operator writes to, by its schema."""
    arguments = function._schema.arguments
    given = [*zip(arguments, args, strict=False), *((one, kwargs[one.name]) for one in arguments if one.name in kwargs)]
    return tensors_in(value for one, value in given if one.alias_info is not None and one.alias_info.is_write)


def _makes_empty(name: str) -> bool:
    return name.split("::")[-1].startswith(("empty", "new_empty"))


def _looks_at_no_element(function: Any, name: str) -> bool:
    is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns)
    return is_view or name in _NAMING or _makes_empty(name)


# Above autograd


def device_of(tensor: torch.Tensor) -> torch.device:
    """The device that a tensor says it is on."""
    if tensor.is_meta:
        return torch.device("meta")
    return torch.device("cuda", local_rank()) if MEMORY.place_of(tensor) == "cuda" else torch.device("cpu")


_ANSWERS = {
    torch.Tensor.device.__get__: device_of,
    torch.Tensor.is_cuda.__get__: lambda tensor: device_of(tensor).type == "cuda",
    torch.Tensor.is_cpu.__get__: lambda tensor: device_of(tensor).type == "cpu",
    torch.Tensor.get_device: lambda tensor: local_rank() if device_of(tensor).type == "cuda" else -1,
    torch.Tensor.is_pinned: lambda tensor, *_, **__: MEMORY.storage(tensor).pinned,
}


def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    """`Tensor.record_stream`: its memory is not given out before the stream is done with it."""
    MEMORY.storage(tensor).recorded.add(stream.id)


class Devices(TorchFunctionMode):
    """What Python asks of devices."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if (answer := _ANSWERS.get(function)) is not None:
            return answer(*args, **kwargs)
        if function is torch.Tensor.pin_memory:
            return _pin(args[0])
        if function in (torch.Tensor.cpu, torch.Tensor.cuda):
            return _to(args[0], "cpu" if function is torch.Tensor.cpu else "cuda")
        if function is torch.Tensor.to:
            return _to(*args, **kwargs)
        if function in (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist):
            if device_of(args[0]).type == "cpu":
                read_on_host(args[0])
            elif function is torch.Tensor.tolist:
                CLOCKS.host_waits(CLOCKS.current.id, "tolist of a tensor of the device")
            else:
                raise TypeError("can't convert cuda:0 device type tensor to numpy.")
        return self._make(function, args, kwargs)

    def _make(self, function: Any, args: Sequence[Any], kwargs: dict) -> Any:
        pinned, device = bool(kwargs.pop("pin_memory", False)), _device(kwargs.get("device"))
        if device is None or device.type not in ("cuda", "cpu"):
            if not pinned:
                return function(*args, **kwargs)
            device = torch.device("cpu")
        else:
            kwargs["device"] = "cpu"
        if device.type == "cuda":
            _check_index(device, getattr(function, "__name__", str(function)))
            if pinned:
                raise RuntimeError(_PINNING_IS_FOR_THE_HOST)
        with MEMORY.placing(device.type, pinned):
            made = function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor) and device.type == "cuda":
            MEMORY.put_on_device(made)
        return made


def _device(given: Any) -> torch.device | None:
    if given is None or isinstance(given, torch.device):
        return given
    return torch.device("cuda", given) if isinstance(given, int) else torch.device(given)


def _check_index(device: torch.device, what: str) -> None:
    index = torch.cuda.current_device() if device.index is None else device.index
    if index != local_rank():
        current = torch.cuda.current_device()
        report(
            "a tensor on another rank's GPU",
            f"{what} on {device}, the current device is {current}, LOCAL_RANK is {local_rank()}",
        )


def read_on_host(tensor: torch.Tensor) -> None:
    """The host reads a tensor of its own, past all operators."""
    if device_of(tensor).type == "cpu":
        MEMORY.touch(tensor, False, HOST, CLOCKS.begin(HOST), "a read on the host")


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    if MEMORY.place_of(tensor) == "cuda":
        raise RuntimeError(f"cannot pin 'torch.cuda.FloatTensor'. {_PINNING_IS_FOR_THE_HOST}")
    return tensor if MEMORY.storage(tensor).pinned else _move(tensor, "cpu", pinned=True)


def _move(
    tensor: torch.Tensor,
    place: str,
    dtype: torch.dtype | None = None,
    non_blocking: bool = False,
    pinned: bool = False,
) -> torch.Tensor:
    """A copy of a tensor in another place, ordered as CUDA's is."""
    if dtype is not None and dtype != tensor.dtype and MEMORY.place_of(tensor) == "cuda":
        tensor = tensor.to(dtype)
    with torch.no_grad():
        with MEMORY.placing(place, pinned):
            moved = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
        return moved.copy_(tensor.detach(), non_blocking=bool(non_blocking))


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to` in each of its forms."""
    copy = kwargs.pop("copy", False)
    if isinstance(args[0] if args else None, torch.Tensor):
        args = (device_of(args[0]), args[0].dtype, *args[1:])
    elif args and isinstance(args[0], int):
        args = (torch.device("cuda", args[0]), *args[1:])
    target, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    if tensor.is_meta or (target is not None and target.type == "meta"):
        return torch.Tensor.to(tensor, device=target or tensor.device, dtype=dtype or tensor.dtype)
    if target is None or target.type == MEMORY.place_of(tensor):
        return torch.Tensor.to(tensor, dtype or tensor.dtype, copy=copy, memory_format=layout or torch.preserve_format)
    if target.type == "cuda":
        _check_index(target, "to")
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Moved.apply(tensor, target.type, dtype, non_blocking)
    return _move(tensor, target.type, dtype, non_blocking)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, place: str, dtype: torch.dtype | None, non_blocking: bool) -> Any:
        ctx.back = MEMORY.place_of(tensor), tensor.dtype
        return _move(tensor.detach(), place, dtype, non_blocking)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _move(gradient, *ctx.back), None, None, None
