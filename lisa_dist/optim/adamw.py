"""LisaAdamW: AdamW that takes a partition of ZeRO in one pass, in fewer bytes where that is asked for.

An fp32 parameter is a master, or a weight that needs none; a bf16 parameter is a weight without a master, and is
rounded stochastically. Moments have 32 or 8 bits, or are factored (`factored.py`), by parameter group.

The random bits, and the blocks of 8-bit moments, belong to the elements of a model's parameters, not to partitions: a
sharded optimizer says by `prepare` which pieces a partition consists of. So a resume, and another number of ranks, give
the same bits. It also gives gradients as they came and the factor that clips and unscales them, and has the weights
written together with the master; nothing is copied before or after the step.
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from lisa_dist.config_rules import FACTORED, StateBits
from lisa_dist.kernels.adamw import StepNumbers, StepTensors, check_tensors, chunks
from lisa_dist.kernels.dynamic_code import BLOCK, dequantize, num_blocks, quantize
from lisa_dist.kernels.factored import FactoredNumbers, FactoredTensors, check_factored
from lisa_dist.optim import factored
from lisa_dist.optim.factored import Matrix
from lisa_dist.optim.ops import adamw_step, factored_step
from lisa_dist.optim.row_gradient import RowGradient, in_chunks_of_rows
from lisa_dist.optim.states import Fields, Piece

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # AdamW's, and whether each has a sign


@dataclass
class PartitionStep:
    """What is known of one partition (a flat parameter of LisaAdamW) for one step.

    `gradients` are 1-D, or one RowGradient, and follow one another as the partition has them; `weight`, flat like the
    partition, is written too; `gradient_scale`, one fp32 number, multiplies gradients; `draw` chooses random bits: the
    run's count of steps. `matrices`, of a group with factored moments: all of the group, whatever is in the partition;
    `add_up` adds a tensor up over the ranks that share them.
    """

    pieces: Sequence[Piece]
    gradients: Sequence[torch.Tensor | RowGradient]
    weight: torch.Tensor | None = None
    gradient_scale: torch.Tensor | None = None
    draw: int = 0
    matrices: Sequence[Matrix] = ()
    add_up: Callable[[torch.Tensor], None] | None = None


class LisaAdamW(torch.optim.Optimizer):
    """AdamW over fp32 or bf16 parameters, contiguous and of any shape; weight decay is decoupled.

    `state_bits` is 32, 8 or, for matrices, "factored", and a group may have its own as "lisa_state_bits"; `seed` is
    that of the stochastic rounding. A step raises ValueError, and changes nothing, for gradients that are not finite;
    where `prepare` was called, whoever called it has looked. Source: Loshchilov and Hutter (ICLR 2019), Algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: StateBits = 32,
        seed: int = 0,
    ):
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"lisa_state_bits": state_bits})
        self.seed = seed
        self._prepared: dict[torch.Tensor, PartitionStep] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ValueError for settings that AdamW cannot have."""
        settings = self.defaults | param_group
        for name in ("lr", "eps", "weight_decay"):
            if not settings[name] >= 0:
                raise ValueError(f"LisaAdamW: expected {name} of 0 or more, got {settings[name]}.")
        if not all(0 <= beta < 1 for beta in settings["betas"]):
            raise ValueError(f"LisaAdamW: expected betas from 0 up to, not including, 1, got {settings['betas']}.")
        if settings["lisa_state_bits"] not in (8, 32, FACTORED):
            raise ValueError(
                f"LisaAdamW: expected 8 or 32 bits of the moments, or {FACTORED!r}, got {settings['lisa_state_bits']}."
            )
        super().add_param_group(param_group)

    def prepare(self, parameter: torch.Tensor, partition: PartitionStep) -> None:
        """Give the pieces that the parameter consists of, and the gradients of the next step in place of `.grad`."""
        self._prepared[parameter] = partition

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, or that was prepared."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        prepared, self._prepared = self._prepared, {}
        partitions = []
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                partition = prepared.get(parameter)
                if partition is None and parameter.grad is not None:
                    partition = self._alone(group, parameter, f"{number}.{index}")
                if partition is not None:
                    partitions.append((group, parameter, partition))
        alone = [one for _, parameter, one in partitions if parameter not in prepared]
        gradients: list[Any] = [gradient for one in alone for gradient in one.gradients if gradient.numel()]
        extremes = [value.float() for gradient in gradients for value in torch.aminmax(gradient)]
        if extremes and not torch.stack(extremes).isfinite().all():
            raise ValueError("LisaAdamW: expected finite gradients, got NaN or infinity; nothing was changed.")
        steps = [self._step_of(group, parameter, partition) for group, parameter, partition in partitions]
        for step in steps:  # all were checked
            step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep their dtype; torch would give them that of the parameter."""
        super().load_state_dict(state_dict)
        saved = copy.deepcopy(state_dict["state"])
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in saved.get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device) if isinstance(value, torch.Tensor) else value

    def restore(self, group: dict[str, Any], parameter: torch.Tensor, pieces: Sequence[Piece], fields: Fields) -> None:
        """Give a parameter saved moments: "step", and each moment in fp32, as codes with their scales, or factored."""
        if not pieces:
            return
        if group["lisa_state_bits"] == FACTORED:
            moments = {name: fields[name].to(parameter.device, copy=True) for name in factored.FIELDS}
            self.state[parameter] = {"step": fields["step"], factored.WIDTHS: fields[factored.WIDTHS], **moments}
            return
        self.state[parameter] = state = self._new_state(group, parameter, PartitionStep(pieces, []))
        state["step"] = fields["step"]
        for name, signed in MOMENTS.items():
            scales = f"{name}_scales"
            if (scales in fields) == (scales in state):
                for field in {name, scales} & state.keys():
                    state[field].copy_(fields[field])
                continue
            for element, cut, blocks in in_chunks(pieces):
                saved = fields[name][cut].to(parameter.device)
                if scales in state:
                    state[name][cut], state[scales][blocks] = quantize(saved, signed, element)
                else:
                    state[name][cut] = dequantize(saved, fields[scales][blocks].to(parameter.device), signed, element)

    def _new_state(self, group: dict[str, Any], parameter: torch.Tensor, partition: PartitionStep) -> dict[str, Any]:
        if group["lisa_state_bits"] == FACTORED:
            return factored.new_state(partition.matrices, partition.pieces, parameter.device)
        state: dict[str, Any] = {"step": 0}
        blocks = sum(num_blocks(piece.start, piece.length) for piece in partition.pieces)
        numel, device = parameter.numel(), parameter.device
        for name, signed in MOMENTS.items():
            if group["lisa_state_bits"] == 8:
                zero = quantize(torch.zeros(1), signed)[0].item()
                state[name] = torch.full((numel,), zero, dtype=torch.uint8, device=device)
                state[f"{name}_scales"] = torch.zeros(blocks, dtype=torch.float32, device=device)
            else:
                state[name] = torch.zeros(numel, dtype=torch.float32, device=device)
        return state

    def _alone(self, group: dict[str, Any], parameter: torch.Tensor, name: str) -> PartitionStep:
        """A parameter that is no partition: all of itself, with its own gradient."""
        gradient = parameter.grad
        assert gradient is not None
        if not parameter.is_contiguous() or not gradient.is_contiguous():
            raise ValueError(
                f"LisaAdamW: expected parameter {name} and its gradient to be contiguous, got strides "
                f"{parameter.stride()} and {gradient.stride()}."
            )
        draw = self.state[parameter].get("step", 0) if parameter in self.state else 0
        whole = Piece(name, start=0, length=parameter.numel(), offset=0)
        matrices = []
        if group["lisa_state_bits"] == FACTORED:
            if parameter.ndim != 2:
                raise ValueError(
                    f"LisaAdamW: expected parameter {name} to be a matrix, as its moments are {FACTORED}, got shape "
                    f"{tuple(parameter.shape)}."
                )
            matrices = [Matrix(name, *parameter.shape)]
        return PartitionStep([whole], [gradient.view(-1)], draw=draw, matrices=matrices)

    def _step_of(self, group: dict[str, Any], parameter: torch.Tensor, partition: PartitionStep) -> Callable[[], None]:
        """The step of a parameter, checked; nothing is changed until it is called."""
        flat, pieces = parameter.detach().view(-1), partition.pieces
        is_factored = group["lisa_state_bits"] == FACTORED
        assert not (is_factored and pieces) or partition.matrices, "whoever prepares a partition knows its matrices"
        if not pieces and not partition.matrices:  # padding, or the placeholder of an inactive block
            return lambda: None
        of = f"LisaAdamW, {', '.join(piece.name for piece in pieces)}"
        if flat.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{of}: expected it in torch.float32 or torch.bfloat16, got {flat.dtype}.")
        state = self.state.get(parameter) or self._new_state(group, parameter, partition)
        for name in MOMENTS if not is_factored else ():
            if state[name].numel() != flat.numel():
                raise ValueError(
                    f"{of}: expected {flat.numel()} elements of {name}, as the partition has, got "
                    f"{state[name].numel()}: the state is of another partition."
                )
        tensors = _factored_tensors(flat, partition, state) if is_factored else _adamw_tensors(flat, partition, state)
        return functools.partial(self._run, group, parameter, partition, state, tensors)

    def _run(
        self,
        group: dict[str, Any],
        parameter: torch.Tensor,
        partition: PartitionStep,
        state: dict[str, Any],
        tensors: Sequence[Any],
    ) -> None:
        """Step a partition; `tensors` are those that the kernels take, of each of its pieces."""
        state["step"] += 1
        if partition.pieces:
            self.state[parameter] = state
        beta1, beta2 = group["betas"]
        kind: Any
        step: Any
        numbers = {"lr": float(group["lr"]), "eps": group["eps"], "weight_decay": group["weight_decay"]}
        numbers |= {"seed": self.seed, "draw": partition.draw}
        if group["lisa_state_bits"] == FACTORED:
            factored.update_moments(
                partition.matrices, partition.pieces, tensors, state, beta2, partition.add_up, parameter.device
            )
            kind, step = FactoredNumbers, factored_step
        else:
            kind, step = StepNumbers, adamw_step
            numbers |= {"beta1": beta1, "beta2": beta2, "step": state["step"]}
        for piece, of_piece in zip(partition.pieces, tensors, strict=True):
            number = int.from_bytes(hashlib.sha256(piece.name.encode()).digest()[:4], "big") >> 1  # 31 bits, by name
            for part, element in in_chunks_of_rows(of_piece, piece.start):
                step(part, kind(element=element, parameter=number, **numbers))


