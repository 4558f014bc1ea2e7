"""The state of matrices whose second moment is factored, and their step: one number a row, one a column, one in all.

    r[i] <- beta2 r[i] + (1 - beta2) mean over j of g[i, j]^2
    c[j] <- beta2 c[j] + (1 - beta2) mean over i of g[i, j]^2, of the rows that have a gradient
    v[i, j] = r[i] c[j] / mean(r) / (1 - beta2^t);  w <- w - lr (g / (sqrt(v) + eps) + decay w)

A row of an embedding is a token: a number for each keeps what AdamW knows of how often it occurs. mean(r) follows the
mean squared gradient of the whole matrix by the same average, so that nobody adds up r.

ZeRO cuts matrices anywhere. Each rank has r of the rows that its piece touches, and all of c; sums over columns, and
over rows that are cut between ranks, are added up by one all-reduce a step, of D numbers a matrix and a few more.

Source: "Ember" (arXiv 2607.01455); why the moment of a token must stay, "SlimAdam" (arXiv 2503.01843).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lisa_dist.kernels.factored import FactoredTensors, num_rows
from lisa_dist.optim.ops import squared_sums
from lisa_dist.optim.row_gradient import RowGradient
from lisa_dist.optim.states import Piece

# Of a partition: r of the rows of its pieces, c of the matrices that they are of, and mean(r) of each.
FIELDS = ("row_sq", "column_sq", "mean_sq")
WIDTHS = "widths"  # and the columns of each of those matrices, without which the fields cannot be cut


@dataclass(frozen=True)
class Matrix:
    """A matrix with a factored moment, the same on all ranks; several ranks have a part of each of its `cut_rows`."""

    name: str
    rows: int
    columns: int
    cut_rows: tuple[int, ...] = ()  # ascending


@dataclass(frozen=True)
class Place:
    """A piece of a matrix, and by field where its moments are in the fields of its partition."""

    piece: Piece
    width: int
    cuts: dict[str, slice]

    def cut_ends(self, cut_rows: Sequence[int]) -> list[tuple[int, slice]]:
        """The piece's first and last row where they are cut: which of `cut_rows`, and where in the piece's rows."""
        first = self.piece.start // self.width
        last = first + num_rows(self.piece.start, self.piece.length, self.width) - 1
        return [(cut_rows.index(row), slice(row - first, row - first + 1)) for row in {first, last} & set(cut_rows)]


def places(widths: Sequence[int], pieces: Sequence[Piece]) -> list[Place]:
    """Where each piece of a partition, of a matrix of so many columns, has its moments: one's follow another's."""
    found, rows, columns = [], 0, 0
    for number, (width, piece) in enumerate(zip(widths, pieces, strict=True)):
        last_row, last_column = rows + num_rows(piece.start, piece.length, width), columns + width
        cuts = slice(rows, last_row), slice(columns, last_column), slice(number, number + 1)
        found.append(Place(piece, width, dict(zip(FIELDS, cuts, strict=True))))
        rows, columns = last_row, last_column
    return found


def new_state(matrices: Sequence[Matrix], pieces: Sequence[Piece], device: torch.device) -> dict[str, Any]:
    """The moments of a partition before its first step."""
    columns_of = {matrix.name: matrix.columns for matrix in matrices}
    widths = tuple(columns_of[piece.name] for piece in pieces)
    rows = sum(num_rows(piece.start, piece.length, width) for piece, width in zip(pieces, widths, strict=True))
    sizes = zip(FIELDS, (rows, sum(widths), len(pieces)), strict=True)
    moments = {name: torch.zeros(size, dtype=torch.float32, device=device) for name, size in sizes}
    return {"step": 0, WIDTHS: widths, **moments}


def update_moments(
    matrices: Sequence[Matrix],
    pieces: Sequence[Piece],
    tensors_of_pieces: Sequence[FactoredTensors],
    state: dict[str, Any],
    beta2: float,
    add_up: Callable[[torch.Tensor], None] | None,
    device: torch.device,
) -> None:
    """Take a step's gradients into the moments, and write the roots that the kernels take into the pieces' tensors.

    `add_up` adds a tensor up over all ranks, in place. Every rank of them calls this for the same matrices in the same
    order, one without a piece too. `state["step"]` counts this step already.
    """
    placed = zip(places(state[WIDTHS], pieces), tensors_of_pieces, strict=True)
    by_name = {place.piece.name: (place, tensors) for place, tensors in placed}
    row_sums, shared = {}, []
    for matrix in matrices:
        cut = torch.zeros(len(matrix.cut_rows), dtype=torch.float32, device=device)
        column_sums, count = torch.zeros(matrix.columns, dtype=torch.float32, device=device), cut.new_zeros(1)
        if matrix.name in by_name:
            place, tensors = by_name[matrix.name]
            gradient: Any = tensors.gradient
            if isinstance(gradient, RowGradient):
                sums, column_sums = gradient.squared_sums(tensors.gradient_scale)
            else:
                sums, column_sums = squared_sums(gradient, tensors.gradient_scale, place.piece.start, matrix.columns)
            row_sums[matrix.name] = sums
            has_gradient = sums > 0
            for number, at in place.cut_ends(matrix.cut_rows):
                cut[number : number + 1] = sums[at]
                has_gradient[at] = False  # counted once its parts are added up
            count = has_gradient.sum(dtype=torch.float32).view(1)
        shared.append(torch.cat([column_sums, cut, count]))
    flat = torch.cat(shared)
    if add_up is not None:
        add_up(flat)
    for matrix, sums in zip(matrices, flat.split([one.numel() for one in shared]), strict=True):
        if matrix.name not in by_name:
            continue
        column_sums, cut, count = sums.split([matrix.columns, len(matrix.cut_rows), 1])
        place, tensors = by_name[matrix.name]
        of_rows = row_sums[matrix.name]
        for number, at in place.cut_ends(matrix.cut_rows):
            of_rows[at] = cut[number : number + 1]
        count = count + (cut > 0).sum()
        rows, columns, mean = (state[name][at] for name, at in place.cuts.items())
        _average(rows, of_rows / matrix.columns, beta2)
        _average(columns, column_sums / count.clamp(min=1), beta2)
        _average(mean, column_sums.sum() / (matrix.rows * matrix.columns), beta2)
        smallest = torch.finfo(torch.float32).tiny  # where there was no gradient yet, all are 0
        tensors.row_roots = rows.sqrt()
        tensors.column_roots = (columns / (mean.clamp(min=smallest) * (1 - beta2 ** state["step"]))).sqrt_()


def _average(average: torch.Tensor, value: torch.Tensor, beta: float) -> None:
    average.mul_(beta).add_(value, alpha=1 - beta)
