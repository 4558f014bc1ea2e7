"""Cases of a test: which of them `make test` runs too, and which `make test-all` alone."""

from typing import Any

import pytest

STAGES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def full(*values: Any, id: str | None = None):
    """A case for `make test-all` alone."""
    return pytest.param(*values, id=id, marks=pytest.mark.full)


def stages(*quick: str, among: tuple[str, ...] = STAGES) -> list:
    """A case for each DeepSpeed config; `make test` runs the quick ones."""
    assert set(quick) <= set(among)
    return [name if name in quick else full(name) for name in among]
