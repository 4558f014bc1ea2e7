"""Numbers, sizes and tables as text, and sizes read from it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lisa_dist.errors import UserError

GIB = 2**30
MIB = 2**20
BYTE_UNITS = ((GIB, "GiB"), (MIB, "MiB"), (2**10, "KiB"))
_LONGEST = 1000  # characters of a message
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def in_one_line(text: object) -> str:
    """A value or another library's message without line breaks, and without an end that nobody reads."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def no_such_model(given: str, error: Exception) -> str:
    """What is said where a name, after its flag, leads to no model, by what transformers said of it."""
    if "gated repo" in str(error).lower():
        return f"{given}: is gated: accept its licence on its page of the hub, then log in with `hf auth login`."
    return f"{given}: no such folder, and no such model can be reached on the hub ({type(error).__name__})."


def split_names(given: str | Sequence[str] | None) -> list[str] | None:
    """Return the names in a flag's words, which commas may separate too; None where the flag is left out."""
    words = [given] if isinstance(given, str) else given or []
    return [name for word in words for name in word.split(",") if name] or None


def format_active(layers: Sequence[str], blocks: Sequence[str]) -> str:
    """What trains in a period next to the always-trained blocks: "2, 7" or "head; layers 7"."""
    listed = ", ".join(layers) or ("" if blocks else "none")
    return "; ".join([*blocks, *([f"layers {listed}"] if listed else [])]) if blocks else listed


def format_bytes(count: int) -> str:
    """Bytes for people: 1.5 GiB, 12.3 MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def parse_bytes(flag: str, value: str) -> int:
    """Bytes of "24GiB", "80GB", "80G" or "123"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", value.lower())
    if match is None or match[2] not in _UNITS:
        raise UserError(f"{flag} {value}: not a size, such as 24GiB or 80GB.")
    if not match[2] and 0 < float(match[1]) < MIB:
        raise UserError(f"{flag} {value}: of bytes that is next to nothing; give a unit, as in {value.strip()}GiB.")
    return int(float(match[1]) * _UNITS[match[2]])


def format_count(count: int) -> str:
    """Parameters for people: 1.24 B, 134.5 M, 960."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.2f} M" if count >= 1e5 else str(count)


def format_rate(rate: float, digits: int = 7) -> str:
    """Return a learning rate with at most so many digits: 2e-05, 2.3e-04."""
    mantissa, exponent = f"{rate:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def format_columns(lines: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line) for line in padded)


def format_table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, the first as wide as its longest entry."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def format_by_block(flag: str, value: str, given: Mapping[str, float | str]) -> str:
    """The one way of writing what `value` says by block, which is `given`; UserError where a block is named twice."""
    if value.count("=") > len(given):
        raise UserError(f"{flag} {value}: a block is named twice.")
    return ",".join(f"{block}={one if isinstance(one, str) else f'{one:.12g}'}" for block, one in sorted(given.items()))


def parse_by_block(flag: str, value: str, blocks: Sequence[str], words: Sequence[str] = ()) -> dict[str, Any]:
    """What `block=number,...` says, for a flag that takes it; in the place of a number may be one of `words`."""
    given: dict[str, float | str] = {}
    for part in (part.strip() for part in value.split(",")):
        if not part:
            continue
        block, _, number = (text.strip() for text in part.partition("="))
        if block not in blocks:
            raise UserError(f"{flag} {value}: unknown block {block!r}; choose from {', '.join(blocks)}.")
        try:
            given[block] = number if number in words else float(number)
        except ValueError:
            raise UserError(f"{flag} {value}: {part!r} is no block={'|'.join(('number', *words))}.") from None
    return given


def parse_blocks(flag: str, value: str, blocks: Sequence[str]) -> tuple[str, ...]:
    """The blocks that a flag lists, in the order of `blocks`; UserError for one that is not among them."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in blocks]
    if unknown:
        raise UserError(f"{flag} {value}: unknown block {unknown[0]!r}; choose from {', '.join(blocks)}.")
    return tuple(block for block in blocks if block in names)
