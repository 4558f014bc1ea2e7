"""LISA (Layerwise Importance Sampled AdamW) on DeepSpeed: ZeRO shards the states of the active layers alone.

    a trainer    LisaTrainer, which is TRL's SFTTrainer; LisaMixin, for other trainers; LisaConfig, LISA's settings
    own loop     initialize, LisaController, build_optimizer, LisaAdamW, load_ds_config
    checkpoints  save_checkpoint, finish_save, load_checkpoint, export_checkpoint
    layers       LayerNorms, which logs their norms; register_sampler, which adds a sampler of them

`lisa-dist --help` lists what the command line does.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lisa_dist import definitions

if TYPE_CHECKING:
    from lisa_dist.checkpoint.export import export_checkpoint as export_checkpoint
    from lisa_dist.checkpoint.resume import load_checkpoint as load_checkpoint
    from lisa_dist.checkpoint.save import finish_save as finish_save
    from lisa_dist.checkpoint.save import save_checkpoint as save_checkpoint
    from lisa_dist.config import LisaConfig as LisaConfig
    from lisa_dist.core.controller import LisaController as LisaController
    from lisa_dist.core.initialize import initialize as initialize
    from lisa_dist.core.sampling import register_sampler as register_sampler
    from lisa_dist.ds_config import load_ds_config as load_ds_config
    from lisa_dist.optim.adamw import LisaAdamW as LisaAdamW
    from lisa_dist.optim.build import build_optimizer as build_optimizer
    from lisa_dist.train.layer_norms import LayerNorms as LayerNorms
    from lisa_dist.train.sft_trainer import LisaTrainer as LisaTrainer
    from lisa_dist.train.trainer import LisaMixin as LisaMixin

__version__ = "0.2.0"

# It warns of a CPU kernel for 4-bit weights, which nothing here has, where PyPI's package `kernels` is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Loaded at first use, from where type checkers have them: importing the package is cheap, and a name loads TRL only
# where it needs it.
_FOUND = {name: found[0] for name, found in definitions.bindings(__name__).items() if isinstance(found, tuple)}
_PUBLIC = {name: module for name, module in sorted(_FOUND.items()) if module.startswith("lisa_dist.")}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
