"""LISA (Layerwise Importance Sampled AdamW) on DeepSpeed: ZeRO shards the states of the active layers alone."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded at first use, so that importing the package is cheap and needs neither TRL nor a GPU.
_PUBLIC = {
    "LisaConfig": "lisa_dist.config",
    "LisaController": "lisa_dist.core.controller",
    "LisaMixin": "lisa_dist.train.trainer",
    "LisaTrainer": "lisa_dist.train.trainer",
    "build_optimizer": "lisa_dist.optim.build",
    "export_checkpoint": "lisa_dist.checkpoint.export",
    "initialize": "lisa_dist.core.initialize",
    "load_checkpoint": "lisa_dist.checkpoint.resume",
    "load_ds_config": "lisa_dist.ds_config",
    "save_checkpoint": "lisa_dist.checkpoint.save",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
