"""AdamW's moments as each optimizer keeps them: in fp32, or in the 8-bit codes of bitsandbytes or of LisaAdamW."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from lisa_dist.config_rules import FACTORED
from lisa_dist.optim.adamw import LisaAdamW, decode_moment, in_chunks
from lisa_dist.optim.states import Fields, PartitionState, Piece

# The fields of bitsandbytes for each of AdamW's moments: its values, or codes with their scales and table.
BITSANDBYTES = {"exp_avg": ("state1", "absmax1", "qmap1"), "exp_avg_sq": ("state2", "absmax2", "qmap2")}
QUANTIZED_BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit optimizers
_CHUNK = 2**24  # elements that are decoded at a time; whole blocks


def dequantize(codes: torch.Tensor, scales: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """An 8-bit moment in fp32, from what bitsandbytes keeps of it: the fields that `BITSANDBYTES` has."""
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(codes, absmax=scales, code=code, blocksize=QUANTIZED_BLOCK)


def mean_squared_norm(state: PartitionState, pieces: list[Piece], beta2: float) -> float | torch.Tensor:
    """The squared L2 norm of a partition's gradient, averaged over the steps since its moments began; NaN before them.

    Where this rank has no piece of the partition it is 0.

    AdamW keeps it: its second moment is an exponential average of each element's square, so the sum over the elements,
    corrected for its beginning at zero, is that of the squared norm (Kingma and Ba, ICLR 2015, section 3).
    """
    fields = state.optimizer_state
    steps = int(fields["step"]) if fields else 0
    if steps == 0:
        return math.nan if pieces else 0.0
    squares = sum(part.sum(dtype=torch.float64) for part in _second_moment(fields, pieces))
    return squares / (1 - beta2**steps)


def _second_moment(fields: Fields, pieces: list[Piece]) -> Iterator[torch.Tensor]:
    """The second moment of a partition in fp32; where it is in codes, a chunk at a time."""
    values, scales, table = BITSANDBYTES["exp_avg_sq"]
    if "exp_avg_sq_scales" in fields:
        for element, cut, blocks in in_chunks(pieces):
            codes = fields["exp_avg_sq"][cut]
            yield decode_moment("exp_avg_sq", codes, fields["exp_avg_sq_scales"][blocks], element)
    elif table in fields:
        for begins in range(0, fields[values].numel(), _CHUNK):
            blocks = slice(begins // QUANTIZED_BLOCK, (begins + _CHUNK) // QUANTIZED_BLOCK)
            yield dequantize(fields[values][begins : begins + _CHUNK], fields[scales][blocks], fields[table])
    else:
        yield fields["exp_avg_sq" if "exp_avg_sq" in fields else values]


def form_of_moments(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> str | None:
    """How the moments of a group are kept: "factored", or in whose 8-bit codes, "lisa" or "bitsandbytes"; else None.

    An optimizer with codes of its own may keep some partitions in fp32.
    """
    if isinstance(optimizer, LisaAdamW):
        return FACTORED if group["lisa_state_bits"] == FACTORED else "lisa"
    return "bitsandbytes" if hasattr(optimizer, "name2qmap") else None


def restore_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], master: torch.Tensor, pieces: list[Piece], fields: Fields
) -> None:
    """Give the optimizer saved moments of one partition, in the form that it keeps them in itself.

    `fields` has "step", and the moments in fp32 or the codes and scales of AdamW's 8-bit ones; "master" is left out.
    """
    if isinstance(optimizer, LisaAdamW):
        optimizer.restore(group, master, pieces, fields)
        return
    if form_of_moments(optimizer, group) == "bitsandbytes":
        _restore_bitsandbytes(optimizer, group, master, fields)
        return
    moments = fields.keys() - {"master", "step"}
    step, state = fields["step"], {name: torch.empty_like(master).copy_(fields[name]) for name in moments}
    if isinstance(optimizer, torch.optim.AdamW):
        device = master.device if group.get("fused") else "cpu"
        step = torch.tensor(float(step), dtype=torch.float32, device=device)
    optimizer.state[master] = {"step": step, **state}


def _restore_bitsandbytes(optimizer: Any, group: dict[str, Any], master: torch.Tensor, fields: Fields) -> None:
    from bitsandbytes.functional import quantize_blockwise

    index = next(index for index, other in enumerate(optimizer.param_groups) if other is group)
    params, group["params"] = group["params"], [master]  # ZeRO fills groups only while they step
    optimizer.init_state(group, master, index, 0)
    group["params"] = params
    state = optimizer.state[master]
    for moment, of_moment in BITSANDBYTES.items():
        values, scales, table = of_moment
        is_quantized = state[values].dtype == torch.uint8
        if values in fields and is_quantized:  # the very same partition was written
            for field in of_moment:
                state[field].copy_(fields[field])
            continue
        whole = dequantize(*(fields[field] for field in of_moment)) if values in fields else fields[moment]
        if is_quantized:
            codes, quantized = quantize_blockwise(whole.to(master.device), code=state[table], blocksize=QUANTIZED_BLOCK)
            state[values].copy_(codes)
            state[scales].copy_(quantized.absmax)
        else:
            state[values].copy_(whole)
    state["step"] = fields["step"]
