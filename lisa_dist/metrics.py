"""What a run tells of LISA: tracker metrics and the header at its start."""

from collections.abc import Sequence

GIB = 2**30
MIB = 2**20


def lisa_metrics(record, visit_counts: Sequence[int]) -> dict[str, float]:
    """Scalars for the trackers: the last period's record (seconds, bytes) and how often each layer was drawn."""
    metrics = {
        "lisa/period": record.period,
        "lisa/switch_seconds": record.seconds,
        "lisa/state_bytes_per_rank": record.state_bytes_per_rank,
        "lisa/bytes_released": record.bytes_released,
        "lisa/live_bytes": record.live_bytes,
    }
    return metrics | {f"lisa/visits/layer_{layer:02d}": count for layer, count in enumerate(visit_counts)}


def format_bytes(count: int) -> str:
    """Bytes for people: 1.5 GiB, 12.3 MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def format_count(count: int) -> str:
    """Parameters for people: 1.24 B, 134.5 M, 960."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.2f} M" if count >= 1e5 else str(count)


def format_table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, the first as wide as its longest entry."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
