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
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from lisa_dist.memory.stretches import SIMPLE, Stretch

SAMPLE = 2  # the repeat that the skipped ones are taken from; those beside it are skipped


class LayersDifferError(Exception):
    """Layers that look alike are used in different ways."""


class Event(NamedTuple):
    """Something in a traced step: a gradient that arrives, or a place that a pass comes to.

    Bytes of all allocations but the gradients before it.
    """

    what: Any
    peak_before: int  # the most since the event before it
    now: int


@dataclass(frozen=True, eq=False)
class Place:
    """A pass comes to the beginning or the end of a sample."""

    stretch: Stretch
    is_end: bool
    backward: bool


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
        # By number of the layer: which of `_inputs` it gets; None where nothing says whether others are the same.
        self.inputs_of: dict[int, int | None] = {}
        # No tensor is held, so that each goes when the model lets it go.
        self._inputs: list[Any] = []  # that differ, beside the hidden states
        self._outputs: dict[int, weakref.ref[torch.Tensor]] = {}  # by number of the layer

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """While it lasts the layers are skipped."""
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                stack.callback(layer.register_forward_pre_hook(self._noting(number), with_kwargs=True).remove)
            for stretch in self._stretches:
                for repeat in range(stretch.repeats - 1):
                    for number in stretch.numbers(repeat):
                        if repeat in (0, SAMPLE):
                            self._watch(stretch, number, stack)
                        else:
                            stack.enter_context(self._skipped(stretch, number))
            yield

    def end_forward(self) -> None:
        """The forward pass is over; layers that run again are recomputed."""
        self._in_forward = False
        if self._ended != set(self._stretches):
            raise LayersDifferError("a sample has not run")

    def _watch(self, stretch: Stretch, number: int, stack: contextlib.ExitStack) -> None:
        def before(layer: Any, args: tuple, kwargs: dict) -> None:
            if self._in_forward:
                self._check_inputs(stretch, number, _inputs(args, kwargs)[0])

        def after(layer: Any, args: Any, output: Any) -> None:
            if self._in_forward:
                self._returned(number, output)

        layer = self._layers[number]
        stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(after).remove)

    @contextlib.contextmanager
    def _skipped(self, stretch: Stretch, number: int) -> Iterator[None]:
        def hand_on(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = _inputs(args, kwargs)
            self._check_inputs(stretch, number, hidden)
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

    def _noting(self, number: int) -> Callable[[Any, tuple, dict], None]:
        def before(layer: Any, args: tuple, kwargs: dict) -> None:
            if self._in_forward:
                self.inputs_of[number] = self._which_inputs(_inputs(args, kwargs)[1])

        return before

    def _which_inputs(self, others: Any) -> int | None:
        seen = _seen(others)
        if not _are_same(seen, others):
            return None
        for which, other in enumerate(self._inputs):
            if _are_same(other, others):
                return which
        self._inputs.append(seen)
        return len(self._inputs) - 1

    def _check_inputs(self, stretch: Stretch, number: int, hidden: Any) -> None:
        if not isinstance(hidden, torch.Tensor):
            raise LayersDifferError("hidden states are no tensor")
        first = stretch.start + (number - stretch.start) % stretch.period
        if self.inputs_of[number] is None or self.inputs_of[number] != self.inputs_of[first]:
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
class TracedStep:
    """A step that was run, of `stretches` only the repeats that must."""

    layers: Sequence[torch.nn.Module]
    stretches: Sequence[Stretch]
    events: Sequence[Event]
    after_forward: Counter[str]  # bytes after the forward pass, by part
    inputs_of: Mapping[int, int | None]  # `Skipping.inputs_of`

    def moved(self, stretches: Sequence[Stretch]) -> "TracedStep | None":
        """This step with the same pattern in other places; None where layers would get other inputs than those here."""
        numbers = list(zip(_running(self.layers, self.stretches), _running(self.layers, stretches), strict=True))
        alike = [*numbers, *((number, first) for stretch in stretches for first, number in stretch.positions())]
        inputs = [(self.inputs_of.get(number), self.inputs_of.get(other)) for number, other in alike]
        if any(one is None or one != other for one, other in inputs):
            return None
        moved = dict(zip(self.stretches, stretches, strict=True))
        for ran, stretch in moved.items():
            stretch.stays = ran.stays
        parameters: dict[int, torch.nn.Parameter] = {}
        for of_ran, number in numbers:
            parameters |= _same_parameters(self.layers[of_ran], self.layers[number])

        def in_place(what: Any) -> Any:
            if isinstance(what, Place):
                return replace(what, stretch=moved[what.stretch])
            return parameters.get(id(what), what)

        events = [event._replace(what=in_place(event.what)) for event in self.events]
        return TracedStep(self.layers, stretches, events, self.after_forward, self.inputs_of)

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
