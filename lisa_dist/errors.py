"""The errors that are for users: their message is all that is printed."""

import contextlib
import re
from collections.abc import Iterator

_FLAG = re.compile(r"(?<![\w-])--([a-z]\w*)(?![-\w])")
# Those of other programs, and of the command line alone, which stay flags in Python too.
_NO_ARGUMENTS = {"cpu", "help_all", "hostfile", "master_port", "nnodes", "no_ssh", "node_rank", "nproc_per_node"}
_NO_ARGUMENTS |= {"num_gpus", "num_nodes", "serve", "tuner_type"}
_names_flags = False


class UserError(ValueError):
    """A setting or a file of the user's that cannot work: the message names it, the rule and the way out.

    It is written with flags, `--lisa_sampler x`; where no command line is being run it names arguments, `lisa_sampler`.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if _names_flags:
            return text
        return _FLAG.sub(lambda found: found[found[1] not in _NO_ARGUMENTS], text)


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
