"""Files of optimizer states that depend on no world size and no ZeRO stage: safetensors keyed by parameter name.

Each rank writes one file with its own pieces: of each parameter the elements [start, start + length) of the flattened
parameter, as 1-D tensors "name:master", "name:exp_avg", "name:exp_avg_sq". A rank of any other run finds the pieces
that its own partitions need, in whichever files they are, and reads no more than those.

LisaAdamW's 8-bit moments are quantized in blocks of their parameter: "name:exp_avg_codes" has the codes of a piece and
"name:exp_avg_scales" the scales of its blocks. They are restored bit for bit wherever no cut has split a block. Those
of bitsandbytes are quantized in blocks of their partition and cannot be cut by name: their codes and scales are kept
whole ("0:state1", "0:absmax1", ...), restored bit for bit into the same partition, and dequantized for any other.

Factored moments of a matrix are "name:row_sq", of the rows that a piece touches, "name:column_sq" and "name:mean_sq".
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lisa_dist.config_rules import FACTORED
from lisa_dist.optim import factored
from lisa_dist.optim.adamw import BLOCK, decode_moment, num_blocks, with_blocks
from lisa_dist.optim.moments import MOMENTS, dequantize
from lisa_dist.optim.states import Fields, PartitionKey, PartitionState, Piece

MASTER = "master"
STATE_FILES = "lisa_optimizer-*.safetensors"


def state_file(rank: int, world_size: int) -> str:
    """The name of one rank's file."""
    return f"lisa_optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def states_on_host(
    states: dict[PartitionKey, PartitionState], pieces: dict[PartitionKey, list[Piece]]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Copies of this rank's partitions, as tensors and metadata of a file.

    `pieces` lists which elements of which parameters are in each of them.
    """
    canonical = {f"state{number}": moment for moment, number in MOMENTS.items()}
    tensors: dict[str, torch.Tensor] = {}
    partitions = []
    for index, (key, state) in enumerate(states.items()):
        partition = {"names": key, "numel": state.numel, "pieces": _as_lists(pieces[key])}
        for field, value in {MASTER: state.master, **state.optimizer_state}.items():
            scales = state.optimizer_state.get(f"{field}_scales")
            if field == "step":
                partition["step"] = int(value)
            elif field in factored.FIELDS:
                for place in factored.places(state.optimizer_state[factored.WIDTHS], pieces[key]):
                    tensors[f"{place.piece.name}:{field}"] = copy_on_host(value[place.of_fields[field]])
            elif scales is not None:
                for piece, blocks in with_blocks(pieces[key]):
                    cut = value.detach()[piece.offset : piece.offset + piece.length]
                    tensors[f"{piece.name}:{field}_codes"] = copy_on_host(cut)
                    tensors[f"{piece.name}:{field}_scales"] = copy_on_host(scales[blocks])
            elif field.endswith("_scales") or field == factored.WIDTHS:
                continue
            elif value.numel() == state.numel and value.is_floating_point():
                for piece in pieces[key]:
                    cut = value.detach()[piece.offset : piece.offset + piece.length]
                    tensors[f"{piece.name}:{canonical.get(field, field)}"] = copy_on_host(cut)
            else:
                tensors[f"{index}:{field}"] = copy_on_host(value.detach())
        partitions.append(partition)
    return tensors, {"partitions": json.dumps(partitions)}


def _rows_of(piece: Piece, width: int) -> tuple[int, int]:
    """The first row that a piece of a matrix touches, and the one behind its last."""
    return piece.start // width, -(-(piece.start + piece.length) // width)


def copy_on_host(value: torch.Tensor) -> torch.Tensor:
    """A copy that no later step changes."""
    return value.to("cpu", copy=True)


def _as_lists(pieces: list[Piece]) -> list[list[Any]]:
    """Pieces as JSON has them."""
    return [list(vars(piece).values()) for piece in pieces]


class StateFiles:
    """The files of all ranks of a run, read as one."""

    def __init__(self, paths: list[Path]):
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._names = [set(file.keys()) for file in self._files]
        self._partitions = [json.loads(file.metadata()["partitions"]) for file in self._files]
        self._last_dequantized: tuple[tuple[str, int, int] | None, torch.Tensor] = (None, torch.empty(0))
        self._sources: dict[str, list[tuple[int, int, Piece]]] = {}
        for file, partitions in enumerate(self._partitions):
            for index, partition in enumerate(partitions):
                for piece in (Piece(*listed) for listed in partition["pieces"]):
                    self._sources.setdefault(piece.name, []).append((file, index, piece))

    def read(self, key: PartitionKey, pieces: list[Piece], numel: int, coding: str | None = None) -> Fields | None:
        """The fields of one partition of `numel` elements; None where its parameters are not in the files.

        "master", and once the optimizer has stepped "step" with "exp_avg" and "exp_avg_sq", in fp32 and bit for bit as
        written. With a `coding`, "lisa" or "bitsandbytes", 8-bit moments are given as codes and scales where possible:
        those of bitsandbytes only for the same partition. For "factored" moments are given as those are. They cannot be
        turned into others, or others into them: where they would have to be, there is a master alone.
        """
        if not all(name in self._sources for name in key):
            return None
        fields = {MASTER: self._gather(MASTER, pieces, numel)}
        steps = {self._partitions[file][index].get("step") for name in key for file, index, _ in self._sources[name]}
        assert len(steps) == 1, f"pieces of {key} have taken {steps} steps"
        step = steps.pop()
        if step is None:
            return fields
        if coding == FACTORED or self._is_factored(key):
            is_both = coding == FACTORED and self._is_factored(key)
            return fields | ({"step": step, **self._factored(pieces)} if is_both else {})
        fields["step"] = step
        find_codes = {"lisa": self._codes, "bitsandbytes": self._codes_of_bitsandbytes}.get(coding or "")
        codes = find_codes(key, pieces, numel) if find_codes else None
        return fields | (codes or {moment: self._gather(moment, pieces, numel) for moment in MOMENTS})

    def _is_factored(self, key: PartitionKey) -> bool:
        file, _, piece = self._sources[key[0]][0]
        return f"{piece.name}:row_sq" in self._names[file]

    def _factored(self, pieces: list[Piece]) -> Fields:
        """Factored moments of the rows that the pieces touch; several files have the same of a row that was cut."""
        widths, by_field = [], {name: [torch.zeros(0)] for name in factored.FIELDS}
        for piece in pieces:
            sources = [(self._files[file], source) for file, _, source in self._sources[piece.name]]
            of_matrix = {name: sources[0][0].get_tensor(f"{piece.name}:{name}") for name in ("column_sq", "mean_sq")}
            widths.append(of_matrix["column_sq"].numel())
            first, last = _rows_of(piece, widths[-1])
            rows = torch.full((last - first,), torch.nan)
            for file, source in sources:
                begin, end = _rows_of(source, widths[-1])
                low, high = max(first, begin), min(last, end)
                if low < high:
                    rows[low - first : high - first] = file.get_slice(f"{piece.name}:row_sq")[
                        low - begin : high - begin
                    ]
            assert not rows.isnan().any(), f"rows of {piece.name} are not in the files"
            for name, value in {"row_sq": rows, **of_matrix}.items():
                by_field[name].append(value)
        return {factored.WIDTHS: tuple(widths)} | {name: torch.cat(values) for name, values in by_field.items()}

    def _gather(self, field: str, pieces: list[Piece], numel: int) -> torch.Tensor:
        """A flat partition, put together from whichever files its pieces are in; padding is zero."""
        flat = torch.zeros(numel)
        for piece in pieces:
            num_read = 0
            for file, index, source in self._sources[piece.name]:
                first = max(piece.start, source.start)
                last = min(piece.start + piece.length, source.start + source.length)
                if first < last:
                    cut = self._cut(field, file, index, source, first - source.start, last - source.start)
                    flat[piece.offset + first - piece.start : piece.offset + last - piece.start] = cut
                    num_read += last - first
            assert num_read == piece.length, f"{num_read} of {piece.length} elements of {piece.name} are in the files"
        return flat

    def _cut(self, field: str, file: int, index: int, source: Piece, first: int, last: int) -> torch.Tensor:
        name = f"{source.name}:{field}"
        if name in self._names[file]:
            cut: torch.Tensor = self._files[file].get_slice(name)[first:last]
            return cut
        if f"{name}_codes" in self._names[file]:
            return decode_moment(field, *self._coded(name, file, source, first, last), source.start + first)
        return self._dequantized(field, file, index)[source.offset + first : source.offset + last]

    def _dequantized(self, moment: str, file: int, index: int) -> torch.Tensor:
        if self._last_dequantized[0] != (moment, file, index):  # pieces of one partition are read one after the other
            get = self._files[file].get_tensor
            parts = (get(f"{index}:{field}{MOMENTS[moment]}") for field in ("state", "absmax", "qmap"))
            self._last_dequantized = ((moment, file, index), dequantize(*parts))
        return self._last_dequantized[1]

    def _coded(self, name: str, file: int, source: Piece, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of elements [first, last) of a piece, and the scales of the blocks that they are in."""
        begins = source.start // BLOCK
        blocks = slice((source.start + first) // BLOCK - begins, -(-(source.start + last) // BLOCK) - begins)
        get = self._files[file].get_slice
        return get(f"{name}_codes")[first:last], get(f"{name}_scales")[blocks]

    def _codes(self, key: PartitionKey, pieces: list[Piece], numel: int) -> Fields | None:
        """Codes and scales of LisaAdamW; None where the files have none, or a block was cut and has two scales."""
        fields: dict[str, torch.Tensor] = {}
        for moment in MOMENTS:
            codes, scales = torch.zeros(numel, dtype=torch.uint8), []
            for piece in pieces:
                piece_scales = torch.full((num_blocks(piece.start, piece.length),), torch.nan)
                for file, _, source in self._sources[piece.name]:
                    first = max(piece.start, source.start)
                    last = min(piece.start + piece.length, source.start + source.length)
                    if first >= last:
                        continue
                    name = f"{source.name}:{moment}"
                    if f"{name}_codes" not in self._names[file]:
                        return None
                    part, part_scales = self._coded(name, file, source, first - source.start, last - source.start)
                    codes[piece.offset + first - piece.start : piece.offset + last - piece.start] = part
                    begins = first // BLOCK - piece.start // BLOCK
                    known = piece_scales[begins : begins + part_scales.numel()]
                    if (~known.isnan() & (known != part_scales)).any():
                        return None
                    known.copy_(part_scales)
                scales.append(piece_scales)
            fields |= {moment: codes, f"{moment}_scales": torch.cat(scales) if scales else torch.zeros(0)}
        return fields

    def _codes_of_bitsandbytes(self, key: PartitionKey, pieces: list[Piece], numel: int) -> Fields | None:
        """Codes and scales where the same elements of the same parameters made up one partition in the same order."""
        identity = {"names": list(key), "numel": numel, "pieces": _as_lists(pieces)}
        for file, partitions in enumerate(self._partitions):
            for index, partition in enumerate(partitions):
                if all(partition[name] == value for name, value in identity.items()):
                    prefix = f"{index}:"
                    names = [name for name in self._names[file] if name.startswith(prefix)]
                    return {name.removeprefix(prefix): self._files[file].get_tensor(name) for name in names}
        return None
