"""A second moment by row and column: the kernels against the formula, and LisaAdamW on matrices of its own."""

import copy
import itertools
import os

import pytest
import torch
from cases import full
from ranks import run_ranks

from lisa_dist.core.live_bytes import AllocationTracker
from lisa_dist.kernels.adamw import round_stochastically
from lisa_dist.kernels.factored import (
    CHUNK,
    FactoredNumbers,
    FactoredTensors,
    check_factored,
    factored_chunk_bytes,
    factored_torch,
    num_rows,
    squared_sums_torch,
)
from lisa_dist.kernels.philox import TILE, random_bits
from lisa_dist.optim.adamw import LisaAdamW
from lisa_dist.zero.layout import matrices_of_group, pieces_of_group

# Weights, and whether they have a master.
WEIGHTS = [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (None, True)]
# The piece's first element, its elements, and the matrix's columns: whole rows, within one row, from the middle of one.
PIECES = [
    (0, 30 * 67, 67),
    full(67 * 3, 67 * 11, 67),
    (5, 40, 67),
    full(5, 62, 67),
    (67 * 2 + 60, 67 * 40 + 9, 67),
    full(3 * TILE - 7, 2 * TILE + 5, 300),
    full(1, 1, 1),
    (0, 0, 67),
    # In chunks of whole rows; also where a single row is larger.
    full(700, 3 * CHUNK, 1000),
    (700, 3 * CHUNK, 2 * CHUNK),
]


def tensors_of(element, numel, columns, weights, gradients=torch.float32, scaled=True) -> FactoredTensors:
    generator = torch.Generator().manual_seed(element + numel)
    dtype, has_master = weights
    rows = num_rows(element, numel, columns)
    return FactoredTensors(
        torch.randn(numel, generator=generator).to(dtype) if dtype else None,
        torch.randn(numel, generator=generator) if has_master else None,
        (torch.randn(numel, generator=generator) * 0.1).to(gradients),
        torch.rand(rows, generator=generator) + 0.1,
        torch.rand(columns, generator=generator) + 0.1,
        torch.tensor([0.25]) if scaled else None,
    )


def numbers_of(element: int = 0) -> FactoredNumbers:
    return FactoredNumbers(1e-2, 1e-8, 0.1, element, seed=2**40 + 3, parameter=77, draw=5)


def check_step(step, sums, element, numel, columns, weights, gradients, scaled=True) -> None:
    """Element by element, by the row and the column that each one is in."""
    tensors, numbers = tensors_of(element, numel, columns, weights, gradients, scaled), numbers_of(element)
    place = torch.arange(element, element + numel)
    row, column = place // columns - element // columns, place % columns
    gradient = tensors.gradient.float() * (0.25 if scaled else 1.0)
    row_sums, column_sums = sums(tensors.gradient, tensors.gradient_scale, element, columns)
    for found, size, index in ((row_sums, num_rows(element, numel, columns), row), (column_sums, columns, column)):
        wanted = torch.zeros(size, dtype=torch.float64).index_add(0, index, gradient.double() ** 2)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-9)

    before = copy.deepcopy(tensors)
    wanted = tensors.target.float() * (1 - 1e-2 * 0.1)
    wanted = wanted - 1e-2 * gradient / (tensors.row_roots[row] * tensors.column_roots[column] + 1e-8)
    step(tensors, numbers)
    assert torch.equal(tensors.gradient, before.gradient), "gradients are read"
    if tensors.master is not None:
        torch.testing.assert_close(tensors.master, wanted, rtol=1e-6, atol=1e-7)
    if tensors.stochastic:
        wanted = round_stochastically(
            wanted, random_bits(element, numel, seed=numbers.seed, parameter=numbers.parameter, draw=numbers.draw)
        )
    if tensors.weight is not None:  # a sum that differs in its last bit may be rounded to a neighbour
        found, wanted = tensors.weight.float(), wanted.to(tensors.weight.dtype).float()
        assert (found != wanted).sum() <= 0.002 * numel or tensors.weight.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=2**-7 if tensors.weight.itemsize == 2 else 1e-6, atol=1e-7)
        assert numel <= 1 or not torch.equal(tensors.weight, before.weight)


