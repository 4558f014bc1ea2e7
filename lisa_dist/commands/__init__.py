"""The verbs of `lisa-dist`: each module parses its words, calls the library and prints."""

import contextlib
from collections.abc import Iterator

from lisa_dist.errors import UserError


@contextlib.contextmanager
def exit_on_error(name: str, *others: type[Exception]) -> Iterator[None]:
    """Print a UserError, or one of the `others`, as one line that begins with `name`, and exit with status 2."""
    errors: tuple[type[Exception], ...] = (UserError, *others)
    try:
        yield
    except errors as error:
        print(f"{name}: {error}", flush=True)
        raise SystemExit(2) from error
