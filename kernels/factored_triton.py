"""AdamW with a factored second moment over a flat piece of one matrix, by two Triton kernels.

The sums of squares are added in an order of their own, without atomics: a step gives the same bits each time. The
update works on the tiles of `philox.py`, as `adamw_triton.py` does.
"""

import contextlib

import torch
import triton
import triton.language as tl

from .adamw_triton import random_words, store_weight
from .factored import FactoredNumbers, FactoredTensors, num_rows
from .philox import ROW, ROWS, TILE

_SUM_ROWS, _SUM_COLUMNS = 16, 256  # of a tile of the sums
_MOST_STRIPES = 128  # of rows, each of which has sums of its columns


@triton.jit
def _squared_sums(
    gradient,
    gradient_scale,
    row_sums,
    column_sums,
    numel,
    rows,
    columns,
    before,  # elements of the first row that are before the piece
    repeats,
    HAS_SCALE: tl.constexpr,  # noqa: N803 - constants of a kernel
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    block, stripe = tl.program_id(0), tl.program_id(1)
    scale = tl.load(gradient_scale) if HAS_SCALE else 1.0
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], dtype=tl.float32)
    for repeat in range(repeats):
        row = (stripe * repeats + repeat) * ROWS + tl.arange(0, ROWS)
        offsets = row.to(tl.int64)[:, None] * columns + column[None, :] - before
        mask = (row < rows)[:, None] & (column < columns)[None, :] & (offsets >= 0) & (offsets < numel)
        grad = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        squares = grad * grad
        tl.store(row_sums + block.to(tl.int64) * rows + row, tl.sum(squares, axis=1), mask=row < rows)
        sums += tl.sum(squares, axis=0)
    tl.store(column_sums + stripe * columns + column, sums, mask=column < columns)


def squared_sums_triton(
    gradient: torch.Tensor, gradient_scale: torch.Tensor | None, element: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the squared gradient over each row that the piece touches and over each column, fp32."""
    rows, device = num_rows(element, gradient.numel(), columns), gradient.device
    blocks = triton.cdiv(columns, _SUM_COLUMNS)
    repeats = max(1, triton.cdiv(rows, _SUM_ROWS * _MOST_STRIPES))
    stripes = triton.cdiv(rows, _SUM_ROWS * repeats)
    row_sums = torch.empty(blocks, rows, dtype=torch.float32, device=device)
    column_sums = torch.empty(stripes, columns, dtype=torch.float32, device=device)
    if rows:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _squared_sums[(blocks, stripes)](
                gradient,
                gradient_scale,
                row_sums,
                column_sums,
                gradient.numel(),
                rows,
                columns,
                element % columns,
                repeats,
                HAS_SCALE=gradient_scale is not None,
                ROWS=_SUM_ROWS,
                COLUMNS=_SUM_COLUMNS,
            )
    return row_sums.sum(0), column_sums.sum(0)


@triton.jit(do_not_specialize=["seed", "parameter", "draw"])
def _factored(
    weight,
    master,
    gradient,
    gradient_scale,
    row_roots,
    column_roots,
    numel,
    element,
    columns,
    lr,
    decay,
    eps,
    seed,
    parameter,
    draw,
    HAS_MASTER: tl.constexpr,  # noqa: N803 - constants of a kernel
    HAS_WEIGHT: tl.constexpr,  # noqa: N803
    HAS_SCALE: tl.constexpr,  # noqa: N803
    STOCHASTIC: tl.constexpr,  # noqa: N803
    NARROW: tl.constexpr,  # noqa: N803 - rows of the matrix are shorter than ROW
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
        first = tile * (ROW * ROWS) + row * ROW
        offsets = first - element + column
        mask = (offsets >= 0) & (offsets < numel)
        grad = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        if HAS_MASTER:
            value = tl.load(master + offsets, mask=mask, other=0.0)
        else:
            value = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
        matrix_row = first // columns  # one division in 64 bits for ROW elements, and none for each
        place = (first - matrix_row * columns).to(tl.int32) + column  # from the beginning of that row on
        further = place // columns if NARROW else (place >= columns).to(tl.int32)  # rows
        of_row = tl.load(row_roots + (matrix_row - element // columns) + further, mask=mask, other=1.0)
        of_column = tl.load(column_roots + place - further * columns, mask=mask, other=1.0)
        value = value * decay - lr * (grad / (of_row * of_column + eps))
        if HAS_MASTER:
            tl.store(master + offsets, value, mask=mask)
        if HAS_WEIGHT:
            store_weight(weight, value, offsets, mask, word0, word1, word2, word3, row, STOCHASTIC)


def factored_triton(tensors: FactoredTensors, numbers: FactoredNumbers) -> None:
    """One step in place; one launch, of a program for each 2048 elements."""
    numel, device = tensors.target.numel(), tensors.target.device
    if numel == 0:
        return
    tiles = triton.cdiv(numbers.element + numel, TILE) - numbers.element // TILE
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _factored[(tiles,)](
            tensors.weight,
            tensors.master,
            tensors.gradient,
            tensors.gradient_scale,
            tensors.row_roots,
            tensors.column_roots,
            numel,
            numbers.element,
            tensors.column_roots.numel(),
            numbers.lr,
            1 - numbers.lr * numbers.weight_decay,
            numbers.eps,
            numbers.seed,
            numbers.parameter,
            numbers.draw,
            HAS_MASTER=tensors.master is not None,
            HAS_WEIGHT=tensors.weight is not None,
            HAS_SCALE=tensors.gradient_scale is not None,
            STOCHASTIC=tensors.stochastic,
            NARROW=tensors.column_roots.numel() < ROW,
            ROW=ROW,
            ROWS=ROWS,
            num_warps=2,
        )
