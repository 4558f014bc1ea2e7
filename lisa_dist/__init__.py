"""LISA (Layerwise Importance Sampled AdamW) on DeepSpeed: ZeRO shards the states of the active layers alone."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded at first use, so that importing the package is cheap and needs neither TRL nor a GPU.
_PUBLIC = {
    "LisaConfig": "lisa_dist.config",
    "LisaController": "lisa_dist.controller",
    "LisaMixin": "lisa_dist.trainer",
    "LisaTrainer": "lisa_dist.trainer",
    "build_optimizer": "lisa_dist.optimizer",
    "export_checkpoint": "lisa_dist.checkpoint",
    "initialize": "lisa_dist.loop",
    "load_checkpoint": "lisa_dist.checkpoint",
    "load_ds_config": "lisa_dist.ds_config",
    "save_checkpoint": "lisa_dist.checkpoint",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
