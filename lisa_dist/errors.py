"""The errors that are for users: their message is all that is printed."""

import contextlib
import re
from collections.abc import Iterator

_FLAG = re.compile(r"(?<![\w-])--([a-z]\w*)(?![-\w])")
_names_flags = False


class UserError(ValueError):
    """A setting or a file of the user's that cannot work: the message names it, the rule and the way out.

    It is written with flags, `--lisa_sampler x`; where no command line is being run it names arguments, `lisa_sampler`.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if _names_flags else _FLAG.sub(r"\1", text)


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
