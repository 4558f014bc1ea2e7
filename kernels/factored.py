"""AdamW without a first moment whose second moment is factored, over a flat piece of one matrix.

The second moment is one number a row and one a column: v[i, j] = r[i] c[j] / mean(r). r and c are exponential averages
of the mean squared gradient of a row, and of a column over the rows that have a gradient. Bytes an element, where
weights are bf16: 8 with an fp32 master and 4 without, in place of 16 and 12.

A piece is the elements [element, element + n) of the flattened matrix, and may begin and end within a row. Its sums of
squares are taken first (`squared_sums`), for whoever knows the other pieces to add up; then the weights are stepped.

Source: "Ember" (arXiv 2607.01455); of the factored moment, Shazeer and Stern, "Adafactor" (ICML 2018), section 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .adamw import CHUNK, Target, check_expected, check_target, round_stochastically
from .philox import random_bits


@dataclass
class FactoredTensors(Target):
    """The tensors of one piece, each 1-D, contiguous, on one device.

    `weight`, `master` and `gradient_scale` are those of `StepTensors`. `row_roots`, of each row that the piece touches,
    and `column_roots`, of each column: fp32; their products are the roots of the second moment.
    """

    weight: torch.Tensor | None
    master: torch.Tensor | None
    gradient: torch.Tensor
    row_roots: torch.Tensor
    column_roots: torch.Tensor
    gradient_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class FactoredNumbers:
    """The numbers of one step; `seed`, `parameter` and `draw` choose the random bits."""

    lr: float
    eps: float
    weight_decay: float
    element: int = 0
    seed: int = 0
    parameter: int = 0
    draw: int = 0


def num_rows(element: int, numel: int, columns: int) -> int:
    """Rows of a matrix that the elements [element, element + numel) touch."""
    return -(-(element + numel) // columns) - element // columns if numel else 0


def check_factored(tensors: FactoredTensors, element: int, of: str = "AdamW") -> None:
    """Raise ValueError, saying of what, what was expected and what came, for tensors that no kernel may touch."""
    numel, columns = check_target(tensors, of), tensors.column_roots.numel()
    rows = num_rows(element, numel, columns)
    fp32 = (torch.float32,)
    check_expected(tensors, {"row_roots": (rows, fp32), "column_roots": (columns, fp32)}, of)


def squared_sums_torch(
    gradient: torch.Tensor, gradient_scale: torch.Tensor | None, element: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the squared gradient over each row that the piece touches and over each column, fp32."""
    row_sums = gradient.new_zeros(num_rows(element, gradient.numel(), columns), dtype=torch.float32)
    column_sums = gradient.new_zeros(columns, dtype=torch.float32)
    for cut, row, column, width in row_cuts(element, gradient.numel(), columns):
        squares = _scaled(gradient[cut], gradient_scale).square_().view(-1, width)
        torch.sum(squares, 1, out=row_sums[row : row + len(squares)])
        column_sums[column : column + width] += squares.sum(0)
    return row_sums, column_sums


def factored_torch(tensors: FactoredTensors, numbers: FactoredNumbers) -> None:
    """One step in place, on chunks of whole rows that are widened to fp32 before and narrowed behind it."""
    target = tensors.target
    for cut, row, column, width in row_cuts(numbers.element, target.numel(), tensors.column_roots.numel()):
        update = _scaled(tensors.gradient[cut], tensors.gradient_scale).view(-1, width)
        rows = tensors.row_roots[row : row + len(update)]
        update /= torch.outer(rows, tensors.column_roots[column : column + width]).add_(numbers.eps)
        values = target[cut].float()  # itself, where it is fp32
        values.mul_(1 - numbers.lr * numbers.weight_decay).sub_(update.view(-1), alpha=numbers.lr)
        if tensors.stochastic:
            target[cut] = round_stochastically(values, _random_bits(numbers, cut, target.device))
        elif tensors.weight is not None and tensors.master is not None:
            tensors.weight[cut] = values


def row_cuts(element: int, numel: int, columns: int) -> Iterator[tuple[slice, int, int, int]]:
    """Cuts of a piece: whole rows, as many as CHUNK holds, and the parts of rows where it begins and ends.

    Of each: where it is in the piece, its first row counted from the piece's, its first column, elements of a row.
    """
    begins = 0
    while begins < numel:
        row, column = divmod(element + begins, columns)
        width = min(columns - column, numel - begins)
        whole = min((numel - begins) // columns, max(1, CHUNK // columns)) if width == columns else 1
        yield slice(begins, begins + whole * width), row - element // columns, column, width
        begins += whole * width


def _scaled(gradient: torch.Tensor, gradient_scale: torch.Tensor | None) -> torch.Tensor:
    """A copy in fp32, times the scale."""
    copied = gradient.to(torch.float32, copy=True)
    return copied if gradient_scale is None else copied.mul_(gradient_scale)


def _random_bits(numbers: FactoredNumbers, cut: slice, device: torch.device) -> torch.Tensor:
    return random_bits(
        numbers.element + cut.start,
        cut.stop - cut.start,
        seed=numbers.seed,
        parameter=numbers.parameter,
        draw=numbers.draw,
        device=device,
    )


def factored_chunk_bytes(numel: int, columns: int, stochastic: bool) -> int:
    """Bytes that the torch path allocates for a piece, at its peak; the other kernel makes none of a piece's size."""
    return (22 if stochastic else 8) * min(numel, max(CHUNK, columns))
