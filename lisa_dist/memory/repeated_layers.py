"""Which decoder layers a traced step runs, and the events of a step of all layers from those of the ones that ran.

Layers repeat: one kind of layer, or a pattern of a few, as where every sixth attends to all tokens. A trace runs four
of many repeats, the first three and the last, since what is before and after them may differ:

    layers  a b c c c c c c c c d
    traced  a b c c c         c d

The second and the third are to have the same events, and then the third stands for all that did not run. Where they
differ LayersDifferError is raised, and all layers run.
"""

import contextlib
import functools
import types
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

LONGEST_PATTERN = 8  # layers
FEWEST_REPEATS = 5
_OWN_NUMBER = ("layer_idx", "layer_id")  # attributes that make no other kind where they are the layer's number
_RECORDED = ("output_router_logits", "output_hidden_states", "output_attentions")  # of each layer, for the loss
_SIMPLE = (bool, int, float, str, type(None), torch.dtype)


class LayersDifferError(Exception):
    """Layers that look alike are used in different ways."""


class Place(NamedTuple):
    """The forward pass comes to a layer, or the backward pass has left it."""

    layer: int  # its number among those that run
    backward: bool


class Event(NamedTuple):
    """Something in a traced step, in bytes of all allocations but the gradients that arrived before it."""

    what: Any  # the parameter whose gradient arrives, a Place, or another mark
    peak: int  # the most since the event before it
    now: int
    logits: int  # of `now`


Segments = Mapping[Place, Sequence[Event]]
END_OF_FORWARD = "end of forward"
_BEFORE, _AFTER = Place(-1, backward=False), Place(-1, backward=True)  # the layers


def find_stand_ins(kinds: Sequence[Any]) -> tuple[list[int], list[tuple[int, int]]]:
    """By number of each layer, of these kinds, the one whose events are taken for it: its own where it runs.

    Also the pairs of layers that are to have the same events.
    """
    stand_ins, start = list(range(len(kinds))), 0
    pairs: list[tuple[int, int]] = []
    while start < len(kinds):
        lengths = {period: _repeats(kinds, start, period) for period in range(1, LONGEST_PATTERN + 1)}
        period = max(lengths, key=lambda period: (lengths[period] - FEWEST_REPEATS + 1) * period)
        repeats = lengths[period]
        if repeats < FEWEST_REPEATS:
            start += 1
            continue
        pairs += [(number, number + period) for number in range(start + period, start + 2 * period)]
        for number in range(start + 3 * period, start + (repeats - 1) * period):
            stand_ins[number] = stand_ins[number - period]
        start += period * repeats
    return stand_ins, pairs


def _repeats(kinds: Sequence[Any], start: int, period: int) -> int:
    end = start + period
    while end < len(kinds) and kinds[end] == kinds[end - period]:
        end += 1
    return (end - start) // period


def kinds_of(layers: Sequence[torch.nn.Module], config: PretrainedConfig) -> list[int]:
    """Equal numbers for layers that compute the same, whatever trains in them."""
    parameters = [id(parameter) for layer in layers for parameter in layer.parameters()]
    are_recorded = any(getattr(config, name, False) for name in _RECORDED)
    are_shared = len(set(parameters)) < len(parameters)
    # Layers of another class are checkpointed by the model itself, all at once.
    if are_recorded or are_shared or not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        return list(range(len(layers)))
    of_each = _settings_of_each(config, len(layers)).values()
    kinds = [(_kind(number, layer), [values[number] for values in of_each]) for number, layer in enumerate(layers)]
    return [kinds.index(kind) for kind in kinds]


def trained_kinds(kinds: Sequence[int], layers: Sequence[Any], trained: Container[int]) -> list[Any]:
    """The kinds with which parameters, by their ids, train, and whether the layer is checkpointed."""
    return [
        (kind, getattr(layer, "gradient_checkpointing", False), tuple(id(one) in trained for one in layer.parameters()))
        for kind, layer in zip(kinds, layers, strict=True)
    ]


def _settings_of_each(config: PretrainedConfig, num_layers: int) -> dict[str, Sequence[Any]]:
    """Settings such as `layer_types` with a value for each layer, which a model may look up by a layer's number."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == num_layers
    }


def _kind(number: int, layer: torch.nn.Module) -> Any:
    """The types, settings, and shapes of parameters and buffers of all modules of a layer."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    settings = [
        (name, type(module), key, _setting(value))
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "gradient_checkpointing" and not (key in _OWN_NUMBER and value == number)
    ]
    return settings, [(name, tensor.shape, tensor.dtype) for name, tensor in tensors]


