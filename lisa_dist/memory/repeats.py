"""Where decoder layers are alike, a traced step runs three repeats; their allocations stand for those of the others.

A stretch repeats a pattern of one layer or of a few, as where every sixth attends to all tokens. Its first and last
repeats run, since what is before and after them may differ, and one between them, the sample; layers of the others hand
on the hidden states that they get. What the sample leaves allocated in the forward pass the others would leave too, and
its events of the backward pass come once for each of them.

    repeat      0      1        2       3 ...       repeats - 1
                runs   skipped  sample  skipped ... runs
                       ^ the sample begins after this mark, and ends before the next
                                        ^
Whatever shows that layers are not alike raises LayersDifferError, and all of them run.
"""

import contextlib
import re
import types
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

LONGEST_PATTERN = 8  # layers
FEWEST_REPEATS = 5
SAMPLE = 2  # the repeat that the skipped ones are taken from; those beside it are skipped
OWN_NUMBER = re.compile(r"(^|_)(idx|index|id|number)$")  # names of a layer's own number
RECORDED = ("output_router_logits", "output_hidden_states", "output_attentions")  # of each layer, for the loss
SIMPLE = (bool, int, float, str, type(None), torch.dtype)


class LayersDifferError(Exception):
    """Layers that look alike are used in different ways."""


class Event(NamedTuple):
    """Something in a traced step: a gradient that arrives, or a place that a pass comes to.

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
    stays: Counter[str] = field(default_factory=Counter)  # what the sample leaves of its forward pass, by part

    @property
    def num_skipped(self) -> int:
        """Repeats that do not run."""
        return self.repeats - 3

    @property
    def layers_skipped(self) -> int:
        """Layers that do not run."""
        return self.num_skipped * self.period

    def numbers(self, repeat: int) -> range:
        """Numbers of the layers of a repeat."""
        start = self.start + repeat * self.period
        return range(start, start + self.period)


@dataclass(frozen=True, eq=False)
class Place:
    """A pass comes to the beginning or the end of a sample."""

    stretch: Stretch
    is_end: bool
    backward: bool


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
    types = getattr(config, "layer_types", None) or []  # by which a model may choose what it gives to a layer
    return [(_kind(number, layer, trained), types[number : number + 1]) for number, layer in enumerate(layers)]


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


class Skipping:
    """The layers of `stretches` that need not run are skipped, and it is marked where passes come to the samples.

    `held_bytes()`: what is allocated at this moment, by part.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        stretches: Sequence[Stretch],
        mark: Callable[[Any], None],
        held_bytes: Callable[[], Counter[str]],
    ) -> None:
        self._layers, self._stretches, self._mark, self._held_bytes = layers, stretches, mark, held_bytes
        self._in_forward = True
        self._begun: dict[Stretch, tuple[Counter[str], bool]] = {}  # bytes then, and whether a gradient flows
        self._ended: set[Stretch] = set()
        # No tensor is held, so that each goes when the model lets it go.
        self._inputs: dict[tuple[Stretch, int], Any] = {}  # of a layer of the pattern, beside the hidden states
        self._outputs: dict[int, weakref.ref[torch.Tensor]] = {}  # by number of the layer

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """While it lasts the layers are skipped."""
        with contextlib.ExitStack() as stack:
            for stretch in self._stretches:
                for repeat in range(stretch.repeats - 1):
                    for position, number in enumerate(stretch.numbers(repeat)):
                        if repeat in (0, SAMPLE):
                            self._watch(stretch, position, number, stack)
                        else:
                            stack.enter_context(self._skipped(stretch, position, number))
            yield

    def end_forward(self) -> None:
        """The forward pass is over; layers that run again are recomputed."""
        self._in_forward = False
        if self._ended != set(self._stretches):
            raise LayersDifferError("a sample has not run")

    def _watch(self, stretch: Stretch, position: int, number: int, stack: contextlib.ExitStack) -> None:
        def before(layer: Any, args: tuple, kwargs: dict) -> None:
            if self._in_forward:
                self._check_inputs(stretch, position, *_inputs(args, kwargs))

        def after(layer: Any, args: Any, output: Any) -> None:
            if self._in_forward:
                self._returned(number, output)

        layer = self._layers[number]
        stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(after).remove)

    @contextlib.contextmanager
    def _skipped(self, stretch: Stretch, position: int, number: int) -> Iterator[None]:
        def hand_on(*args: Any, **kwargs: Any) -> Any:
            hidden, others = _inputs(args, kwargs)
            self._check_inputs(stretch, position, hidden, others)
            if number - 1 not in self._outputs or self._outputs[number - 1]() is not hidden:
                raise LayersDifferError("something runs between the layers")
            self._returned(number, hidden)
            assert hidden is not None
            if number == stretch.numbers(SAMPLE - 1)[0]:
                self._begin(stretch, hidden)
            elif number == stretch.numbers(SAMPLE + 1)[0]:
                self._end(stretch, hidden)
            return hidden

        layer = self._layers[number]
        layer.forward = hand_on
        try:
            yield
        finally:
            del layer.forward

    def _check_inputs(self, stretch: Stretch, position: int, hidden: Any, others: Any) -> None:
        if not isinstance(hidden, torch.Tensor):
            raise LayersDifferError("hidden states are no tensor")
        seen = self._inputs.setdefault((stretch, position), _seen(others))
        if not _are_same(seen, others):
            raise LayersDifferError("layers get different inputs")

    def _returned(self, number: int, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or number in self._outputs:
            raise LayersDifferError("a layer returns more than hidden states, or runs twice")
        self._outputs[number] = weakref.ref(output)

    def _begin(self, stretch: Stretch, hidden: torch.Tensor) -> None:
        self._mark_both(stretch, hidden, is_end=False)
        self._begun[stretch] = Counter(self._held_bytes()), hidden.requires_grad

    def _end(self, stretch: Stretch, hidden: torch.Tensor) -> None:
        if stretch not in self._begun:
            raise LayersDifferError("layers run in another order")
        self._mark_both(stretch, hidden, is_end=True)
        self._ended.add(stretch)
        before, had_gradient = self._begun[stretch]
        stretch.stays = Counter(self._held_bytes())
        stretch.stays.subtract(before)
        if had_gradient != hidden.requires_grad or (not had_gradient and stretch.stays.total()):
            raise LayersDifferError("no backward pass comes to what stays")

    def _mark_both(self, stretch: Stretch, hidden: torch.Tensor, is_end: bool) -> None:
        """Mark that the forward pass is here, and have it marked when the backward pass is."""
        self._mark(Place(stretch, is_end, backward=False))
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._mark(Place(stretch, is_end, backward=True)))


