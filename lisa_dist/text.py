"""What a run tells of LISA: tracker metrics and the header at its start."""

import re
from collections.abc import Sequence

from lisa_dist.errors import UserError

GIB = 2**30
MIB = 2**20
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def lisa_metrics(lisa) -> dict[str, float]:
    """Scalars of a controller for the trackers: which layers train, how often each block was drawn, what switches cost.

    Seconds and bytes are of the last period whose first step is done; update norms of the last one that has ended.
    """
    record = lisa.records[-1]
    metrics = {
        "lisa/period": lisa.period,
        "lisa/switch_seconds": record.seconds,
        "lisa/state_bytes_per_rank": record.state_bytes_per_rank,
        "lisa/bytes_released": record.bytes_released,
        "lisa/live_bytes": record.live_bytes,
        "lisa/host_bytes": record.host_bytes,
    }
    for layer, count in enumerate(lisa.visit_counts):
        metrics[f"lisa/active_layers/layer_{layer:02d}"] = int(layer in lisa.active_layers)
        metrics[f"lisa/visits/layer_{layer:02d}"] = count
    metrics |= {f"lisa/probability/layer_{layer:02d}": odds for layer, odds in enumerate(record.probabilities)}
    learned = lisa.selection.importance.averages if lisa.selection.importance is not None else []
    metrics |= {f"lisa/importance/layer_{layer:02d}": seen for layer, seen in enumerate(learned) if seen is not None}
    metrics |= {f"lisa/visits/{block}": count for block, count in lisa.block_visit_counts.items()}
    moved = lisa.movement.lines[-1]["blocks"] if lisa.movement.lines else {}
    return metrics | {f"lisa/update_norm/{_metric_name(block)}": one["update"] for block, one in moved.items()}


def _metric_name(block: str) -> str:
    """layers.7 as layer_07, for trackers to sort by."""
    kind, _, number = block.partition(".")
    return f"layer_{int(number):02d}" if number else kind


def format_active(layers: Sequence[int], blocks: Sequence[str]) -> str:
    """What trains in a period beside what is always on: "2, 7" or "head; layers 7"."""
    listed = ", ".join(map(str, layers)) or ("" if blocks else "none")
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


def format_columns(lines: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line) for line in padded)


def format_table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, the first as wide as its longest entry."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
