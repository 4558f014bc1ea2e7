"""Shapes of JSON: what a file that was written here must hold, so that a damaged or a foreign one is found out."""

import json
from typing import Any, NamedTuple

_LARGEST = 1e13  # of what is counted or measured in a run; more cannot be drawn, or written as a time
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}


def number(value: object) -> str | None:
    """A number that a run can have; says what else a value is."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST  # nan is not
    return None if is_one else "is no number, or far too large"


def count(value: object) -> str | None:
    """A number of things, of steps for instance."""
    is_one = isinstance(value, int) and number(value) is None and value >= 0
    return None if is_one else "is no whole number from 0"


class Each(NamedTuple):
    """The shape of every value of an object, whatever its keys."""

    shape: Any


def misfit(value: Any, shape: Any, name: str = "it") -> str | None:
    """Where a JSON value is not of a shape, in words; None where it is.

    A shape is a type; a function that says what is wrong; `[shape]`, a list of such; `{key: shape}`, an object with
    these keys among others, of which `"key?"` may be missing or null; or `Each(shape)`.
    """
    if isinstance(shape, type):
        return None if isinstance(value, shape) else f"{name} is not {_KINDS[shape]}: {_show(value)}"
    if isinstance(shape, list):
        found = misfit(value, list, name)
        parts = [] if found else [(f"{name}[{at}]", one, shape[0]) for at, one in enumerate(value)]
    elif isinstance(shape, dict | Each):
        found = misfit(value, dict, name)
        parts = [] if found else _parts(value, shape, name)
    else:
        found = shape(value)
        return found and f"{name} {found}: {_show(value)}"
    return found or next(filter(None, (misfit(one, of, where) for where, one, of in parts)), None)


def _show(value: object) -> str:
    return json.dumps(value)[:60]  # in ASCII, whatever is in it


def _parts(value: dict[str, Any], shapes: dict[str, Any] | Each, name: str) -> list[tuple[str, Any, Any]]:
    """The parts of an object that have a shape: how each is called, the part, and its shape."""
    below = "" if name == "it" else f"{name}."
    if isinstance(shapes, Each):
        return [(f"{below}{_show(key)[1:-1]}", one, shapes.shape) for key, one in value.items()]
    parts = [(key.removesuffix("?"), of) for key, of in shapes.items()]
    optional = {key.removesuffix("?") for key in shapes if key.endswith("?")}
    return [
        (f"{below}{key}", value.get(key), of) for key, of in parts if key not in optional or value.get(key) is not None
    ]
