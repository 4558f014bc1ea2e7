"""Gradient checkpointing by number of layers: how many of them store their inputs alone and run a second time.

What a layer stores is computed again in the backward pass, which costs a forward pass of it: pure loss where memory is
left. So it is done for a number of layers: the lowest ones, whose activations live longest.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lisa_dist.core.blocks import Blocks
from lisa_dist.errors import UserError
from lisa_dist.patches import patched
from lisa_dist.text import parse_bytes

AUTO = "auto"
TILE = 16_384  # tokens of an MLP's tile: more make no matrix product faster


def parse_checkpointed_layers(value: str | int | None) -> int | str | None:
    """`--checkpointed_layers`: a number of layers, "none", "all" (given back as it is) or "auto"; None if not given."""
    text = str(value).lower()
    if value is None or text in ("all", AUTO):
        return None if value is None else text
    if text == "none":
        return 0
    if not text.isdecimal():
        raise UserError(f"--checkpointed_layers {value}: give none, all, auto or a number of decoder layers.")
    return int(text)


def parse_budget(gpu_memory: str | None, is_kept_to: bool) -> int | None:
    """Bytes of `--gpu_memory`; ValueError where nothing keeps to it."""
    if gpu_memory is None:
        return None
    budget = parse_bytes("--gpu_memory", gpu_memory)
    if not is_kept_to:
        raise UserError(
            f"--gpu_memory {gpu_memory}: only --checkpointed_layers auto and --lisa_activated_layers auto keep to it; "
            "give one of them too."
        )
    return budget


def number_of_layers(value: int | str, num_layers: int) -> int:
    """The number that "all" or a number stands for in a model of `num_layers`; ValueError when it has fewer."""
    count = num_layers if value == "all" else int(value)
    if count > num_layers:
        raise UserError(f"--checkpointed_layers {value}: the model has {num_layers} decoder layers.")
    return count


def checkpoint_layers(model: Any, blocks: Blocks, count: int) -> None:
    """Have the lowest `count` decoder layers checkpointed and no other; UserError for layers that cannot be."""
    layers: list[Any] = list(model.get_submodule(blocks.layers_path).children())
    if not count:
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of its other name
                model.gradient_checkpointing_disable()
        return
    one_by_one = all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)
    if not one_by_one and count != len(layers):
        raise UserError(
            f"--checkpointed_layers {count}: the layers of {type(model).__name__} cannot be checkpointed one by "
            "one; give none or all."
        )
    if not one_by_one or any(_may_be_reentrant(layer) for layer in layers):  # as layers are that were switched off
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            name = type(model).__name__
            raise UserError(f"--checkpointed_layers: {name} has no checkpointing ({error}).") from error
        let_backward_end(model)
    for number, layer in enumerate(layers if one_by_one else ()):
        layer.gradient_checkpointing = number < count


def tile_mlps(model: Any, blocks: Blocks) -> contextlib.ExitStack:
    """Have MLPs of checkpointed layers take long rows in tiles, each checkpointed again by itself, until it is closed.

    What an MLP stores while its layer runs backward, several times its input, is then that of a tile. Mixtures count
    the tokens of each expert over a whole row, and take it whole.
    """
    tiled = contextlib.ExitStack()
    for layer in model.get_submodule(blocks.layers_path).children():
        mlp: Any = getattr(layer, "mlp", None)
        if mlp is not None and not hasattr(mlp, "experts") and isinstance(layer, GradientCheckpointingLayer):
            forward = functools.partial(_forward_in_tiles, layer, mlp.forward)
            tiled.enter_context(patched(mlp, "forward", forward, of="tiles_of_mlp"))
    return tiled


def _forward_in_tiles(layer: Any, forward: Callable[..., Any], rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """An MLP's of [rows, tokens, size]."""
    is_stored = layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
    if args or kwargs or not is_stored or rows.ndim != 3 or rows.shape[1] <= TILE:
        return forward(rows, *args, **kwargs)
    tiles = rows.split(TILE, dim=1)
    return torch.cat([torch.utils.checkpoint.checkpoint(forward, tile, use_reentrant=False) for tile in tiles], dim=1)


def check_checkpointing(model: torch.nn.Module) -> None:
    """Raise UserError where layers are checkpointed by the reentrant way.

    It runs a layer's backward pass only if its input requires a gradient: above inactive blocks nothing would train.
    """
    for module in model.modules():
        is_on = hasattr(module, "_gradient_checkpointing_func") and module.gradient_checkpointing
        if is_on and _may_be_reentrant(module):
            raise UserError(
                "the model's gradient checkpointing is reentrant, which gives no gradients where the blocks before a "
                'layer are inactive: call gradient_checkpointing_enable({"use_reentrant": False}).'
            )


def _may_be_reentrant(module: Any) -> bool:
    """Whether a module has no function to be checkpointed by, or torch's, not told to be other than reentrant."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", torch.utils.checkpoint.checkpoint)
    is_torch_s = getattr(checkpoint, "func", checkpoint) is torch.utils.checkpoint.checkpoint
    return is_torch_s and getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False


class Checkpointing:
    """Whether a model's checkpointing has been turned on or off, without a look at all of its modules."""

    def __init__(self, model: torch.nn.Module):
        self._module: Any = next((one for one in model.modules() if hasattr(one, "gradient_checkpointing")), None)
        self._seen: object = None

    def has_changed(self) -> bool:
        """Whether it was turned on or off since the last call; True for the first one.

        Each time that it is turned on transformers gives all modules that have it another function to do it by.
        """
        seen, now = self._seen, getattr(self._module, "_gradient_checkpointing_func", None)
        self._seen = now, getattr(self._module, "gradient_checkpointing", None)
        return self._seen != seen


def let_backward_end(model: torch.nn.Module) -> None:
    """Let the backward pass end at the lowest block that trains, where transformers has sent it on to the embeddings.

    With checkpointing it has their output require gradients, frozen or not, for the sake of reentrant checkpointing:
    every layer would then store its input and be run backward.
    """
    for module in model.modules():
        for handle, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "make_inputs_require_grads":
                del module._forward_hooks[handle]


def checkpointed_layers(model: Any, blocks: Blocks) -> int:
    """How many decoder layers are checkpointed."""
    layers: list[Any] = list(model.get_submodule(blocks.layers_path).children())
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        return len(layers) if model.is_gradient_checkpointing else 0
    return sum(layer.gradient_checkpointing for layer in layers)


def fewest_layers(peak: Callable[[int], int], num_layers: int, budget: int) -> int:
    """The fewest checkpointed layers with which `peak(count)`, in bytes, is within `budget`; all where none does."""
    low, high = 0, num_layers  # the answer is in [low, high], and the peak falls with the count, nearly in proportion
    peak_low = peak(low)
    if peak_low <= budget or low == high:
        return low
    peak_high = peak(high)
    if peak_high > budget:
        return high
    while high - low > 1:  # `low` does not fit, `high` does
        share = (peak_low - budget) / max(peak_low - peak_high, 1)
        guess = min(max(low + round(share * (high - low)), low + 1), high - 1)
        found = peak(guess)
        if found <= budget:
            high, peak_high = guess, found
        else:
            low, peak_low = guess, found
    return high