def _adamw_tensors(flat: torch.Tensor, partition: PartitionStep, state: dict[str, Any]) -> list[StepTensors]:
    """What the kernel takes of each piece; `flat` is the partition."""
    found = []
    for piece, blocks in with_blocks(partition.pieces):
        cuts = dict.fromkeys(MOMENTS, piece.elements) | {f"{name}_scales": blocks for name in MOMENTS}
        moments = {name: state[name][cut] for name, cut in cuts.items() if name in state}
        found.append(StepTensors(**_weights_and_gradient(flat, partition, piece), **moments))
        check_tensors(found[-1], piece.start, f"LisaAdamW, {piece.name}")
    return found


def _factored_tensors(flat: torch.Tensor, partition: PartitionStep, state: dict[str, Any]) -> list[FactoredTensors]:
    """The same where moments are factored."""
    found = []
    for place in factored.places(state[factored.WIDTHS], partition.pieces):
        # Moments in the places of the roots, of the same sizes, which come with the new moments.
        fields = {"row_roots": "row_sq", "column_roots": "column_sq"}
        roots = {name: state[field][place.cuts[field]] for name, field in fields.items()}
        found.append(FactoredTensors(**_weights_and_gradient(flat, partition, place.piece), **roots))
        check_factored(found[-1], place.piece.start, f"LisaAdamW, {place.piece.name}")
    return found


