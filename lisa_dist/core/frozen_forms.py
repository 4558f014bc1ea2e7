"""Weights in fewer bits: codes and scales of a tensor, and the tensor that they stand for.

8 bits are bitsandbytes' codes in blocks of 256 elements, 4 bits its NF4 in blocks of 64 whose scales are in 8 bits.
Source: Dettmers et al., "QLoRA" (NeurIPS 2023), sections 2 and 3.
"""

import functools
from collections.abc import Callable, Iterable

import torch

from lisa_dist.errors import UserError
from lisa_dist.text import in_one_line

BLOCKSIZES = {8: 256, 4: 64}  # elements that share a scale
_SCALES_BLOCKSIZE = 256  # scales of 4 bits that share one of their own


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    """The 256 values of bitsandbytes' 8-bit codes; with its import its operators are there."""
    from bitsandbytes.functional import create_dynamic_map

    table: torch.Tensor = create_dynamic_map().to(device)
    return table


def quantize(value: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Codes and scales of a tensor, as bitsandbytes' `quantize_blockwise` and `quantize_4bit` make them; of 16 itself.

    By its operators: those functions make a table for each tensor, whose copy to the device the host waits for.
    """
    if bits == 16:
        return (value,)
    table, operators = _table(value.device), torch.ops.bitsandbytes
    if bits == 8:
        made: tuple[torch.Tensor, ...] = operators.quantize_blockwise(value, table, BLOCKSIZES[8])
        return made
    codes, scales = operators.quantize_4bit(value, BLOCKSIZES[4], "nf4", torch.uint8)
    mean = scales.mean()
    return codes, *operators.quantize_blockwise(scales - mean, table, _SCALES_BLOCKSIZE), mean


def dequantize(codes: tuple[torch.Tensor, ...], bits: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The tensor that codes and scales stand for."""
    if bits == 16:
        return codes[0]
    table, operators = _table(codes[0].device), torch.ops.bitsandbytes
    decode: Callable[..., torch.Tensor] = operators.dequantize_blockwise.default
    if bits == 8:
        return decode(*codes, table, BLOCKSIZES[8], dtype)
    codes_4, codes_of_scales, scales_of_scales, mean = codes
    scales = decode(codes_of_scales, scales_of_scales, table, _SCALES_BLOCKSIZE, torch.float32)
    scales += mean
    decode_4: Callable[..., torch.Tensor] = operators.dequantize_4bit.default
    return decode_4(codes_4, scales, BLOCKSIZES[4], "nf4", shape, dtype)


def check_form(bits: int, device: torch.device) -> None:
    """Raise UserError where bitsandbytes is absent, cannot be loaded, or has no kernel for the device."""
    if bits == 16:
        return
    try:
        probe = torch.ones(BLOCKSIZES[bits], 2, dtype=torch.bfloat16, device=device)
        dequantize(quantize(probe, bits), bits, probe.shape, probe.dtype)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"--lisa_frozen_bits {bits}: bitsandbytes cannot quantize on {device.type} here ({in_one_line(error)}); "
            "pip install -U bitsandbytes, or leave the flag out."
        ) from error


def quantized_bytes(numels: Iterable[int], bits: int) -> int:
    """Bytes of the codes of tensors of so many elements, with their scales."""
    total = 0
    for numel in numels:
        if bits == 16:
            total += 2 * numel
            continue
        scales = -(-numel // BLOCKSIZES[bits])
        if bits == 8:  # scales in fp32
            total += numel + 4 * scales
        else:  # scales in 8 bits, with scales of their own and a mean
            total += -(-numel // 2) + scales + 4 * -(-scales // _SCALES_BLOCKSIZE) + 4
    return total
