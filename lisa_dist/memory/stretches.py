"""Stretches of decoder layers that are alike: modules, settings and shapes are the same, and which parameters train."""

import re
import types
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

LONGEST_PATTERN = 8  # layers
FEWEST_REPEATS = 5
OWN_NUMBER = re.compile(r"(^|_)(idx|index|id|number)$")  # names of a layer's own number
RECORDED = ("output_router_logits", "output_hidden_states", "output_attentions")  # of each layer, for the loss
SIMPLE = (bool, int, float, str, type(None), torch.dtype)


@dataclass(eq=False)
class Stretch:
    """Repeats of a pattern of `period` layers, from layer `start` on."""

    start: int
    period: int
    repeats: int
    stays: Counter[str] = field(default_factory=Counter)  # what the sample leaves of its forward pass, by part

    @property
    def num_skipped(self) -> int:
        """Repeats that do not run."""
        return self.repeats - 3

    @property
    def layers_skipped(self) -> int:
        """Layers that do not run."""
        return self.num_skipped * self.period

    def positions(self) -> Iterator[tuple[int, int]]:
        """Of each layer but those of the last repeat: the layer of the first repeat in its position, and its number."""
        for repeat in range(self.repeats - 1):
            yield from zip(self.numbers(0), self.numbers(repeat), strict=True)

    def numbers(self, repeat: int) -> range:
        """Numbers of the layers of a repeat."""
        start = self.start + repeat * self.period
        return range(start, start + self.period)


def stretches_of(
    layers: Sequence[torch.nn.Module], trained: Container[int], config: PretrainedConfig | None = None
) -> list[Stretch]:
    """The stretches of decoder layers of which some need not run, where parameters with ids in `trained` train."""
    if any(getattr(config, name, False) for name in RECORDED):
        return []
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        return []  # the model checkpoints them itself, and would those that are skipped
    parameters = [id(parameter) for layer in layers for parameter in layer.parameters()]
    if len(set(parameters)) < len(parameters):
        return []
    kinds = _kinds(layers, trained, config)
    found, start = [], 0
    while start < len(kinds):
        patterns = [_stretch(kinds, start, period) for period in range(1, LONGEST_PATTERN + 1)]
        longest = max(patterns, key=lambda stretch: stretch.layers_skipped)
        if longest.repeats >= FEWEST_REPEATS:
            found.append(longest)
            start += longest.period * longest.repeats
        else:
            start += 1
    return found


def _stretch(kinds: Sequence[Any], start: int, period: int) -> Stretch:
    end = start + period
    while end < len(kinds) and kinds[end] == kinds[end - period]:
        end += 1
    return Stretch(start, period, (end - start) // period)


def _kinds(layers: Sequence[torch.nn.Module], trained: Container[int], config: PretrainedConfig | None) -> list[Any]:
    by_number = [value for value in ({} if config is None else vars(config)).values() if _is_of_each(value, layers)]
    return [(_kind(number, layer, trained), [of[number] for of in by_number]) for number, layer in enumerate(layers)]


def _is_of_each(value: Any, layers: Sequence[torch.nn.Module]) -> bool:
    """Whether a setting, such as `layer_types`, has a value for each layer, to which a layer may look by its number."""
    return isinstance(value, list | tuple) and len(value) == len(layers)


def _kind(number: int, layer: torch.nn.Module, trained: Container[int]) -> Any:
    """Equal for two layers that allocate the same: of all modules the types, settings, parameters and buffers."""

    def of_module(module: torch.nn.Module) -> Any:
        settings = {name: _setting(value) for name, value in vars(module).items() if not name.startswith("_")}
        settings |= {name: "its own" for name, value in settings.items() if value == number and OWN_NUMBER.search(name)}
        shapes = [
            (name, tensor.shape, tensor.dtype, id(tensor) in trained)
            for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            for name, tensor in tensors
        ]
        return type(module), settings, shapes

    return [(name, of_module(module)) for name, module in layer.named_modules()]


def _setting(value: Any) -> Any:
    """Simple values as they are; functions and configs, equal where they are one; of other objects the type."""
    if isinstance(value, SIMPLE):
        return value
    if isinstance(value, list | tuple):
        return [_setting(one) for one in value]
    return id(value) if isinstance(value, PretrainedConfig | types.FunctionType) else type(value)


def pattern_of(
    layers: Sequence[torch.nn.Module], stretches: Sequence[Stretch], trained: Container[int], config: PretrainedConfig
) -> list[Any]:
    """Equal for two steps that differ in nothing but how often stretches repeat, and so in where layers are."""
    kinds = _kinds(layers, trained, config)
    begins = {stretch.start: stretch for stretch in stretches}
    pattern, number = [], 0
    while number < len(layers):
        stretch = begins.get(number, Stretch(number, 1, 1))
        pattern.append(([kinds[one] for one in stretch.numbers(0)], stretch.repeats > 1))
        number += stretch.period * stretch.repeats
    return pattern
