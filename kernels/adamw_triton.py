"""AdamW over a flat piece of one parameter: one Triton kernel for all forms, which reads and writes everything once.

A program works on one tile of `philox.py`, row by row: a row is a block of 8-bit moments, and the random bits of all
eight rows come from the words of one counter a column. bf16 is widened as soon as it is loaded.
"""

import contextlib

import torch
import triton
import triton.language as tl

from .adamw import StepNumbers, StepTensors, bias_corrections
from .dynamic_code import tables
from .philox import ROW, ROWS, TILE


@triton.jit
def _dequantize(codes, offsets, mask, scale, code):
    index = tl.load(codes + offsets, mask=mask, other=0).to(tl.int32)
    return tl.load(code + index) * scale


@triton.jit
def _store_quantized(values, codes, offsets, mask, scales, block, block_is_here, thresholds, guesses):
    scale = tl.max(tl.where(mask, tl.abs(values), 0.0), axis=0)
    ratios = values / tl.where(scale == 0, 1.0, scale)
    upper = (ratios.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    index = tl.load(guesses + upper, mask=mask, other=0).to(tl.int32)
    index += (ratios > tl.load(thresholds + index)).to(tl.int32)
    tl.store(codes + offsets, index.to(tl.uint8), mask=mask)
    tl.store(scales + block, scale, mask=block_is_here)


@triton.jit
def random_words(tile, column, seed, parameter, draw, ROW: tl.constexpr):  # noqa: N803 - constants of a kernel
    """Four words of a tile's columns, which have the random bits of its eight rows."""
    counter = tile * ROW + column
    zero = tl.zeros_like(column)
    return tl.philox(
        seed, counter.to(tl.int32), (counter >> 32).to(tl.int32), zero + draw.to(tl.int32), zero + parameter
    )


@triton.jit
def store_weight(
    weight,
    value,
    offsets,
    mask,
    word0,
    word1,
    word2,
    word3,
    row: tl.constexpr,  # of the tile
    STOCHASTIC: tl.constexpr,  # noqa: N803
):
    """Write fp32 values to weights of any dtype; to bf16 they are rounded here, as Triton's interpreter would cut."""
    if weight.dtype.element_ty == tl.bfloat16:
        number = value.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            if row // 2 == 0:
                word = word0.to(tl.uint32)
            elif row // 2 == 1:
                word = word1.to(tl.uint32)
            elif row // 2 == 2:
                word = word2.to(tl.uint32)
            else:
                word = word3.to(tl.uint32)
            bits = ((word >> 16) if row % 2 else (word & 0xFFFF)).to(tl.int32)
        else:
            bits = 0x7FFF + ((number >> 16) & 1)  # to the nearest, ties to even
        rounded = ((number + bits) & -0x10000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    tl.store(weight + offsets, value.to(weight.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "parameter", "draw"])
def _adamw(
    weight,
    master,
    gradient,
    exp_avg,
    exp_avg_sq,
    exp_avg_scales,
    exp_avg_sq_scales,
    gradient_scale,
    code,
    thresholds,
    guesses,
    code_sq,
    thresholds_sq,
    guesses_sq,
    numel,
    element,
    step_size,
    decay,
    beta1,
    beta2,
    rest1,  # 1 - beta1 and 1 - beta2, which fp32 would round to another number
    rest2,
    correction2,
    eps,
    seed,
    parameter,
    draw,
    HAS_MASTER: tl.constexpr,  # noqa: N803 - constants of a kernel
    HAS_WEIGHT: tl.constexpr,  # noqa: N803
    HAS_SCALE: tl.constexpr,  # noqa: N803
    STOCHASTIC: tl.constexpr,  # noqa: N803
    QUANTIZED: tl.constexpr,  # noqa: N803
    ROW: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    tile = element // (ROW * ROWS) + tl.program_id(0).to(tl.int64)
    column = tl.arange(0, ROW)
    scale = tl.load(gradient_scale) if HAS_SCALE else 1.0
    word0, word1, word2, word3 = column, column, column, column  # none that is read, where rounding is to the nearest
    if STOCHASTIC:  # by name: Triton 3.2 takes no index of a tuple
        word0, word1, word2, word3 = random_words(tile, column, seed, parameter, draw, ROW)
    for row in tl.static_range(ROWS):
        offsets = tile * (ROW * ROWS) + row * ROW + column - element
        mask = (offsets >= 0) & (offsets < numel)
        grad = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        if HAS_MASTER:
            value = tl.load(master + offsets, mask=mask, other=0.0)
        else:
            value = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
        block = tile * ROWS + row - element // ROW
        here = tl.max(mask.to(tl.int32), axis=0) > 0
        if QUANTIZED:
            scale1 = tl.load(exp_avg_scales + block, mask=here, other=0.0)
            scale2 = tl.load(exp_avg_sq_scales + block, mask=here, other=0.0)
            m = _dequantize(exp_avg, offsets, mask, scale1, code)
            v = _dequantize(exp_avg_sq, offsets, mask, scale2, code_sq)
            v *= v
        else:
            m = tl.load(exp_avg + offsets, mask=mask, other=0.0)
            v = tl.load(exp_avg_sq + offsets, mask=mask, other=0.0)
        m = beta1 * m + rest1 * grad
        v = beta2 * v + rest2 * grad * grad
        value = value * decay - step_size * m / (tl.sqrt(v) / correction2 + eps)
        if QUANTIZED:
            _store_quantized(m, exp_avg, offsets, mask, exp_avg_scales, block, here, thresholds, guesses)
            _store_quantized(
                tl.sqrt(v), exp_avg_sq, offsets, mask, exp_avg_sq_scales, block, here, thresholds_sq, guesses_sq
            )
        else:
            tl.store(exp_avg + offsets, m, mask=mask)
            tl.store(exp_avg_sq + offsets, v, mask=mask)
        if HAS_MASTER:
            tl.store(master + offsets, value, mask=mask)
        if HAS_WEIGHT:
            store_weight(weight, value, offsets, mask, word0, word1, word2, word3, row, STOCHASTIC)


def adamw_triton(tensors: StepTensors, numbers: StepNumbers) -> None:
    """One step in place; one launch, of a program for each 2048 elements."""
    numel = tensors.target.numel()
    if numel == 0:
        return
    device = tensors.target.device
    of_codes: list[torch.Tensor | None] = [None] * 6
    if tensors.quantized:
        of_codes = [*tables(True, device), *tables(False, device)]
    tiles = -(-(numbers.element + numel) // TILE) - numbers.element // TILE
    correction1, correction2 = bias_corrections(numbers)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _adamw[(tiles,)](
            tensors.weight,
            tensors.master,
            tensors.gradient,
            tensors.exp_avg,
            tensors.exp_avg_sq,
            tensors.exp_avg_scales,
            tensors.exp_avg_sq_scales,
            tensors.gradient_scale,
            *of_codes,
            numel,
            numbers.element,
            numbers.lr / correction1,
            1 - numbers.lr * numbers.weight_decay,
            numbers.beta1,
            numbers.beta2,
            1 - numbers.beta1,
            1 - numbers.beta2,
            correction2,
            numbers.eps,
            numbers.seed,
            numbers.parameter,
            numbers.draw,
            HAS_MASTER=tensors.master is not None,
            HAS_WEIGHT=tensors.weight is not None,
            HAS_SCALE=tensors.gradient_scale is not None,
            STOCHASTIC=tensors.stochastic,
            QUANTIZED=tensors.quantized,
            ROW=ROW,
            ROWS=ROWS,
            num_warps=2,
        )
