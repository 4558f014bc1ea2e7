"""Weights in fewer bits: codes and scales of a tensor, and the tensor that they stand for.

8 bits are bitsandbytes' codes in blocks of 256 elements, 4 bits its NF4 in blocks of 64 whose scales are in 8 bits.
fp8 is e4m3 with a scale a row, of a tensor's last dimension (`kernels/fp8_rows.py`).
Source: Dettmers et al., "QLoRA" (NeurIPS 2023), sections 2 and 3.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch

from lisa_dist.config_rules import Form
from lisa_dist.errors import UserError
from lisa_dist.kernels.fp8_rows import from_fp8_rows
from lisa_dist.optim.ops import fp8_rows
from lisa_dist.text import in_one_line

BLOCKSIZES = {8: 256, 4: 64}  # elements that share a scale
_SCALES_BLOCKSIZE = 256  # scales of 4 bits that share one of their own
_LARGEST = 2**31  # elements of a tensor that bitsandbytes' kernels can count


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    """The 256 values of bitsandbytes' 8-bit codes; with its import its operators are there."""
    from bitsandbytes.functional import create_dynamic_map

    table: torch.Tensor = create_dynamic_map().to(device)
    return table


def quantize(value: torch.Tensor, form: Form) -> tuple[torch.Tensor, ...]:
    """Codes and scales of a tensor, as bitsandbytes' `quantize_blockwise` and `quantize_4bit` make them; of 16 itself.

    By its operators: those functions make a table for each tensor, whose copy to the device the host waits for.
    """
    if form == 16:
        return (value,)
    if form == "fp8":
        codes, scales = fp8_rows(value.reshape(-1, value.shape[-1]))
        return codes.view(value.shape), scales.view(*value.shape[:-1], 1)
    table, operators = _table(value.device), torch.ops.bitsandbytes
    if form == 8:
        made: tuple[torch.Tensor, ...] = operators.quantize_blockwise(value, table, BLOCKSIZES[8])
        return made
    codes, scales = operators.quantize_4bit(value, BLOCKSIZES[4], "nf4", torch.uint8)
    mean = scales.mean()
    return codes, *operators.quantize_blockwise(scales - mean, table, _SCALES_BLOCKSIZE), mean


def dequantize(codes: tuple[torch.Tensor, ...], form: Form, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The tensor that codes and scales stand for."""
    if form == 16:
        return codes[0]
    if form == "fp8":
        return from_fp8_rows(codes[0], codes[1], dtype)
    table, operators = _table(codes[0].device), torch.ops.bitsandbytes
    decode: Callable[..., torch.Tensor] = operators.dequantize_blockwise.default
    if form == 8:
        return decode(*codes, table, BLOCKSIZES[8], dtype)
    codes_4, codes_of_scales, scales_of_scales, mean = codes
    scales = decode(codes_of_scales, scales_of_scales, table, _SCALES_BLOCKSIZE, torch.float32)
    scales += mean
    decode_4: Callable[..., torch.Tensor] = operators.dequantize_4bit.default
    return decode_4(codes_4, scales, BLOCKSIZES[4], "nf4", shape, dtype)


def check_form(form: Form, numels: Iterable[int], device: torch.device) -> None:
    """Raise UserError where bitsandbytes is absent, cannot be loaded, has no kernel, or cannot count so many."""
    if form in (16, "fp8"):
        return
    if max(numels) >= _LARGEST:
        raise UserError(
            f"--lisa_frozen_bits {form}: a tensor of experts has {max(numels)} elements, and bitsandbytes counts to "
            f"{_LARGEST}; give fp8."
        )
    try:
        probe = torch.ones(BLOCKSIZES[int(form)], 2, dtype=torch.bfloat16, device=device)
        dequantize(quantize(probe, form), form, probe.shape, probe.dtype)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"--lisa_frozen_bits {form}: bitsandbytes cannot quantize on {device.type} here ({in_one_line(error)}); "
            "pip install -U bitsandbytes, or leave the flag out."
        ) from error


def linear_4bit_bytes(shapes: Iterable[Sequence[int]], is_nested: bool) -> int:
    """Return the bytes of bitsandbytes' Linear4bit modules of these shapes, each with tables of its own.

    Scales are in fp32, or in 8 bits with scales and a mean of their own where `is_nested`.
    """
    total = 0
    for shape in shapes:
        numel = math.prod(shape)
        scales = -(-numel // BLOCKSIZES[4])
        total += -(-numel // 2) + 16 * 4
        total += scales + 4 * -(-scales // _SCALES_BLOCKSIZE) + 4 + 256 * 4 if is_nested else 4 * scales
    return total


def quantized_bytes(shapes: Iterable[Sequence[int]], form: Form) -> int:
    """Bytes of the codes of tensors of these shapes, with their scales."""
    total = 0
    for shape in shapes:
        numel = math.prod(shape)
        if form == 16:
            total += 2 * numel
        elif form == "fp8":  # scales in fp32
            total += numel + 4 * numel // shape[-1]
        elif form == 8:  # scales in fp32
            total += numel + 4 * -(-numel // BLOCKSIZES[8])
        else:  # scales in 8 bits, with scales of their own and a mean
            assert form == 4, form
            scales = -(-numel // BLOCKSIZES[4])
            total += -(-numel // 2) + scales + 4 * -(-scales // _SCALES_BLOCKSIZE) + 4
    return total
