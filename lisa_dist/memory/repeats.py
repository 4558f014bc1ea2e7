"""Of decoder layers that are alike, one after the other, a traced step runs three: they tell what the others allocate.

A stretch repeats a pattern of one layer or of a few, as where every sixth attends to all tokens. Its first and last
repeats run, since what is before and after them may differ, and one between them, the model; the others hand on what
they get. What the model leaves allocated in the forward pass they would leave too, and its events of the backward pass
come once for each of them.

    repeat      0      1        2      3 ...       repeats - 1
                runs   skipped  runs   skipped ... runs
                       ^ enters        ^ enters: between the two the model has run
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

LONGEST_PATTERN = 8  # layers
FEWEST_REPEATS = 5
OWN_NUMBER = re.compile(r"(^|_)(idx|index|id|number)$")  # names of a layer's own number
MODEL = 2  # the repeat that the skipped ones are taken from


class LayersDifferError(Exception):
    """Layers that look alike are given other inputs, or return something else than one tensor: all must run."""


class Event(NamedTuple):
    """Something in a traced step: a gradient that arrives, or a place where the pass gets to.

    Bytes of all allocations but the gradients before it.
    """

    what: Any
    peak_before: int  # the most since the event before it
    now: int


@dataclass(eq=False)
class Stretch:
    """Repeats of a pattern of `period` layers, from layer `start` on."""

    start: int
    period: int
    repeats: int
    # By part: what the model leaves at the end of its forward pass.
    stays: Counter[str] = field(default_factory=Counter)

    @property
    def num_skipped(self) -> int:
        """Repeats that do not run."""
        return self.repeats - 3

    def skipped_layers(self) -> Iterator[tuple[int, int]]:
        """Number of each layer that does not run, and its number in the pattern."""
        for repeat in range(self.repeats):
            if repeat not in (0, MODEL, self.repeats - 1):
                yield from ((self.start + repeat * self.period + number, number) for number in range(self.period))


@dataclass(frozen=True, eq=False)
class Place:
    """The pass comes to a model's beginning, or its end."""

    stretch: Stretch
    is_end: bool
    backward: bool


def stretches_of(layers: Sequence[torch.nn.Module], trained: Container[int]) -> list[Stretch]:
    """The stretches of decoder layers of which some need not run, where parameters with ids in `trained` train."""
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        return []  # the model checkpoints them itself, and would those that are skipped
    parameters = [id(parameter) for layer in layers for parameter in layer.parameters()]
    if len(set(parameters)) < len(parameters):
        return []
    kinds = [_kind(number, layer, trained) for number, layer in enumerate(layers)]
    found, start = [], 0
    while start < len(kinds):
        longest = max((_stretch(kinds, start, period) for period in range(1, LONGEST_PATTERN + 1)), key=_layers_skipped)
        if longest.repeats >= FEWEST_REPEATS:
            found.append(longest)
            start += longest.period * longest.repeats
        else:
            start += 1
    return found


def _layers_skipped(stretch: Stretch) -> int:
    return stretch.num_skipped * stretch.period