def _setting(value: Any) -> Any:
    """Simple values as they are; functions and configs, equal where they are one; of other objects the type."""
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, list | tuple):
        return [_setting(one) for one in value]
    return id(value) if isinstance(value, PretrainedConfig | types.FunctionType) else type(value)


@contextlib.contextmanager
def only_layers(
    model: torch.nn.Module, path: str, numbers: Sequence[int], config: PretrainedConfig, mark: Callable[[Any], None]
) -> Iterator[None]:
    """Have a model consist of these of its layers alone, with `mark` called at each Place."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    layers, settings = getattr(parent, name), vars(config)
    of_each = _settings_of_each(config, len(layers))
    count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    before = of_each | ({count: settings[count]} if count in settings else {})
    kept = torch.nn.ModuleList(layers[number] for number in numbers)

    def enter(number: int, layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            raise LayersDifferError("hidden states are no tensor")
        mark(Place(number, backward=False))
        if hidden.requires_grad:
            hidden.register_hook(lambda _: mark(Place(number, backward=True)))

    settings.update(dict.fromkeys(before, len(numbers)))
    settings.update({key: [values[number] for number in numbers] for key, values in of_each.items()})
    parent.register_module(name, kept)
    with contextlib.ExitStack() as stack:
        stack.callback(settings.update, before)
        stack.callback(parent.register_module, name, layers)
        for number, layer in enumerate(kept):
            hook = functools.partial(enter, number)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def segments_of(events: Sequence[Event], layers: Sequence[torch.nn.Module]) -> Segments:
    """The events of a step that ran these layers, cut where a pass comes from one layer to the next.

    Bytes of a segment are relative to those before it, and a gradient of the layer's own is the number of its
    parameter, so that a segment can stand for the same of another layer. What is before the first layer, or after the
    last, is in a segment of its own, or in that of the layer, which always runs. Raises LayersDifferError where the
    layers did not run one after the other.
    """
    last = len(layers) - 1
    places = [event.what for event in events if isinstance(event.what, Place)]
    in_order = [Place(number, backward=False) for number in range(len(layers))]
    in_order += [Place(number, backward=True) for number in range(last, last - len(places) + len(layers), -1)]
    if places != in_order:
        raise LayersDifferError("the layers do not run one after the other, each once")
    own = {
        id(parameter): (layer, number)
        for layer, module in enumerate(layers)
        for number, parameter in enumerate(module.parameters())
    }
    segments: dict[Place, list[Event]] = defaultdict(list)
    owner, base = _BEFORE, Event(None, 0, 0, 0)
    for event in events:
        layer, what = own.get(id(event.what), (owner.layer, event.what))
        if layer != owner.layer:
            raise LayersDifferError("a gradient of another layer arrives")
        segments[owner].append(Event(what, event.peak - base.now, event.now - base.now, event.logits - base.logits))
        if event.what == END_OF_FORWARD:
            owner, base = Place(last, backward=True), event
        elif isinstance(event.what, Place):
            layer, backward = event.what
            owner, base = Place(layer - backward, backward), event  # that of layer -1 is what is after them
    return segments


def events_of_all(
    segments: Segments,
    stand_ins: Sequence[int],
    pairs: Iterable[tuple[int, int]],
    layers: Sequence[torch.nn.Module],
) -> Iterator[Event]:
    """The events of a step of all `layers`; raises LayersDifferError where those of a pair are not the same."""
    ran = {number: position for position, number in enumerate(dict.fromkeys(stand_ins))}
    for pair in pairs:
        for backward in (False, True):
            one, other = (_sizes(segments.get(Place(ran[number], backward), ())) for number in pair)
            if one != other:
                raise LayersDifferError("layers that look alike allocate something else")
    forward = [(number, Place(ran[other], backward=False)) for number, other in enumerate(stand_ins)]
    backward_pass = [(number, place._replace(backward=True)) for number, place in reversed(forward)]
    now = logits = 0
    for number, place in ((0, _BEFORE), *forward, *backward_pass, (0, _AFTER)):
        start, start_logits = now, logits
        for event in segments.get(place, ()):
            is_own = isinstance(event.what, int)
            what = list(layers[number].parameters())[event.what] if is_own else event.what
            now, logits = start + event.now, start_logits + event.logits
            yield Event(what, start + event.peak, now, logits)


def _sizes(events: Iterable[Event]) -> list[Event]:
    """The events of a layer, whichever number it has."""
    return [event._replace(what=None) if isinstance(event.what, Place) else event for event in events]
