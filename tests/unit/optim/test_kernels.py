"""Kernels against the plain-torch reference, on each backend: torch here, and Triton in its interpreter."""

import copy
import itertools
import sys

import bitsandbytes.functional
import pytest
import torch
from cases import full
from ranks import run_ranks

from lisa_dist.errors import UserError
from lisa_dist.kernels.adamw import (
    CHUNK,
    StepNumbers,
    StepTensors,
    adamw_reference,
    adamw_torch,
    check_tensors,
    round_stochastically,
)
from lisa_dist.kernels.dynamic_code import BLOCK, dequantize, dynamic_code, num_blocks, quantize
from lisa_dist.kernels.philox import TILE, philox, random_bits
from lisa_dist.optim import ops as backend
from lisa_dist.optim.ops import adamw_step, choose_kernels

# Weights and whether they have a master: fp32, bf16 with one, bf16 without, fp16 with one, and a master alone.
WEIGHTS = [
    (torch.float32, False),
    (torch.bfloat16, True),
    (torch.bfloat16, False),
    (torch.float16, True),
    (None, True),
]
NUMELS = [0, full(1), full(3), full(255), full(256), 257, full(TILE), TILE + 1, full(5003)]
ELEMENTS = [0, 1, 300, 2 * TILE]
RESULTS = ("weight", "master", "exp_avg", "exp_avg_sq", "exp_avg_scales", "exp_avg_sq_scales")


def step_tensors(numel, weights, gradients, quantized, element=0, scaled=True, offset=0) -> StepTensors:
    """Tensors of a step in full swing; each begins at `offset` of its storage."""
    generator = torch.Generator().manual_seed(numel + element)

    def random(dtype=torch.float32) -> torch.Tensor:
        return torch.randn(numel + offset, generator=generator).to(dtype)[offset:]

    dtype, has_master = weights
    moments, scales = [random() * 1e-2, random() ** 2 * 1e-4], [None, None]
    if quantized:
        coded = [quantize(moment, signed, element) for moment, signed in zip(moments, (True, False), strict=True)]
        moments, scales = zip(*coded, strict=True)
    return StepTensors(
        random(dtype) if dtype else None,
        random() if has_master else None,
        random(gradients) * 0.1,
        *moments,
        *scales,
        torch.tensor([0.25]) if scaled else None,
    )


def step_numbers(element: int = 0, step: int = 3) -> StepNumbers:
    return StepNumbers(1e-2, 0.9, 0.99, 1e-8, 0.1, step, element, seed=2**40 + 3, parameter=77, draw=5)


def check_against_reference(step, numel, element, weights, gradients, quantized, scaled=True, offset=0) -> None:
    tensors = step_tensors(numel, weights, gradients, quantized, element, scaled, offset)
    numbers = step_numbers(element)
    expected = adamw_reference(copy.deepcopy(tensors), numbers)
    before = copy.deepcopy(tensors)
    step(tensors, numbers)
    for name in RESULTS:
        wanted, found = getattr(expected, name), getattr(tensors, name)
        if wanted is None:
            assert found is None
        elif found.dtype == torch.float32:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
        else:  # a sum that differs in its last bit may be rounded to a neighbour
            differ = found.float() != wanted.float()
            assert differ.sum() <= 0.002 * numel, (name, differ.sum())
            is_code = found.dtype == torch.uint8
            tolerance = {"rtol": 0.0, "atol": 1.0} if is_code else {"rtol": 2**-7, "atol": 0.0}
            torch.testing.assert_close(found.float(), wanted.float(), **tolerance)
        if numel > 1 and name == ("weight" if weights[0] else "master"):
            assert not torch.equal(found, getattr(before, name))
    assert torch.equal(tensors.gradient, before.gradient), "gradients are read"


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("numel", NUMELS)
def test_the_torch_path_is_the_reference(numel, weights, quantized):
    for element, gradients in itertools.product(ELEMENTS, (torch.float32, torch.bfloat16)):
        check_against_reference(adamw_torch, numel, element, weights, gradients, quantized)
    check_against_reference(adamw_torch, numel, 7, weights, torch.float16, quantized, scaled=False, offset=3)
    if numel > TILE:  # in chunks, which are not seen
        check_against_reference(adamw_torch, CHUNK + numel, 100, weights, torch.bfloat16, quantized)


