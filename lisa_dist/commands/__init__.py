"""The verbs of `lisa-dist`: each module parses its argv, calls the library and prints."""

import contextlib
import os
from collections.abc import Iterator

from lisa_dist.errors import SharedError, UserError, naming_flags


@contextlib.contextmanager
def exit_on_error(name: str, *others: type[Exception]) -> Iterator[None]:
    """Print a UserError, or one of the `others`, as one line that begins with `name`, and exit with status 2.

    One of several ranks says which it is; an error that all of them share is printed by rank 0 alone.
    """
    errors: tuple[type[Exception], ...] = (UserError, *others)
    try:
        with naming_flags():
            yield
    except errors as error:
        rank, shared = os.environ.get("RANK", "0"), isinstance(error, SharedError)
        if not shared and os.environ.get("WORLD_SIZE", "1") != "1":
            name += f", rank {rank}"
        if not shared or rank == "0":
            with naming_flags():
                print(f"{name}: {error}", flush=True)
        raise SystemExit(2) from error


@contextlib.contextmanager
def writing(named: str) -> Iterator[None]:
    """Raise UserError where the body cannot write the file or the folder that the user has named."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{named}: cannot be written ({error.strerror}).") from error