def _stretch(kinds: Sequence[Any], start: int, period: int) -> Stretch:
    end = start + period
    while end < len(kinds) and kinds[end] == kinds[end - period]:
        end += 1
    return Stretch(start, period, (end - start) // period)


def _kind(number: int, layer: torch.nn.Module, trained: Container[int]) -> Any:
    """What two layers have in common that allocate the same: all modules, their settings and parameters."""
    settings = (bool, int, float, str, type(None))

    def of_module(module: torch.nn.Module) -> Any:
        plain = {name: value for name, value in vars(module).items() if isinstance(value, settings)}
        plain |= {name: "its own" for name, value in plain.items() if value == number and OWN_NUMBER.search(name)}
        shapes = [
            (name, parameter.shape, parameter.dtype, id(parameter) in trained)
            for name, parameter in module.named_parameters(recurse=False)
        ]
        return type(module), plain, shapes

    return [(name, of_module(module)) for name, module in layer.named_modules()]


@contextlib.contextmanager
def skipping(
    layers: Sequence[torch.nn.Module],
    stretches: Sequence[Stretch],
    mark: Callable[[Any], None],
    held_bytes: Callable[[], Counter[str]],
) -> Iterator[None]:
    """Skip the layers of `stretches` that need not run, and mark where the passes come to the models of the others.

    `held_bytes()`: what is allocated at this moment, by part.
    """
    with contextlib.ExitStack() as stack:
        for stretch in stretches:
            _skip(layers, stretch, mark, held_bytes, stack)
        yield


def _skip(
    layers: Sequence[Any],
    stretch: Stretch,
    mark: Callable[[Any], None],
    held_bytes: Callable[[], Counter[str]],
    stack: contextlib.ExitStack,
) -> None:
    before: Counter[str] = Counter()
    inputs: dict[int, Any] = {}  # by number in the pattern: those of the layer beside the hidden states
    had_gradient: list[bool] = []
    begins = stretch.start + stretch.period
    ends = begins + 2 * stretch.period

    def hand_on(layer: int, number: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = dict(zip(("hidden_states", *range(1, len(args))), args, strict=False)) | kwargs
        hidden = given.pop("hidden_states", None)
        if hidden is None or inputs.setdefault(number, _identities(given)) != _identities(given):
            raise LayersDifferError
        if layer not in (begins, ends):
            return hidden
        is_end = layer == ends
        mark(Place(stretch, is_end, backward=False))
        had_gradient.append(hidden.requires_grad)
        if is_end:
            stretch.stays.update(held_bytes())
            stretch.stays.subtract(before)
            if had_gradient[0] != had_gradient[1]:
                raise LayersDifferError
        else:
            before.update(held_bytes())
        if hidden.requires_grad:
            hidden.register_hook(lambda _: mark(Place(stretch, is_end, backward=True)))
        return hidden

    def check(layer: Any, args: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            raise LayersDifferError

    for number in range(stretch.period):
        stack.callback(layers[stretch.start + number].register_forward_hook(check).remove)
    for layer, number in stretch.skipped_layers():
        stack.enter_context(_instead(layers[layer], layer, number, hand_on))


@contextlib.contextmanager
def _instead(layer: Any, index: int, number: int, hand_on: Callable[..., torch.Tensor]) -> Iterator[None]:
    layer.forward = lambda *args, **kwargs: hand_on(index, number, *args, **kwargs)
    try:
        yield
    finally:
        del layer.forward


def _identities(value: Any) -> Any:
    """What distinguishes inputs: which tensors they are, and the values of others."""
    if isinstance(value, dict):
        return {name: _identities(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_identities(one) for one in value]
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, bool | int | float | str | type(None)):
        return value
    raise LayersDifferError  # an object in which layers may leave something for each other


def unroll(events: Sequence[Event], layers: Sequence[torch.nn.Module]) -> list[Event]:
    """The events of a step in which all layers run: gradients that arrive, and None for the others."""
    unrolled: list[Event] = []
    skipped = 0  # bytes of the layers that would have run forward, and not backward
    at = iter(events)
    for event in at:
        place = event.what if isinstance(event.what, Place) else None
        unrolled.append(_later(event, skipped, None if place else event.what))
        if place is None or not place.is_end:
            continue
        stretch = place.stretch
        if not place.backward:
            skipped += stretch.num_skipped * stretch.stays.total()
        else:
            skipped -= stretch.num_skipped * stretch.stays.total()
            of_model = []
            for event in at:
                of_model.append(event)
                if isinstance(event.what, Place):
                    break
            for repeat in reversed(range(1, stretch.repeats - 1)):
                parameters = _parameters_of(layers, stretch, repeat)
                beneath = skipped + (repeat - 1) * stretch.stays.total()
                unrolled += [_later(one, beneath, parameters.get(id(one.what))) for one in of_model]
    return unrolled


def _later(event: Event, more: int, what: Any) -> Event:
    return Event(what, event.peak_before + more, event.now + more)


def _parameters_of(layers: Sequence[torch.nn.Module], stretch: Stretch, repeat: int) -> dict[int, torch.nn.Parameter]:
    """By the id of each parameter of the model: that of another repeat."""
    found: dict[int, torch.nn.Parameter] = {}
    for number in range(stretch.start, stretch.start + stretch.period):
        model = layers[number + MODEL * stretch.period]
        names = dict(layers[number + repeat * stretch.period].named_parameters())
        found |= {id(parameter): names[name] for name, parameter in model.named_parameters()}
    return found