@pytest.mark.parametrize(("element", "numel", "columns"), PIECES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_torch_is_the_formula(element, numel, columns, weights):
    for gradients, scaled in ((torch.float32, True), (torch.bfloat16, False)):
        check_step(factored_torch, squared_sums_torch, element, numel, columns, weights, gradients, scaled)


def triton_is_the_formula(pieces) -> int:
    assert os.environ["TRITON_INTERPRET"] == "1"
    from lisa_dist.kernels.factored_triton import factored_triton, squared_sums_triton

    cases = list(itertools.product(pieces, WEIGHTS))
    for (element, numel, columns), weights in cases:
        gradients = torch.bfloat16 if weights[0] == torch.bfloat16 else torch.float32
        check_step(factored_triton, squared_sums_triton, element, numel, columns, weights, gradients)
    check_step(factored_triton, squared_sums_triton, 7, 500, 67, WEIGHTS[1], torch.float16, scaled=False)
    return len(cases)


def test_triton_is_the_formula():
    pieces = [(0, 30 * 67, 67), (5, 40, 67), (67 * 2 + 60, 67 * 40 + 9, 67), (3 * TILE - 7, 2 * TILE + 5, 300)]
    assert run_ranks(triton_is_the_formula, 1, [*pieces, (0, 0, 67)], interpret=True) == [5 * len(WEIGHTS)]


@pytest.mark.parametrize("weights", WEIGHTS[:3], ids=str)
def test_no_more_is_allocated_than_a_plan_has(weights):
    element, numel, columns = 130, 2 * CHUNK + 999, 257
    tensors = tensors_of(element, numel, columns, weights, torch.bfloat16)
    tracker = AllocationTracker()
    tracker.add(value for value in vars(tensors).values() if value is not None)
    before = tracker.now
    with tracker:
        factored_torch(tensors, numbers_of(element))
        squared_sums_torch(tensors.gradient, tensors.gradient_scale, element, columns)
    planned = factored_chunk_bytes(numel, columns, tensors.stochastic)
    assert 0.9 * planned <= tracker.peak - before <= planned + 4 * num_rows(element, numel, columns) + 8 * columns


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"row_roots": torch.ones(5)}, "expected 4 elements of row_roots, got 5"),
        ({"column_roots": torch.ones(67, dtype=torch.float64)}, "expected column_roots in torch.float32"),
        ({"weight": torch.ones(150, dtype=torch.float16), "master": None}, "without a master in torch.bfloat16"),
    ],
)
def test_tensors_that_no_kernel_may_touch_are_refused(changed, said):
    tensors = tensors_of(60, 150, 67, WEIGHTS[1])
    check_factored(tensors, 60)
    for name, value in changed.items():
        setattr(tensors, name, value)
    with pytest.raises(ValueError, match=said):
        check_factored(tensors, 60)


def formula(matrix: torch.Tensor, gradients, lr: float, beta2: float, decay: float) -> torch.Tensor:
    """The weights after these gradients, by the published rule, in fp64."""
    rows, columns = torch.zeros(len(matrix), dtype=torch.float64), torch.zeros(matrix.shape[1], dtype=torch.float64)
    weights = matrix.double()
    for step, gradient in enumerate(gradients, 1):
        squares = gradient.double() ** 2
        rows = beta2 * rows + (1 - beta2) * squares.mean(1)
        columns = beta2 * columns + (1 - beta2) * squares[squares.sum(1) > 0].mean(0)
        second = torch.outer(rows, columns) / rows.mean() / (1 - beta2**step)
        weights = weights - lr * (gradient.double() / (second.sqrt() + 1e-8) + decay * weights)
    return weights


def test_lisa_adamw_steps_a_matrix_by_the_rule():
    """Tokens that do not occur keep their weights but for the decay, and their row of the moment wanes."""
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(50, 12))
    optimizer = LisaAdamW([matrix], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, state_bits="factored")
    before, gradients = matrix.detach().clone(), torch.randn(6, 50, 12)
    for step, gradient in enumerate(gradients):
        gradient[step::3] = 0
        matrix.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(matrix.detach().double(), formula(before, gradients, 1e-2, 0.99, 0.1), rtol=0, atol=1e-5)
    state = optimizer.state[matrix]
    assert {name: value.numel() for name, value in state.items() if isinstance(value, torch.Tensor)} == {
        "row_sq": 50,
        "column_sq": 12,
        "mean_sq": 1,
    }
    still = torch.nn.Parameter(torch.ones(4, 3))  # without any gradient
    optimizer = LisaAdamW([still], lr=1e-2, weight_decay=0.0, state_bits="factored")
    for _ in range(2):
        still.grad = torch.zeros(4, 3)
        optimizer.step()
    assert torch.equal(still.detach(), torch.ones(4, 3))


def test_what_is_no_matrix_is_refused():
    vector = torch.nn.Parameter(torch.ones(4))
    vector.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"to be a matrix, as its moments are factored, got shape \(4,\)"):
        LisaAdamW([vector], state_bits="factored").step()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 50])
def test_rows_that_are_cut_are_those_of_which_several_ranks_have_a_part(stage, world_size):
    """Also where a row is spread over many ranks, and where ranks have nothing."""
    shapes = [("one", (5, 7)), ("two", (3, 20))]
    numels = [(name, rows * columns) for name, (rows, columns) in shapes]
    owners: dict[tuple[str, int], set[int]] = {}
    for rank in range(world_size):
        for piece in pieces_of_group(numels, stage, rank, world_size):
            columns = dict(shapes)[piece.name][1]
            for element in range(piece.start, piece.start + piece.length):
                owners.setdefault((piece.name, element // columns), set()).add(rank)
    for matrix in matrices_of_group(shapes, stage, world_size):
        cut = [row for row in range(matrix.rows) if len(owners[matrix.name, row]) > 1]
        assert list(matrix.cut_rows) == cut
    assert world_size == 1 or any(len(ranks) > 1 for ranks in owners.values())
