"""`--torch_compile`: each decoder layer is compiled by itself, so that no switch needs a new graph.

torch keeps compiled code by the function that it was made of, and layers of one class share it, since weights are its
inputs. So there are two graphs: of a layer whose weights require gradients and of a frozen one, whichever they are. The
Trainer would compile the whole model, whose graph is another one for every set of active layers.

More graphs follow where a layer runs in more ways: checkpointed or not, its input with a gradient or without (below the
lowest active layer, if the embedding is frozen), with a mask or without. They are compiled for all lengths at once,
since the batches of a run differ in length.
"""

import os
import shutil
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_dist.core.blocks import find_blocks
from lisa_dist.errors import UserError
from lisa_dist.optim.ops import why_no_compiler

# All of the ways above, for a few classes of layers; at torch's 8 the rest would run without compilation.
_MAX_GRAPHS = 64
_MOVED = "CUDA graphs hold the addresses of weights, which a switch moves"


def check_compile(args: TrainingArguments, ds_config: dict[str, Any], switches: bool) -> None:
    """Raise UserError where decoder layers cannot be compiled; `switches`: layers are frozen and activated, by LISA."""
    if not args.torch_compile:
        return
    backend, mode = str(args.torch_compile_backend), args.torch_compile_mode
    if (ds_config.get("zero_optimization") or {}).get("stage") == 3:
        raise UserError(
            "--torch_compile True on ZeRO stage 3: it gathers weights module by module, and a graph ends at each; use "
            "stage 1 or 2, as by --deepspeed zero2, or leave it out."
        )
    if args.use_liger_kernel:
        raise UserError(
            "--torch_compile True with --use_liger_kernel True: both fuse the norms and MLP of a layer; give one."
        )
    known = [name for name in torch.compiler.list_backends(exclude_tags=()) if name.upper() in DynamoBackend.list()]
    if backend not in known:
        raise UserError(f"--torch_compile_backend {backend}: unknown; choose one of {', '.join(known)}.")
    if switches and backend == "cudagraphs":
        raise UserError(f"--torch_compile_backend cudagraphs: {_MOVED}; use inductor.")
    if mode is not None and backend != "inductor":
        raise UserError(f"--torch_compile_mode {mode}: is for inductor, not --torch_compile_backend {backend}.")
    if backend == "inductor":
        _check_inductor(mode, args.use_cpu, switches)


def _check_inductor(mode: str | None, use_cpu: bool, switches: bool) -> None:
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise UserError(f"--torch_compile_mode {mode}: unknown; choose one of {', '.join(modes)}.")
    if switches and mode is not None and modes[mode].get("triton.cudagraphs"):
        raise UserError(f"--torch_compile_mode {mode}: {_MOVED}; use default or max-autotune-no-cudagraphs.")
    if use_cpu:
        compiler = os.environ.get("CXX", "g++")
        missing = "" if shutil.which(compiler) else f"there is no C++ compiler {compiler}: apt install g++, or set CXX"
    else:
        missing = why_no_compiler()
    if missing:
        raise UserError(f"--torch_compile True: {missing}, or leave the flag out.")


class CompiledLayers(TrainerCallback):
    """Compiles the decoder layers of a trainer's model when training begins, in the place of the model.

    `layers_attribute` is that of `find_blocks`.
    """

    def __init__(self, trainer: Trainer, layers_attribute: str | None):
        # Accelerate would compile the DeepSpeed engine's module as a whole.
        trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        self._layers_attribute = layers_attribute

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compile, which takes place in the first steps."""
        layers = model.get_submodule(find_blocks(model, self._layers_attribute).layers_path).children()
        compile_layers(layers, str(args.torch_compile_backend), args.torch_compile_mode)


def compile_layers(layers: Iterable[nn.Module], backend: str, mode: str | None) -> None:
    """Have each layer run as compiled code where gradients are computed.

    Evaluations and generations run it as it is: a generation's cache would take a graph for each layer.
    """
    config = torch._dynamo.config
    config.cache_size_limit = max(_MAX_GRAPHS, config.cache_size_limit)  # as torch 2.6 calls it, and later ones too
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
        layer._compiled_call_impl = _InTraining(layer, layer._compiled_call_impl)


class _InTraining:
    """Calls the compiled layer where gradients are computed, and the layer itself elsewhere."""

    def __init__(self, layer: nn.Module, compiled: Any):
        self._layer, self._compiled = layer, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if torch.is_grad_enabled() else self._layer._call_impl)(*args, **kwargs)