def triton_is_the_reference(numel: int) -> int:
    """Where it is forced, in its interpreter."""
    cases = list(itertools.product(WEIGHTS, (False, True), ELEMENTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backend.VARIABLE, "triton")
        assert choose_kernels("cpu") == ("triton", "LISA_DIST_KERNELS=triton")
        for weights, quantized, element in cases:
            gradients = torch.bfloat16 if weights[0] == torch.bfloat16 else torch.float32
            check_against_reference(adamw_step, numel, element, weights, gradients, quantized)
        check_against_reference(adamw_step, numel, 7, WEIGHTS[1], torch.float16, True, scaled=False, offset=3)
    return len(cases)


@pytest.mark.parametrize("numel", NUMELS)
def test_triton_is_the_reference(numel):
    assert run_ranks(triton_is_the_reference, 1, numel, interpret=True) == [2 * len(WEIGHTS) * len(ELEMENTS)]


@pytest.fixture
def choose(monkeypatch):
    """Kernels for a device and why, or what is said, on a machine as it is looked at for the first time."""

    def chosen(device: str, forced: str | None = None) -> tuple[str, str]:
        for name, value in {backend.VARIABLE: forced, "TRITON_INTERPRET": None}.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        for cached in (backend._choose, backend.why_no_compiler):
            cached.cache_clear()
        try:
            return choose_kernels(device)
        except UserError as error:
            return "", str(error)

    yield chosen
    for cached in (backend._choose, backend.why_no_compiler):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("forced", "device", "kernels", "why"),
    [
        (None, "cpu", "torch", "no CUDA device"),
        ("torch", "cuda", "torch", "LISA_DIST_KERNELS=torch"),
        (None, "cuda", "triton", "Triton "),
        ("triton", "cuda", "triton", "LISA_DIST_KERNELS=triton"),
        ("cuda", "cpu", "", "LISA_DIST_KERNELS=cuda: unknown; choose triton or torch"),
        ("triton", "cpu", "", "LISA_DIST_KERNELS=triton on cpu: Triton's kernels"),
    ],
)
def test_kernels_are_chosen_by_device_or_forced(choose, forced, device, kernels, why):
    found, said = choose(device, forced)
    assert (found, said[: len(why)]) == (kernels, why)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"triton": None}, "Triton is not installed"),
        ({"triton": "libtriton.so: bad"}, "Triton cannot be imported (libtriton.so: bad)"),
        ({"PATH": ""}, "there is no C compiler, which Triton needs: apt install gcc, or set CC"),
        ({"CC": "no-such-compiler"}, "the C compiler no-such-compiler cannot be run (No such file or directory)"),
        ({"CC": "false"}, "false cannot compile with Python.h, which Triton needs: apt install python3-dev ()"),
        (
            {"CC": "cat /no-such-file"},
            "cat /no-such-file cannot compile with Python.h, which Triton needs: apt install python3-dev (cat: ",
        ),
    ],
    ids=["not there", "not imported", "no compiler", "absent", "without Python.h", "with a message"],
)
def test_where_triton_cannot_run_torch_takes_its_place(choose, monkeypatch, tmp_path, variables, said):
    monkeypatch.delenv("CC", raising=False)
    for name, value in variables.items():
        if name != "triton":
            monkeypatch.setenv(name, value)
        elif value is None:
            monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
        else:
            (tmp_path / "triton").mkdir()
            (tmp_path / "triton" / "__init__.py").write_text(f"raise ImportError({value!r})")
            monkeypatch.syspath_prepend(tmp_path)
            for loaded in [one for one in sys.modules if one.split(".")[0] == "triton"]:
                monkeypatch.delitem(sys.modules, loaded)
    kernels, why = choose("cuda")
    assert (kernels, why[: len(said)]) == ("torch", said)
    kernels, why = choose("cuda", "triton")
    assert not kernels
    assert why.startswith(f"LISA_DIST_KERNELS=triton: {said}")


