"""Moments in 8 bits: dynamic codes, and a scale in fp32 for each block of 256 elements.

Seven decades, the higher ones divided the finer, so that small values keep their relative precision and large ones
their absolute one. Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (ICLR 2022), sections 2.1
and 2.2. The first moment has codes with a sign. The second has none, and its root is coded, which spans the decades
that the first moment does, where the square would span twice as many and be lost as zero.

Blocks are those of the parameter, not of the partition: [256 k, 256 (k + 1)) of its flattened elements. A partition
that begins or ends within a block has a part of it, with a scale of its own.
"""

import functools

import torch

BLOCK = 256
_DECADES = 7


@functools.cache
def dynamic_code(signed: bool) -> torch.Tensor:
    """The 256 values in ascending order, fp32: the middles of the divisions of each decade, 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        divisions = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1.0, divisions + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade + 1 - _DECADES)
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def thresholds(signed: bool) -> torch.Tensor:
    """256 values in fp32: what is larger than the i-th is nearer to code i + 1 than to code i; the last is infinity.

    A root that is not zero never becomes zero, or AdamW would divide by epsilon.
    """
    code = dynamic_code(signed)
    middles = (code[1:] + code[:-1]) / 2
    if not signed:
        middles[0] = 0.0
    return torch.cat([middles, torch.tensor([torch.inf])])


@functools.cache
def first_guess(signed: bool) -> torch.Tensor:
    """A code, uint8, for each value of the upper 16 bits of an fp32 number: that of the smallest number they begin.

    No two thresholds begin with the same 16 bits, so the code of a number is its first guess or the next one. That is
    two look-ups, where a search in 256 codes takes eight.
    """
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    smallest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32).nan_to_num(0.0)
    return torch.bucketize(smallest, thresholds(signed)[:-1]).to(torch.uint8)


@functools.cache
def tables(signed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(`dynamic_code`, `thresholds`, `first_guess`) on a device."""
    return dynamic_code(signed).to(device), thresholds(signed).to(device), first_guess(signed).to(device)


def table_bytes() -> int:
    """Bytes of the tables of both moments on a device."""
    return sum(table.nbytes for signed in (True, False) for table in tables(signed, torch.device("cpu")))


def num_blocks(element: int, numel: int) -> int:
    """Blocks of the elements [element, element + numel) of a parameter, begun ones included."""
    return -(-(element + numel) // BLOCK) - element // BLOCK if numel else 0


def quantize(values: torch.Tensor, signed: bool, element: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8, and scales, fp32 and one a block, of an fp32 moment that begins at `element` of a parameter.

    `signed` for the first moment. Each value, divided by the largest magnitude of its block, takes the nearest code.
    """
    _, limits, guess = tables(signed, values.device)
    blocks = num_blocks(element, values.numel())
    padded = _in_blocks(values if signed else values.sqrt(), blocks, element)
    scales = padded.abs().amax(dim=1) if blocks else values.new_zeros(0)
    padded = padded / torch.where(scales == 0, 1.0, scales)[:, None]
    upper = padded.view(torch.int32).view(-1) >> 16
    codes = guess.index_select(0, upper.bitwise_and_(0xFFFF)).int()
    codes += padded.view(-1) > limits.index_select(0, codes)
    begins = element % BLOCK
    return codes[begins : begins + values.numel()].to(torch.uint8), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, signed: bool, element: int = 0) -> torch.Tensor:
    """The moment, fp32, that codes and scales stand for."""
    values = tables(signed, codes.device)[0].index_select(0, codes.int())
    padded = _in_blocks(values, scales.numel(), element) * scales[:, None]
    begins = element % BLOCK
    moment = padded.view(-1)[begins : begins + codes.numel()]
    return moment if signed else moment.square_()


def _in_blocks(values: torch.Tensor, blocks: int, element: int) -> torch.Tensor:
    """The values as rows of a block each, filled up with zeros before the first and behind the last."""
    before = element % BLOCK
    if before == 0 and values.numel() == blocks * BLOCK:
        return values.view(blocks, BLOCK)
    padded = values.new_zeros(blocks * BLOCK)
    padded[before : before + values.numel()] = values
    return padded.view(blocks, BLOCK)
