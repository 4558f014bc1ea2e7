"""The gradient of a piece of a matrix by the rows that have one: of an embedding no more than a batch has tokens."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lisa_dist.kernels.dynamic_code import BLOCK, num_blocks
from lisa_dist.kernels.factored import FactoredTensors, num_rows

# Elements of a piece that are laid out at a time, from a multiple of them on; blocks of 8-bit moments and tiles of
# random bits end there too. On a CPU 16 MiB in fp32, for its caches; on a GPU each costs launches: 128 MiB in bf16.
ROWS_CHUNK, GPU_SLAB = 1 << 22, 1 << 26


def chunk_numel(on_cpu: bool) -> int:
    """Elements of a chunk on the CPU or on a GPU."""
    return ROWS_CHUNK if on_cpu else GPU_SLAB


class RowGradient:
    """The elements [start, start + numel) of a flattened matrix of `columns` columns.

    `rows[i]`, of `columns` elements in any float dtype, is the gradient of row `indices[i]`; indices, int64, ascend,
    each comes once, and whatever else there is has none. `rows` are taken over: what is outside of the piece becomes 0.
    """

    def __init__(self, start: int, numel: int, columns: int, indices: torch.Tensor, rows: torch.Tensor):
        self.start, self.columns, self.indices, self.rows = start, columns, indices, rows
        self._numel = numel
        first, last = start // columns, -(-(start + numel) // columns) - 1  # rows that may begin or end elsewhere
        ends = start + numel - last * columns
        for row, outside in ((first, slice(0, start % columns)), (last, slice(ends, columns))):
            if outside.stop > outside.start:
                rows[:, outside] *= (indices != row)[:, None]

    def numel(self) -> int:
        """Elements of the piece."""
        return self._numel

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def is_contiguous(self) -> bool:
        """Whether its chunks are."""
        return True

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The piece laid out, a chunk at a time: where it is, and its gradient, flat. The host waits once."""
        cuts, begins, chunk = [], 0, chunk_numel(self.device.type == "cpu")
        while begins < self._numel:
            ends = min(self._numel, begins + chunk - (self.start + begins) % chunk)
            cuts.append(slice(begins, ends))
            begins = ends
        firsts = [(self.start + cut.start) // self.columns for cut in cuts]
        behind = [-(-(self.start + cut.stop) // self.columns) for cut in cuts]
        bounds = torch.tensor([firsts, behind], dtype=self.indices.dtype).to(self.device)
        low, high = torch.searchsorted(self.indices, bounds).tolist()
        for number, cut in enumerate(cuts):
            first = firsts[number]
            mine = slice(low[number], high[number])
            laid_out = self.rows.new_zeros(behind[number] - first, self.columns)
            laid_out.index_copy_(0, self.indices[mine] - first, self.rows[mine])
            begins = self.start + cut.start - first * self.columns
            yield cut, laid_out.view(-1)[begins : begins + cut.stop - cut.start]

    def squared_sums(self, gradient_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of squares over each row that the piece touches and over each column, as `ops.squared_sums` has them."""
        squares = self.rows.to(torch.float32, copy=True)
        squares = (squares if gradient_scale is None else squares.mul_(gradient_scale)).square_()
        row_sums = squares.new_zeros(num_rows(self.start, self._numel, self.columns))
        row_sums.index_copy_(0, self.indices - self.start // self.columns, squares.sum(1))
        return row_sums, squares.sum(0)


def in_chunks_of_rows(tensors: Any, start: int) -> Iterator[tuple[Any, int]]:
    """The tensors of a piece whose gradient is of rows, in chunks, each with its first element; others as they are.

    `tensors` are StepTensors or FactoredTensors, `start` is the piece's first element.
    """
    gradient = tensors.gradient
    if not isinstance(gradient, RowGradient):
        yield tensors, start
        return
    there = {name: value for name, value in vars(tensors).items() if value is not None and name != "gradient"}
    for cut, laid_out in gradient.chunks():
        element = start + cut.start
        cuts = {"gradient_scale": slice(None), "column_roots": slice(None)}  # of what has not one number an element
        if isinstance(tensors, FactoredTensors):
            columns = gradient.columns
            first = element // columns - start // columns
            cuts["row_roots"] = slice(first, first + num_rows(element, len(laid_out), columns))
        else:
            first = element // BLOCK - start // BLOCK
            blocks = slice(first, first + num_blocks(element, len(laid_out)))
            cuts |= {"exp_avg_scales": blocks, "exp_avg_sq_scales": blocks}
        fields = {name: value[cuts.get(name, cut)] for name, value in there.items()}
        yield replace(tensors, gradient=laid_out, **fields), element
