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

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lisa_dist.config_rules import FACTORED
from lisa_dist.kernels.dynamic_code import BLOCK, num_blocks
from lisa_dist.kernels.factored import num_rows
from lisa_dist.optim import factored
from lisa_dist.optim.adamw import MOMENTS, decode_moment, with_blocks
from lisa_dist.optim.moments import BITSANDBYTES, dequantize
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
    canonical = {values: moment for moment, (values, *_) in BITSANDBYTES.items()}
    parts: dict[str, torch.Tensor] = {}
    partitions = []
    for index, (key, state) in enumerate(states.items()):
        fields = {MASTER: state.master, **state.optimizer_state}
        partition = {"names": key, "numel": state.numel, "pieces": _as_lists(pieces[key])}
        partitions.append(partition | ({"step": int(fields.pop("step"))} if "step" in fields else {}))
        if factored.WIDTHS in fields:
            for place in factored.places(fields.pop(factored.WIDTHS), pieces[key]):
                parts |= {f"{place.piece.name}:{name}": fields[name][cut] for name, cut in place.cuts.items()}
            fields = {MASTER: state.master}
        for field, value in fields.items():
            has_codes, has_scales = f"{field}_scales" in fields, field.endswith("_scales")
            name = f"{field}_codes" if has_codes else canonical.get(field, field)
            if not (has_codes or has_scales or (value.numel() == state.numel and value.is_floating_point())):
                parts[f"{index}:{field}"] = value
                continue
            for piece, blocks in with_blocks(pieces[key]):
                parts[f"{piece.name}:{name}"] = value[blocks if has_scales else piece.elements]
    return {name: copy_on_host(value) for name, value in parts.items()}, {"partitions": json.dumps(partitions)}


def copy_on_host(value: torch.Tensor) -> torch.Tensor:
    """A copy that no later step changes."""
    return value.detach().to("cpu", copy=True)


def _as_lists(pieces: list[Piece]) -> list[list[Any]]:
    """Pieces as JSON has them."""
    return [list(vars(piece).values()) for piece in pieces]


