"""AdamW over a flat piece of one parameter, in one pass, and what it takes for each form.

A piece is the elements [element, element + n) of a flattened parameter. Bytes an element, where weights are bf16:

    weights   gradient  master  moments             sum
    bf16      bf16      fp32    fp32                16
    bf16      bf16      fp32    8 bits, blockwise   10.03
    bf16      bf16      none    fp32                12
    bf16      bf16      none    8 bits, blockwise    6.03

Without a master the sum of weight and update is rounded stochastically to bf16: up or down with probabilities that make
its mean the sum itself, so that updates far below bf16's resolution still move the weights as they should. The random
bits are those of `philox.random_bits`.

Source of AdamW: Loshchilov and Hutter, "Decoupled weight decay regularization" (ICLR 2019), Algorithm 2. Source of
stochastic rounding: Zamirai et al., "Revisiting bfloat16 training" (2020), section 3.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from .dynamic_code import BLOCK, dequantize, num_blocks, quantize
from .philox import random_bits

# Elements that the torch path works on at once: its temporaries are a few MB, and stay in the cache.
CHUNK = 1 << 18


class Target:
    """What a step writes to: a weight, its master, or both."""

    weight: torch.Tensor | None
    master: torch.Tensor | None

    @property
    def target(self) -> torch.Tensor:
        """What the update is added to: the master where there is one, else the weight."""
        target = self.weight if self.master is None else self.master
        assert target is not None  # checked before
        return target

    @property
    def stochastic(self) -> bool:
        """Whether the result is rounded stochastically."""
        return self.master is None and self.target.dtype == torch.bfloat16


@dataclass
class StepTensors(Target):
    """The tensors of one piece, each 1-D, contiguous, on one device; the scales have one fp32 a block.

    `weight`: what the model computes with, None where someone else writes it; `master`: fp32, or None. Moments are
    fp32, or uint8 codes with scales. `gradient_scale`: one fp32 number that the gradient is to be multiplied with.
    """

    weight: torch.Tensor | None
    master: torch.Tensor | None
    gradient: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    exp_avg_scales: torch.Tensor | None = None
    exp_avg_sq_scales: torch.Tensor | None = None
    gradient_scale: torch.Tensor | None = None

    @property
    def quantized(self) -> bool:
        """Whether moments are codes."""
        return self.exp_avg.dtype == torch.uint8


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of one step. `step` counts from 1; `seed`, `parameter` and `draw` choose the random bits."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    element: int = 0
    seed: int = 0
    parameter: int = 0
    draw: int = 0

    def random_bits(self, begins: int, numel: int, device: torch.device) -> torch.Tensor:
        """16 bits for each of `numel` elements, from the piece's element `begins` on."""
        return random_bits(
            self.element + begins, numel, seed=self.seed, parameter=self.parameter, draw=self.draw, device=device
        )


def check_tensors(tensors: StepTensors, element: int, of: str = "AdamW") -> None:
    """Raise ValueError, saying of what, what was expected and what came, for tensors that no kernel may touch."""
    numel = check_target(tensors, of)
    blocks = num_blocks(element, numel)
    moments = (numel, (torch.uint8 if tensors.quantized else torch.float32,))
    scales = (blocks, (torch.float32,))
    expected = {
        "exp_avg": moments,
        "exp_avg_sq": moments,
        "exp_avg_scales": scales,
        "exp_avg_sq_scales": scales,
    }
    check_expected(tensors, expected, of)
    for name in ("exp_avg_scales", "exp_avg_sq_scales"):
        if tensors.quantized and getattr(tensors, name) is None:
            raise ValueError(f"{of}: expected {blocks} {name} with 8-bit moments, got none.")


def check_target(tensors: Target, of: str) -> int:
    """The elements of a piece; ValueError for what cannot be stepped, as `check_tensors` raises it."""
    if tensors.weight is None and tensors.master is None:
        raise ValueError(f"{of}: expected a weight or a master, got neither.")
    numel = tensors.target.numel()
    floats = (torch.float32, torch.bfloat16, torch.float16)
    expected: dict[str, tuple[int, tuple[torch.dtype, ...]]] = {
        "weight": (numel, floats),
        "master": (numel, (torch.float32,)),
        "gradient": (numel, floats),
        "gradient_scale": (1, (torch.float32,)),
    }
    check_expected(tensors, expected, of)
    if tensors.master is None and tensors.target.dtype == torch.float16:
        raise ValueError(
            f"{of}: expected weights without a master in torch.bfloat16 or torch.float32, got torch.float16."
        )
    return numel


def check_expected(tensors: Target, expected: Mapping[str, tuple[int, tuple[torch.dtype, ...]]], of: str) -> None:
    """Raise ValueError for a tensor that has not the expected elements and one of the expected dtypes."""
    device = tensors.target.device
    for name, (size, dtypes) in expected.items():
        tensor = getattr(tensors, name)
        if tensor is None:
            continue
        if tensor.numel() != size:
            raise ValueError(f"{of}: expected {size} elements of {name}, got {tensor.numel()}.")
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{of}: expected {name} in {names}, got {tensor.dtype}.")
        if tensor.device != device:
            raise ValueError(f"{of}: expected {name} on {device}, where the weights are, got it on {tensor.device}.")
        if not tensor.is_contiguous():
            raise ValueError(f"{of}: expected {name} to be contiguous, got strides {tensor.stride()}.")


