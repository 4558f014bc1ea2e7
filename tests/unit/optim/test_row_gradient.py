"""Slabs of a gradient by rows: each has its own part of whatever has not one number an element."""

import torch

from lisa_dist.optim import row_gradient
from lisa_dist.optim.ops import BLOCK, FactoredTensors, StepTensors, num_blocks, num_rows
from lisa_dist.optim.row_gradient import RowGradient, adamw_slabs, factored_slabs

START, NUMEL, COLUMNS = 5 * BLOCK + 17, 40 * BLOCK, 24


def rows_of_a_piece() -> RowGradient:
    first = START // COLUMNS
    indices = torch.arange(first, first + num_rows(START, NUMEL, COLUMNS), 3)
    return RowGradient(START, NUMEL, COLUMNS, indices, torch.randn(len(indices), COLUMNS))


def test_slabs_have_their_own_blocks_of_scales_and_rows(monkeypatch):
    monkeypatch.setattr(row_gradient, "SLAB", 8 * BLOCK)
    rows, elements = rows_of_a_piece(), torch.arange(NUMEL, dtype=torch.float32)
    dense = rows.dense()
    scales = torch.arange(START // BLOCK, START // BLOCK + num_blocks(START, NUMEL), dtype=torch.float32)
    codes = torch.zeros(NUMEL, dtype=torch.uint8)
    tensors = StepTensors(None, elements, rows, codes, codes, scales, scales, torch.ones(1))
    roots = torch.arange(START // COLUMNS, START // COLUMNS + num_rows(START, NUMEL, COLUMNS), dtype=torch.float32)
    factored = FactoredTensors(None, elements, rows, roots, torch.ones(COLUMNS))

    seen = list(adamw_slabs(tensors, START))
    assert len(seen) == 6
    for slab, element in seen:
        assert slab.exp_avg_scales[0] == element // BLOCK
        assert slab.exp_avg_sq_scales[-1] == (element + len(slab.master) - 1) // BLOCK
    assert torch.equal(torch.cat([slab.master for slab, _ in seen]), elements)
    assert torch.equal(torch.cat([slab.gradient for slab, _ in seen]), dense)

    for slab, element in factored_slabs(factored, START, COLUMNS):
        assert slab.row_roots[0] == element // COLUMNS
        assert slab.row_roots[-1] == (element + len(slab.master) - 1) // COLUMNS
        assert len(slab.column_roots) == COLUMNS
