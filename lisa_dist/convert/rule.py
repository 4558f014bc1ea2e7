"""What a rule of a key is.

A name of ours, for the same value; a function of the value and of all that was given; a text in parentheses, why the
key may go; or any other text, what to do about it.
"""

from collections.abc import Callable, Mapping
from typing import Any

Given = Mapping[str, Any]
Flags = dict[str, Any]


class NoCounterpart(Exception):  # noqa: N818 - not an error: a remark in the recipe
    """A key, or a value of one, that is nothing here; the text says what to do."""


Rule = str | Callable[[Any, Given], Flags]