def adamw_reference(tensors: StepTensors, numbers: StepNumbers) -> StepTensors:
    """What one step makes of a piece, as new tensors, as the algorithm has it; the kernels are compared with this."""
    signed = {"exp_avg": True, "exp_avg_sq": False}
    gradient = tensors.gradient.float()
    if tensors.gradient_scale is not None:
        gradient = gradient * tensors.gradient_scale
    moments = {
        name: dequantize(getattr(tensors, name), getattr(tensors, f"{name}_scales"), signed[name], numbers.element)
        if tensors.quantized
        else getattr(tensors, name)
        for name in signed
    }
    exp_avg = numbers.beta1 * moments["exp_avg"] + (1 - numbers.beta1) * gradient
    exp_avg_sq = numbers.beta2 * moments["exp_avg_sq"] + (1 - numbers.beta2) * gradient**2
    unbiased = exp_avg / (1 - numbers.beta1**numbers.step)
    unbiased_sq = exp_avg_sq / (1 - numbers.beta2**numbers.step)
    target = tensors.target.float() * (1 - numbers.lr * numbers.weight_decay)
    target = target - numbers.lr * unbiased / (unbiased_sq.sqrt() + numbers.eps)
    weight: torch.Tensor | None = None
    if tensors.stochastic:
        weight = round_stochastically(target, numbers.random_bits(0, target.numel(), target.device))
    elif tensors.weight is not None:
        weight = target.to(tensors.weight.dtype)
    scales: list[torch.Tensor | None] = [None, None]
    if tensors.quantized:
        exp_avg, scales[0] = quantize(exp_avg, True, numbers.element)
        exp_avg_sq, scales[1] = quantize(exp_avg_sq, False, numbers.element)
    master = None if tensors.master is None else target
    return StepTensors(weight, master, tensors.gradient, exp_avg, exp_avg_sq, *scales)


def round_stochastically(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """fp32 values in bf16: away from zero if the 16 bits that bf16 lacks and the random ones add up to 2**16."""
    rounded = values.view(torch.int32) + bits
    rounded = rounded.bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(values == values, rounded, values).to(torch.bfloat16)  # NaN could overflow to zero


def adamw_torch(tensors: StepTensors, numbers: StepNumbers) -> None:
    """One step in place: torch's own fused AdamW, on chunks that are widened to fp32 before and narrowed behind it."""
    device = tensors.target.device
    steps = torch.full((), numbers.step - 1, dtype=torch.float32, device=device)
    for cut in chunks(numbers.element, tensors.target.numel()):
        _step_chunk(tensors, numbers, cut, steps.clone())


def chunks(element: int, numel: int) -> Iterator[slice]:
    """Cuts of a piece of `numel` elements from `element` of a parameter: CHUNK at most, each at a block's boundary."""
    begins = 0
    while begins < numel:
        ends = min(numel, begins + CHUNK - (element + begins) % CHUNK)
        yield slice(begins, ends)
        begins = ends


def _step_chunk(tensors: StepTensors, numbers: StepNumbers, cut: slice, steps: torch.Tensor) -> None:
    element = numbers.element + cut.start
    target, gradient = tensors.target[cut], tensors.gradient[cut]
    values = target.float()  # itself, where it is fp32
    if tensors.gradient_scale is not None:
        gradient = gradient.to(torch.float32, copy=True).mul_(tensors.gradient_scale)
    moments = [tensors.exp_avg[cut], tensors.exp_avg_sq[cut]]
    if tensors.quantized:
        first = element // BLOCK - numbers.element // BLOCK
        blocks = slice(first, first + num_blocks(element, target.numel()))
        assert tensors.exp_avg_scales is not None  # codes have scales
        assert tensors.exp_avg_sq_scales is not None
        scales = tensors.exp_avg_scales[blocks], tensors.exp_avg_sq_scales[blocks]
        codes = moments
        moments = [dequantize(*coded, element) for coded in zip(codes, scales, (True, False), strict=True)]
    adamw(
        [values],
        [gradient.float()],
        [moments[0]],
        [moments[1]],
        [],
        [steps],
        fused=True,
        amsgrad=False,
        beta1=numbers.beta1,
        beta2=numbers.beta2,
        lr=numbers.lr,
        weight_decay=numbers.weight_decay,
        eps=numbers.eps,
        maximize=False,
    )
    if tensors.quantized:
        for code, scale, moment, signed in zip(codes, scales, moments, (True, False), strict=True):
            new_codes, new_scales = quantize(moment, signed, element)
            code.copy_(new_codes)
            scale.copy_(new_scales)
    if tensors.stochastic:
        values = round_stochastically(values, numbers.random_bits(cut.start, target.numel(), target.device))
    if tensors.weight is not None and values.data_ptr() != tensors.weight[cut].data_ptr():
        tensors.weight[cut].copy_(values)


def chunk_bytes(numel: int, quantized: bool, stochastic: bool) -> int:
    """Bytes that the torch path allocates for a piece, at its peak; the other kernels make none."""
    an_element = {(False, False): 4, (False, True): 22, (True, False): 30, (True, True): 34}
    return an_element[quantized, stochastic] * min(numel, CHUNK)


def bias_corrections(numbers: StepNumbers) -> tuple[float, float]:
    """1 - beta1**step, and the square root of 1 - beta2**step."""
    return 1 - numbers.beta1**numbers.step, math.sqrt(1 - numbers.beta2**numbers.step)