class StateFiles:
    """The files of all ranks of a run, read as one.

    They are opened as pieces are looked for, those next to `nearest` first: a rank of as many as have saved opens one.
    """

    def __init__(self, paths: list[Path], nearest: int = 0):
        self._paths = paths
        self._unopened = sorted(range(len(paths)), key=lambda file: -abs(file - nearest))  # from the end on
        self._files: dict[int, Any] = {}
        self._names: dict[int, set[str]] = {}
        self._partitions: dict[int, list[dict[str, Any]]] = {}
        # Pieces of one partition are read one after the other.
        self._dequantized = functools.lru_cache(1)(functools.partial(_dequantize, self._files))
        self._sources: dict[str, list[tuple[int, int, Piece]]] = {}
        self._steps: dict[str, set[int | None]] = {}  # that the partitions of a parameter have taken

    def _open_next(self) -> None:
        file = self._unopened.pop()
        self._files[file] = opened = safe_open(self._paths[file], framework="pt")
        self._names[file] = set(opened.keys())
        self._partitions[file] = json.loads(opened.metadata()["partitions"])
        for index, partition in enumerate(self._partitions[file]):
            for name in partition["names"]:
                self._steps.setdefault(name, set()).add(partition.get("step"))
            for piece in (Piece(*listed) for listed in partition["pieces"]):
                self._sources.setdefault(piece.name, []).append((file, index, piece))

    def _has(self, key: PartitionKey, pieces: list[Piece]) -> bool:
        """Whether the files that are open have all of these pieces, and something of a partition without any."""
        found = [sum(last - first for *_, first, last in self._parts_of(piece)) for piece in pieces]
        return found == [piece.length for piece in pieces] and any(name in self._sources for name in key)

    def read(self, key: PartitionKey, pieces: list[Piece], numel: int, form: str | None = None) -> Fields | None:
        """The fields of one partition of `numel` elements; None where its parameters are not in the files.

        "master", and once the optimizer has stepped "step" and its moments ("exp_avg" and "exp_avg_sq" of AdamW), in
        fp32 and bit for bit as written. With the `form` "lisa" or "bitsandbytes", 8-bit moments are given as codes and
        scales where possible: those of bitsandbytes only for the same partition. For "factored" moments are given as
        those are. They cannot be turned into others, or others into them: where they would have to be, there is a
        master alone.
        """
        if not self._files:
            self._open_next()
        if not all(name in self._steps for name in key):  # each file names all partitions
            return None
        while self._unopened and not self._has(key, pieces):
            self._open_next()
        fields = {MASTER: self._gather(MASTER, pieces, numel)}
        steps = set().union(*(self._steps[name] for name in key))
        assert len(steps) == 1, f"pieces of {key} have taken {steps} steps"
        step = steps.pop()
        if step is None:
            return fields
        name = next(name for name in key if name in self._sources)
        file, *_ = self._sources[name][0]
        is_factored = f"{name}:row_sq" in self._names[file]
        if is_factored or form == FACTORED:
            return fields | ({"step": step, **self._factored(pieces)} if is_factored and form == FACTORED else {})
        codes = self._codes(pieces, numel) if form == "lisa" else None
        if form == "bitsandbytes":
            codes = self._codes_of_bitsandbytes(key, pieces, numel)
        if not codes:
            codes = {moment: self._gather(moment, pieces, numel) for moment in self._moments(name, file)}
        return fields | {"step": step} | codes

    def _moments(self, parameter: str, file: int) -> set[str]:
        """The names of a parameter's moments, whatever the optimizer was that wrote them."""
        names = {name.removeprefix(f"{parameter}:") for name in self._names[file] if name.startswith(f"{parameter}:")}
        return {re.sub("_(codes|scales)$", "", name) for name in names - {MASTER}} or {*MOMENTS}  # bitsandbytes' codes

    def _parts_of(self, piece: Piece) -> Iterator[tuple[int, int, Piece, int, int]]:
        """Where a piece is in the files: file, partition, the piece there, and which elements of the parameter."""
        for file, index, source in self._sources.get(piece.name, ()):
            first = max(piece.start, source.start)
            last = min(piece.start + piece.length, source.start + source.length)
            if first < last:
                yield file, index, source, first, last

    def _gather(self, field: str, pieces: list[Piece], numel: int) -> torch.Tensor:
        """A flat partition, put together from whichever files its pieces are in; padding is zero."""
        flat = torch.zeros(numel)
        for piece in pieces:
            begins, num_read = piece.offset - piece.start, 0
            for file, index, source, first, last in self._parts_of(piece):
                flat[begins + first : begins + last] = self._cut(field, file, index, source, first, last)
                num_read += last - first
            assert num_read == piece.length, f"{num_read} of {piece.length} elements of {piece.name} are in the files"
        return flat

    def _cut(self, field: str, file: int, index: int, source: Piece, first: int, last: int) -> torch.Tensor:
        name = f"{source.name}:{field}"
        if name in self._names[file]:
            cut: torch.Tensor = self._files[file].get_slice(name)[first - source.start : last - source.start]
            return cut
        if f"{name}_codes" in self._names[file]:
            return decode_moment(field, *self._coded(name, file, source, first, last), first)
        begins = source.offset - source.start
        return self._dequantized(field, file, index)[begins + first : begins + last]

    def _coded(self, name: str, file: int, source: Piece, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of elements [first, last) of a parameter, and the scales of the blocks that they are in."""
        begins = source.start // BLOCK
        blocks = slice(first // BLOCK - begins, -(-last // BLOCK) - begins)
        get = self._files[file].get_slice
        return get(f"{name}_codes")[first - source.start : last - source.start], get(f"{name}_scales")[blocks]

    def _codes(self, pieces: list[Piece], numel: int) -> Fields | None:
        """Codes and scales of LisaAdamW; None where the files have none, or a block was cut and has two scales."""
        fields: dict[str, torch.Tensor] = {}
        for moment in MOMENTS:
            codes, scales = torch.zeros(numel, dtype=torch.uint8), [torch.zeros(0)]
            for piece in pieces:
                scales.append(torch.full((num_blocks(piece.start, piece.length),), torch.nan))
                for file, _, source, first, last in self._parts_of(piece):
                    name = f"{source.name}:{moment}"
                    if f"{name}_codes" not in self._names[file]:
                        return None
                    part, part_scales = self._coded(name, file, source, first, last)
                    codes[piece.offset + first - piece.start : piece.offset + last - piece.start] = part
                    begins = first // BLOCK - piece.start // BLOCK
                    known = scales[-1][begins : begins + part_scales.numel()]
                    if (~known.isnan() & (known != part_scales)).any():
                        return None
                    known.copy_(part_scales)
            fields |= {moment: codes, f"{moment}_scales": torch.cat(scales)}
        return fields

    def _codes_of_bitsandbytes(self, key: PartitionKey, pieces: list[Piece], numel: int) -> Fields | None:
        """Codes and scales where the same elements of the same parameters made up one partition in the same order."""
        identity = {"names": list(key), "numel": numel, "pieces": _as_lists(pieces)}
        for file, partitions in self._partitions.items():
            for index, partition in enumerate(partitions):
                if identity.items() <= partition.items():
                    prefix = f"{index}:"
                    names = [name for name in self._names[file] if name.startswith(prefix)]
                    return {name.removeprefix(prefix): self._files[file].get_tensor(name) for name in names}
        return None

    def _factored(self, pieces: list[Piece]) -> Fields:
        """Factored moments of the rows that the pieces touch; several files have the same of a row that was cut."""
        widths, by_field = [], {name: [torch.zeros(0)] for name in factored.FIELDS}
        for piece in pieces:
            file, *_ = self._sources[piece.name][0]
            of_matrix = {
                name: self._files[file].get_tensor(f"{piece.name}:{name}") for name in ("column_sq", "mean_sq")
            }
            width = of_matrix["column_sq"].numel()
            widths.append(width)
            begins = piece.start // width
            rows = torch.full((num_rows(piece.start, piece.length, width),), torch.nan)
            for file, _, source, first, last in self._parts_of(piece):
                low, high, at = first // width, -(-last // width), source.start // width
                part = self._files[file].get_slice(f"{piece.name}:row_sq")[low - at : high - at]
                rows[low - begins : high - begins] = part
            assert not rows.isnan().any(), f"rows of {piece.name} are not in the files"
            for name, value in {"row_sq": rows, **of_matrix}.items():
                by_field[name].append(value)
        return {factored.WIDTHS: tuple(widths)} | {name: torch.cat(values) for name, values in by_field.items()}


def _dequantize(files: dict[int, Any], moment: str, file: int, index: int) -> torch.Tensor:
    return dequantize(*(files[file].get_tensor(f"{index}:{field}") for field in BITSANDBYTES[moment]))