def _inputs(args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """Hidden states, and what else a layer gets."""
    hidden, *others = args or (kwargs.get("hidden_states"),)
    return hidden, (others, {name: value for name, value in kwargs.items() if name != "hidden_states"})


def _seen(value: Any) -> Any:
    """What a layer gets, with references to its tensors."""
    if isinstance(value, dict):
        return {name: _seen(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_seen(one) for one in value]
    return weakref.ref(value) if isinstance(value, torch.Tensor) else value


def _are_same(seen: Any, value: Any) -> bool:
    """Whether a layer gets what another has: the same tensors, and equal values."""
    if isinstance(seen, dict) and isinstance(value, dict):
        return seen.keys() == value.keys() and all(_are_same(seen[name], value[name]) for name in seen)
    if isinstance(seen, list) and isinstance(value, list | tuple):
        return len(seen) == len(value) and all(map(_are_same, seen, value))
    if isinstance(seen, weakref.ref):
        return seen() is value
    return isinstance(seen, SIMPLE) and seen == value  # in other objects layers may leave something for each other


@dataclass(frozen=True, eq=False)
class ShortStep:
    """A step in which the layers of `stretches` that need not run have not; bytes after its forward pass, by part."""

    layers: Sequence[torch.nn.Module]
    stretches: Sequence[Stretch]
    events: Sequence[Event]
    after_forward: Counter[str]

    def moved(self, stretches: Sequence[Stretch]) -> "ShortStep":
        """The step of the same pattern in which these stretches repeat, without running it."""
        moved = dict(zip(self.stretches, stretches, strict=True))
        for ran, stretch in moved.items():
            stretch.stays = ran.stays
        numbers = zip(_running(self.layers, self.stretches), _running(self.layers, stretches), strict=True)
        parameters: dict[int, torch.nn.Parameter] = {}
        for of_ran, number in numbers:
            parameters |= _same_parameters(self.layers[of_ran], self.layers[number])

        def in_place(what: Any) -> Any:
            if isinstance(what, Place):
                return replace(what, stretch=moved[what.stretch])
            return parameters.get(id(what), what)

        events = [event._replace(what=in_place(event.what)) for event in self.events]
        return ShortStep(self.layers, stretches, events, self.after_forward)

    def all_after_forward(self) -> Counter[str]:
        """Bytes after the forward pass of a step in which all layers run."""
        total = Counter(self.after_forward)
        for stretch in self.stretches:
            total.update({part: size * stretch.num_skipped for part, size in stretch.stays.items()})
        return total


def _running(layers: Sequence[torch.nn.Module], stretches: Sequence[Stretch]) -> list[int]:
    skipped = {
        number
        for stretch in stretches
        for repeat in range(1, stretch.repeats - 1)
        if repeat != SAMPLE
        for number in stretch.numbers(repeat)
    }
    return [number for number in range(len(layers)) if number not in skipped]


def unroll(events: Sequence[Event], layers: Sequence[torch.nn.Module]) -> list[Event]:
    """The events of a step in which all layers run: gradients that arrive, and None for the others."""
    unrolled: list[Event] = []
    skipped = 0  # bytes of layers that would have run forward by now, and not backward
    at = iter(events)
    for event in at:
        place = event.what if isinstance(event.what, Place) else None
        unrolled.append(_later(event, skipped, None if place else event.what))
        if place is None or not place.is_end:
            continue
        stretch = place.stretch
        if not place.backward:
            skipped += stretch.num_skipped * stretch.stays.total()
            continue
        skipped -= stretch.num_skipped * stretch.stays.total()
        of_sample: list[Event] = []
        for one in at:
            of_sample.append(one)
            if isinstance(one.what, Place):
                break
        begins = of_sample.pop() if of_sample else event
        is_beginning = isinstance(begins.what, Place) and begins.what.stretch is stretch and not begins.what.is_end
        if not is_beginning or event.now - begins.now != stretch.stays.total():
            raise LayersDifferError("the backward pass frees something else than the forward pass has left")
        for repeat in reversed(range(1, stretch.repeats - 1)):
            parameters = _parameters_of(layers, stretch, repeat)
            if any(id(one.what) not in parameters for one in of_sample):
                raise LayersDifferError("a gradient of another layer arrives in the sample")
            beneath = skipped + (repeat - 1) * stretch.stays.total()
            unrolled += [_later(one, beneath, parameters[id(one.what)]) for one in of_sample]
            unrolled.append(_later(begins, beneath, None))
    return unrolled


def _later(event: Event, more: int, what: Any) -> Event:
    return Event(what, event.peak_before + more, event.now + more)


def _parameters_of(layers: Sequence[torch.nn.Module], stretch: Stretch, repeat: int) -> dict[int, torch.nn.Parameter]:
    """The parameters of a repeat, by the id of the sample's."""
    found: dict[int, torch.nn.Parameter] = {}
    for of_sample, number in zip(stretch.numbers(SAMPLE), stretch.numbers(repeat), strict=True):
        found |= _same_parameters(layers[of_sample], layers[number])
    return found


def _same_parameters(layer: torch.nn.Module, other: torch.nn.Module) -> dict[int, torch.nn.Parameter]:
    """The parameters of another layer, by the id of this one's."""
    return dict(zip(map(id, layer.parameters()), other.parameters(), strict=True))
