"""The errors that are for users: their message is all that is printed."""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

_FLAG = re.compile(r"(?<![\w-])--([a-z]\w*)(?![-\w])")
_names_flags = False


@functools.cache
def _settings() -> frozenset[str]:
    """The names of all flags: those of torchrun and of other programs stay flags in Python too."""
    tables = Path(__file__).with_name("flag_tables.jsonl").read_text(encoding="utf-8")
    return frozenset(re.findall(r'"dest": "(\w+)"', tables))


class UserError(ValueError):
    """A setting or a file of the user's that cannot work: the message names it, the rule and the way out.

    It is written with flags, `--lisa_sampler x`; where no command line is being run it names arguments, `lisa_sampler`.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if _names_flags:
            return text
        return _FLAG.sub(
            lambda found: found[1] if found[1].startswith("lisa_") or found[1] in _settings() else found[0], text
        )


class SharedError(UserError):
    """An error that all ranks raise together: rank 0 alone prints it."""


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """A command line is being run: errors name settings as it does."""
    global _names_flags
    before, _names_flags = _names_flags, True
    try:
        yield
    finally:
        _names_flags = before
