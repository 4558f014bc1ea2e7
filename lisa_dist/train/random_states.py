"""Python's, numpy's and torch's random states, kept while something runs that a resumed run does not run again."""

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Afterwards random numbers go on as if nothing had drawn any."""
    cuda = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=cuda):
        yield
    random.setstate(python_state)
    numpy.random.set_state(numpy_state)