def _weights_and_gradient(flat: torch.Tensor, partition: PartitionStep, piece: Piece) -> dict[str, Any]:
    """What the kernels take of a piece beside its moments."""
    cut = piece.elements
    weight = flat if partition.weight is None else partition.weight
    return {
        "weight": weight[cut] if partition.weight is not None or flat.dtype == torch.bfloat16 else None,
        "master": None if flat.dtype == torch.bfloat16 else flat[cut],
        "gradient": _cut(partition.gradients, piece.offset, piece.length),
        "gradient_scale": partition.gradient_scale,
    }


def decode_moment(name: str, codes: torch.Tensor, scales: torch.Tensor, start: int) -> torch.Tensor:
    """The fp32 moment `name` that codes and scales of elements from `start` of a parameter stand for."""
    return dequantize(codes, scales, MOMENTS[name], start)


def with_blocks(pieces: Sequence[Piece]) -> list[tuple[Piece, slice]]:
    """The pieces of a partition, and where the scales of each are: one piece's follow another's."""
    found, begins = [], 0
    for piece in pieces:
        ends = begins + num_blocks(piece.start, piece.length)
        found.append((piece, slice(begins, ends)))
        begins = ends
    return found


def in_chunks(pieces: Sequence[Piece]) -> Iterator[tuple[int, slice, slice]]:
    """The first element within its parameter, the place in the partition, and the blocks, of each chunk of a piece."""
    for piece, blocks in with_blocks(pieces):
        for cut in chunks(piece.start, piece.length):
            element = piece.start + cut.start
            first = blocks.start + element // BLOCK - piece.start // BLOCK
            here = slice(piece.offset + cut.start, piece.offset + cut.stop)
            yield element, here, slice(first, first + num_blocks(element, cut.stop - cut.start))


def _cut(gradients: Sequence[torch.Tensor | RowGradient], offset: int, length: int) -> Any:
    """The gradient of a piece, which is within one of the gradients that follow one another."""
    for gradient in gradients:
        if offset < gradient.numel() or length == 0:
            assert offset + length <= gradient.numel(), "gradients are cut where parameters are"
            if isinstance(gradient, RowGradient):
                assert (offset, length) == (0, gradient.numel()), "rows are of a piece"
                return gradient
            return gradient.reshape(-1)[offset : offset + length]
        offset -= gradient.numel()
    raise AssertionError("there are fewer gradients than elements")
