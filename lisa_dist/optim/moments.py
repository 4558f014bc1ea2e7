"""AdamW's moments as each optimizer keeps them: in fp32, or in the 8-bit codes of bitsandbytes or of LisaAdamW."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from lisa_dist.optim.adamw import LisaAdamW, decode_moment, in_chunks
from lisa_dist.optim.states import Fields, PartitionState, Piece

# AdamW's moments, and the suffix of bitsandbytes' fields for each: state1, and for 8 bits absmax1 and qmap1.
MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
QUANTIZED_BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit optimizers
_CHUNK = 2**24  # elements that are decoded at a time; whole blocks


def dequantize(codes: torch.Tensor, scales: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """An 8-bit moment in fp32, from what bitsandbytes keeps of it: state, absmax and qmap."""
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
    name = "exp_avg_sq" if "exp_avg_sq" in fields else f"state{MOMENTS['exp_avg_sq']}"  # as bitsandbytes calls it
    moment: torch.Tensor = fields[name]
    if moment.dtype != torch.uint8:
        yield moment
    elif "exp_avg_sq_scales" in fields:
        for element, cut, blocks in in_chunks(pieces):
            yield decode_moment("exp_avg_sq", moment[cut], fields["exp_avg_sq_scales"][blocks], element)
    else:
        for begins in range(0, moment.numel(), _CHUNK):
            scales = fields["absmax2"][begins // QUANTIZED_BLOCK : (begins + _CHUNK) // QUANTIZED_BLOCK]
            yield dequantize(moment[begins : begins + _CHUNK], scales, fields["qmap2"])


def coding_of_states(optimizer: torch.optim.Optimizer) -> str | None:
    """Whose codes 8-bit moments have in this optimizer; None where it keeps no codes."""
    if isinstance(optimizer, LisaAdamW):
        return "lisa"
    return "bitsandbytes" if hasattr(optimizer, "name2qmap") else None


def restore_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], master: torch.Tensor, pieces: list[Piece], fields: Fields
) -> None:
    """Give the optimizer saved moments of one partition, in the form that it keeps them in itself.

    `fields` has "step", and "exp_avg" and "exp_avg_sq" in fp32 or the codes and scales of 8-bit moments.
    """
    if isinstance(optimizer, LisaAdamW):
        optimizer.restore(group, master, pieces, fields)
        return
    if coding_of_states(optimizer) == "bitsandbytes":
        _restore_bitsandbytes(optimizer, group, master, fields)
        return
    state = {moment: torch.empty_like(master).copy_(fields[moment]) for moment in MOMENTS}
    step = fields["step"]
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
    for moment, number in MOMENTS.items():
        is_quantized = state[f"state{number}"].dtype == torch.uint8
        if f"state{number}" in fields and not is_quantized:  # it was written with fewer bits than it has now
            parts = (fields[f"{part}{number}"] for part in ("state", "absmax", "qmap"))
            state[f"state{number}"].copy_(dequantize(*parts))
        elif f"state{number}" in fields:  # the very same partition was written
            for field in (f"state{number}", f"absmax{number}", f"qmap{number}"):
                state[field].copy_(fields[field])
        elif is_quantized:
            codes, quantized = quantize_blockwise(
                fields[moment].to(master.device), code=state[f"qmap{number}"], blocksize=QUANTIZED_BLOCK
            )
            state[f"state{number}"].copy_(codes)
            state[f"absmax{number}"].copy_(quantized.absmax)
        else:
            state[f"state{number}"].copy_(fields[moment])
    state["step"] = fields["step"]