# Random bits


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    found = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert " ".join(f"{word.item():08x}" for word in found) == words


def test_bits_belong_to_elements_and_not_to_cuts():
    choice = {"seed": 3, "parameter": 5, "draw": 7}
    whole = random_bits(0, 3 * TILE, **choice)
    for first, last in ((0, 1), (1, 300), (300, TILE), (TILE - 1, TILE + 1), (TILE, 3 * TILE), (77, 77)):
        assert torch.equal(random_bits(first, last - first, **choice), whole[first:last])
    for changed in ("seed", "parameter", "draw"):
        other = random_bits(0, 3 * TILE, **choice | {changed: choice[changed] + 1})
        assert (other == whole).float().mean() < 0.001, changed
    assert random_bits(2**33, 5, **choice).tolist() != whole[:5].tolist(), "the upper word of the counter counts"


def test_bits_are_evenly_spread():
    bits = random_bits(0, 1 << 20, seed=0, parameter=0, draw=0)
    assert bits.min() >= 0
    assert bits.max() < 1 << 16
    counts = torch.bincount(bits >> 8, minlength=256).double()
    expected = (1 << 20) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5  # chi squared
    ones = torch.stack([(bits >> bit) & 1 for bit in range(16)]).double().mean(dim=1)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 2**10
    rows = bits.view(-1, 8, 256).double()  # the eight draws of one counter are independent
    correlation = torch.corrcoef(rows.permute(1, 0, 2).reshape(8, -1))
    assert (correlation - torch.eye(8)).abs().max() < 5 / (1 << 17) ** 0.5


def test_stochastic_rounding_is_unbiased():
    """Over 2**20 draws the mean error is within four standard errors, for values anywhere between two of bf16."""
    numel = 1 << 20
    for value in (1.0, 1.0000001, 1.001, -1.0051, 3.1e-5, -7.77e8, 1.00389):
        exact = torch.full((numel,), value)
        bits = random_bits(0, numel, seed=1, parameter=2, draw=3)
        errors = round_stochastically(exact, bits).double() - exact.double()
        assert errors.unique().numel() <= 2
        spread = errors.std() / numel**0.5
        assert errors.mean().abs() <= 4 * spread, value
    ones = torch.tensor([65535, 65535], dtype=torch.int32)
    assert round_stochastically(torch.tensor([torch.inf, -torch.inf]), ones).isinf().all()
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nan, ones[:1]).isnan().all()


def test_updates_far_below_the_resolution_move_the_mean():
    """Steps of 1e-5 on weights of 1, where those of bf16 are 2**-8: rounded to the nearest, nothing would move."""
    numel, steps, lr = 1 << 16, 100, 1e-5
    weight = torch.ones(numel, dtype=torch.bfloat16)
    moments = torch.zeros(numel), torch.zeros(numel)
    for step in range(1, steps + 1):
        tensors = StepTensors(weight, None, torch.ones(numel, dtype=torch.bfloat16), *moments)
        adamw_step(tensors, StepNumbers(lr, 0.9, 0.999, 1e-8, 0.0, step, draw=step))
    moved = 1 - weight.double()
    assert (torch.ones(1, dtype=torch.bfloat16) - lr).item() == 1.0
    assert (moved.mean() - steps * lr).abs() <= 4 * moved.std() / numel**0.5


