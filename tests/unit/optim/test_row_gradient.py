"""Chunks of a gradient by rows: each has its own part of whatever has not one number an element."""

import pytest
import torch

from lisa_dist.kernels.adamw import StepTensors
from lisa_dist.kernels.dynamic_code import BLOCK, num_blocks
from lisa_dist.kernels.factored import FactoredTensors, num_rows
from lisa_dist.optim import row_gradient
from lisa_dist.optim.row_gradient import RowGradient, in_chunks_of_rows

START, NUMEL, COLUMNS = 5 * BLOCK + 17, 40 * BLOCK, 24


def rows_of_a_piece() -> RowGradient:
    first = START // COLUMNS
    indices = torch.arange(first, first + num_rows(START, NUMEL, COLUMNS), 3)
    return RowGradient(START, NUMEL, COLUMNS, indices, torch.randn(len(indices), COLUMNS))


def test_chunks_have_their_own_blocks_of_scales_and_rows(monkeypatch):
    monkeypatch.setattr(row_gradient, "ROWS_CHUNK", 8 * BLOCK)
    rows, elements = rows_of_a_piece(), torch.arange(NUMEL, dtype=torch.float32)
    dense = torch.cat([chunk for _, chunk in rows.chunks()])
    scales = torch.arange(START // BLOCK, START // BLOCK + num_blocks(START, NUMEL), dtype=torch.float32)
    codes = torch.zeros(NUMEL, dtype=torch.uint8)
    tensors = StepTensors(None, elements, rows, codes, codes, scales, scales, torch.ones(1))
    roots = torch.arange(START // COLUMNS, START // COLUMNS + num_rows(START, NUMEL, COLUMNS), dtype=torch.float32)
    factored = FactoredTensors(None, elements, rows, roots, torch.ones(COLUMNS))

    seen = list(in_chunks_of_rows(tensors, START))
    assert len(seen) == 6
    for chunk, element in seen:
        assert chunk.exp_avg_scales[0] == element // BLOCK
        assert chunk.exp_avg_sq_scales[-1] == (element + len(chunk.master) - 1) // BLOCK
    assert torch.equal(torch.cat([chunk.master for chunk, _ in seen]), elements)
    assert torch.equal(torch.cat([chunk.gradient for chunk, _ in seen]), dense)

    for chunk, element in in_chunks_of_rows(factored, START):
        assert chunk.row_roots[0] == element // COLUMNS
        assert chunk.row_roots[-1] == (element + len(chunk.master) - 1) // COLUMNS
        assert len(chunk.column_roots) == COLUMNS


@pytest.mark.parametrize(("start", "numel"), [(0, 60), (7, 46), (12, 12), (13, 4), (5, 1)])
def test_a_piece_laid_out_chunk_by_slab(monkeypatch, start, numel):
    """Also where it begins and ends within a row, and where a chunk does."""
    torch.manual_seed(0)
    columns, indices = 6, torch.tensor([0, 1, 3, 4, 9])
    touched = [row for row in indices.tolist() if start // columns <= row <= (start + numel - 1) // columns]
    indices = torch.tensor(touched, dtype=torch.long)
    matrix = torch.zeros(10, columns)
    matrix[indices] = torch.randn(len(indices), columns)
    wanted = torch.zeros(60)
    wanted[start : start + numel] = matrix.view(-1)[start : start + numel]
    for chunk in (1 << 22, 8):
        monkeypatch.setattr(row_gradient, "ROWS_CHUNK", chunk)
        gradient = RowGradient(start, numel, columns, indices, matrix[indices])
        cuts, chunks = zip(*gradient.chunks(), strict=True)
        assert torch.equal(torch.cat(chunks), wanted[start : start + numel])
        assert all(cut.stop - cut.start <= chunk for cut in cuts)
    row_sums, column_sums = gradient.squared_sums(torch.tensor([0.5]))
    squares = (0.5 * wanted.view(10, columns)) ** 2
    rows = slice(start // columns, -(-(start + numel) // columns))
    torch.testing.assert_close(row_sums, squares.sum(1)[rows])
    torch.testing.assert_close(column_sums, squares.sum(0))
