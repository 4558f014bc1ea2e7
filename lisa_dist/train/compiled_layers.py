"""`--torch_compile`: each decoder layer is compiled by itself, so that no switch needs a new graph.

torch keeps compiled code by the function that it was made of, and layers of one class share it, since weights are its
inputs. So there are two graphs: of a layer whose weights require gradients and of a frozen one. The Trainer would
compile the whole model, whose graph is another one for every set of active layers. More graphs follow where a layer
runs in more ways: checkpointed or not, its input with a gradient or without, with a mask or without.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lisa_dist.core.blocks import find_blocks
from lisa_dist.patches import patch

_MAX_GRAPHS = 64  # all of these ways, for a few classes of layers; at torch's 8 the rest would run without compilation


class CompiledLayers(TrainerCallback):
    """Compiles a trainer's decoder layers when training begins; `layers_attribute` is that of `find_blocks`."""

    def __init__(self, trainer: Trainer, layers_attribute: str | None):
        # Accelerate would compile the DeepSpeed engine's module as a whole.
        trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        self._layers_attribute = layers_attribute

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Compile, which takes place in the first steps."""
        layers = model.get_submodule(find_blocks(model, self._layers_attribute).layers_path).children()
        compile_layers(layers, str(args.torch_compile_backend), args.torch_compile_mode)


def compile_layers(layers: Iterable[nn.Module], backend: str, mode: str | None) -> None:
    """Have each layer run as compiled code where gradients are computed, for batches of all lengths.

    Evaluations and generations run it as it is: a generation's cache would take a graph for each layer.
    """
    config = torch._dynamo.config
    config.cache_size_limit = max(_MAX_GRAPHS, config.cache_size_limit)  # as torch 2.6 calls it, and later ones too
    # Where the package `kernels` is installed, it sets a context variable around each layer's forward pass. torch
    # refuses to trace that in a checkpointed layer, and would run the layer without compilation.
    if hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
        call = partial(_call, layer, layer._compiled_call_impl)
        patch(layer, "_compiled_call_impl", call, of="compiled_call")


def _call(layer: nn.Module, compiled: Any, *args: Any, **kwargs: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else layer._call_impl)(*args, **kwargs)
