"""The modeling code of transformers without Liger's Triton kernels, which cannot run on fake tensors."""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

_cross_entropy = torch.nn.functional.cross_entropy  # before Liger can have replaced it


@contextlib.contextmanager
def without_liger() -> Iterator[None]:
    """Restore the modeling code of transformers as it is without Liger, for a model that is run on fake tensors.

    What Liger replaces in a modeling module applies to all models of that type. A Triton kernel is launched with the
    address of a fake tensor, 0, a null pointer: on a GPU that ends the process.
    """
    replaced: list[tuple[ModuleType, dict[str, Any], dict[str, Any]]] = []
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            liger_names = {key: value for key, value in vars(module).items() if _is_from_liger(value)}
            if liger_names:
                originals = _originals(name)
                replaced.append((module, liger_names, {key: originals[key] for key in liger_names}))
    functional = torch.nn.functional
    if _is_from_liger(functional.cross_entropy):
        liger_loss = {"cross_entropy": functional.cross_entropy}
        replaced.append((functional, liger_loss, {"cross_entropy": _cross_entropy}))
    try:
        for module, _, originals in replaced:
            vars(module).update(originals)
        yield
    finally:
        for module, liger_names, _ in replaced:
            vars(module).update(liger_names)


def _is_from_liger(value: object) -> bool:
    return str(getattr(value, "__module__", "")).startswith("liger_kernel.")


@functools.cache
def _originals(name: str) -> dict[str, Any]:
    """The names of a modeling module, from a second run of its code that replaces nothing."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)