# 8-bit moments


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_the_dynamic_one(signed):
    theirs = bitsandbytes.functional.create_dynamic_map(signed)
    torch.testing.assert_close(dynamic_code(signed), theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("signed", [True, False])
def test_each_value_takes_the_nearest_code(signed):
    code = dynamic_code(signed)
    middles = (code[1:] + code[:-1]) / 2
    nearby = [torch.nextafter(middles, torch.tensor(direction)) for direction in (-2.0, 2.0)]
    values = torch.cat([code, middles, *nearby, torch.logspace(-9, 0, 4001), torch.tensor([1.0])])
    values = torch.cat([values, -values]) if signed else values.abs()
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % (BLOCK - 1))).view(-1, BLOCK - 1)
    blocks = torch.cat([blocks, torch.ones(len(blocks), 1)], dim=1).view(-1)  # so that every scale is 1
    codes, scales = quantize(blocks if signed else blocks**2, signed)
    assert (scales == 1).all()
    roots = blocks if signed else (blocks**2).sqrt()
    distances = (roots.double()[:, None] - code.double()[None]).abs()
    found = distances.gather(1, codes.long()[:, None])[:, 0]
    nearest = distances.min(dim=1).values
    never_zero = (codes == 1) & (roots > 0) if not signed else torch.zeros_like(codes, dtype=torch.bool)
    assert ((found <= 1.0001 * nearest) | never_zero).all()  # what lies in the middle, but for its last bit
    if not signed:
        assert ((codes == 0) == (roots == 0)).all(), "AdamW would divide by epsilon"


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("element", "numel"), [(0, 1000), (100, 1000), (255, 2), (256, 256), (5, 0), (0, 0)])
def test_blocks_are_those_of_the_parameter(signed, element, numel):
    whole = torch.randn(2048, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 0, 2048)
    whole = whole if signed else whole**2
    moment = whole[element : element + numel]
    codes, scales = quantize(moment, signed, element)
    blocks = {index // BLOCK for index in range(element, element + numel)}
    assert scales.numel() == num_blocks(element, numel) == len(blocks)
    found = dequantize(codes, scales, signed, element)
    at = torch.arange(element, element + numel) // BLOCK - element // BLOCK
    root = moment.abs() if signed else moment.sqrt()
    assert ((found.abs() if signed else found.sqrt()) - root <= 0.008 * scales[at]).all()
    inner = [index for index in range(element, element + numel) if (index // BLOCK * BLOCK >= element)
             and (index // BLOCK + 1) * BLOCK <= element + numel]  # fmt: skip
    whole_codes, _ = quantize(whole, signed)
    assert torch.equal(codes[[index - element for index in inner]], whole_codes[inner]), "whole blocks are as ever"


# Bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": None, "master": None}, "expected a weight or a master, got neither"),
        ({"gradient": torch.zeros(9)}, "expected 10 elements of gradient, got 9"),
        ({"exp_avg": torch.zeros(12)}, "expected 10 elements of exp_avg, got 12"),
        (
            {"exp_avg_sq": torch.zeros(10, dtype=torch.bfloat16)},
            "expected exp_avg_sq in torch.float32, got torch.bfloat16",
        ),
        ({"gradient": torch.zeros(10, dtype=torch.float64)}, "or torch.float16, got torch.float64"),
        ({"gradient": torch.zeros(20)[::2]}, "expected gradient to be contiguous, got strides (2,)"),
        (
            {"gradient": torch.zeros(10, device="meta")},
            "expected gradient on cpu, where the weights are, got it on meta",
        ),
        ({"exp_avg": torch.zeros(10, dtype=torch.uint8)}, "expected exp_avg_sq in torch.uint8, got torch.float32"),
        (
            dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros(10, dtype=torch.uint8)),
            "expected 1 exp_avg_scales with 8-bit moments, got none",
        ),
        ({"exp_avg_scales": torch.zeros(2)}, "expected 1 elements of exp_avg_scales, got 2"),
        ({"gradient_scale": torch.zeros(2)}, "expected 1 elements of gradient_scale, got 2"),
        ({"weight": torch.zeros(10, dtype=torch.float16), "master": None}, "or torch.float32, got torch.float16"),
        ({"weight": torch.zeros(10, dtype=torch.int8)}, "got torch.int8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_do_not_fit_are_refused(change, said):
    tensors = step_tensors(10, (torch.bfloat16, True), torch.float32, quantized=False)
    for name, value in change.items():
        setattr(tensors, name, value)
    with pytest.raises(ValueError, match="AdamW: expected") as error:
        check_tensors(tensors, step_numbers().element)
    assert said in str(error.value)
