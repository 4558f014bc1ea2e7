"""What a rule of a key is, and rules that every tool has use for."""

from collections.abc import Callable, Mapping
from typing import Any

Given = Mapping[str, Any]
Flags = dict[str, Any]


class NoCounterpart(Exception):  # noqa: N818 - not an error: a remark in the recipe
    """A key, or a value of one, that is nothing here or not all; the text says what to do, `flags` is what there is."""

    def __init__(self, text: str, flags: Flags | None = None):
        super().__init__(text)
        self.flags = flags or {}


# A name of ours, for the same value; a function of the value and of all that was given; a text in parentheses, why the
# key may go; or any other text, what to do about it.
Rule = str | Callable[[Any, Given], Flags]


def nothing_but(value_there: Any, instead: str) -> Rule:
    """Nothing where it is `value_there`, or says nothing; else a remark."""

    def rule(value: Any, given: Given) -> Flags:
        if not value or value == value_there:
            return {}
        raise NoCounterpart(instead)

    return rule


def true_is(name: str, value: Any = True) -> Rule:
    """A flag of a value, where the key is true."""
    return lambda given_value, given: {name: value} if given_value else {}


def boolean(name: str) -> Rule:
    """What may be auto, which is the default here."""
    return lambda value, given: {} if value in (None, "auto", "None") else {name: bool(value)}


def unless_zero(name: str) -> Rule:
    """A flag, where it is more than nothing."""
    return lambda value, given: {name: value} if value else {}


def names_of(value: Any) -> list[str]:
    """One name, several with commas between them, or a list."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)


def alike(names: list[str], of_each: list[Flags]) -> Flags:
    """The datasets of these names, when what is said of one holds for all."""
    if any(found != of_each[0] for found in of_each):
        raise NoCounterpart("its datasets differ in format, columns, split or config, and here all have the same")
    return {"dataset_name": names} | of_each[0]
