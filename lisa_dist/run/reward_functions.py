"""Reward functions of `--reward_funcs`, for TRL's GRPOTrainer: a user's, checked each time that they are called."""

import contextlib
import functools
import inspect
import math
import runpy
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trl import rewards

from lisa_dist.distributed.collectives import sharing_errors
from lisa_dist.errors import UserError
from lisa_dist.run_folder import read_object
from lisa_dist.tasks import split_reward
from lisa_dist.text import in_one_line


def load_rewards(given: Sequence[str]) -> list[Any]:
    """What GRPOTrainer takes for each word; UserError for what is no reward. Every rank calls it."""
    with sharing_errors(OSError):  # of a file that one host lacks
        loaded = [_load(word) for word in given]
    return loaded


def _load(given: str) -> Any:
    path, name = split_reward(given)
    if path is not None:
        with _naming(given):
            function = runpy.run_path(str(path), run_name=f"lisa_dist_reward_{path.stem}").get(name)
        if not callable(function):
            raise UserError(f"--reward_funcs {given}: has no function {name}.")
        return _checked(function, given)
    if Path(given).is_dir():
        config = read_object(Path(given) / "config.json")
        if not str(config.get("architectures")).endswith("ForSequenceClassification']"):
            raise UserError(f"--reward_funcs {given}: is no reward model, as --task reward makes one.")
        return given
    known = [one for one in dir(rewards) if one.endswith("_reward") and callable(getattr(rewards, one))]
    if given not in known:
        raise UserError(
            f"--reward_funcs {given}: is no .py file, no folder, and no function of trl.rewards, which has "
            f"{', '.join(known)}."
        )
    return _checked(getattr(rewards, given), given)


@contextlib.contextmanager
def _naming(given: str) -> Iterator[None]:
    """An error of a user's code, whichever it is, becomes a UserError that names its file and line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"raised {type(error).__name__}: {in_one_line(error)} ({last.filename}, line {last.lineno})"
        raise UserError(f"--reward_funcs {given}: {said}.") from error


def _checked(function: Callable[..., Any], given: str) -> Callable[..., Any]:
    """The function, whose rewards must be numbers, one for each completion.

    All ranks call it, and fail as one; one that is awaited runs beside others, and fails alone.
    """
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, completions: Sequence[Any], **columns: Any) -> list[float | None]:
            with _naming(given):
                return _numbers(await function(*args, completions=completions, **columns), given, len(completions))

        return awaited

    @functools.wraps(function)
    def called(*args: Any, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        with sharing_errors(), _naming(given):
            numbers = _numbers(function(*args, completions=completions, **columns), given, len(completions))
        return numbers

    return called


def _numbers(found: Any, given: str, count: int) -> list[float | None]:
    """What a function returned, a list, an array or a tensor, as numbers."""
    rewards = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        there = f"{len(rewards)} rewards" if isinstance(rewards, list | tuple) else f"a {type(found).__name__}"
        raise UserError(f"--reward_funcs {given}: returned {there} for {count} completions.")
    rewards = [one.item() if hasattr(one, "item") else one for one in rewards]
    for number, reward in enumerate(rewards, start=1):
        if reward is not None and not (isinstance(reward, int | float) and math.isfinite(reward)):
            raise UserError(
                f"--reward_funcs {given}: returned {in_one_line(reward)} for completion {number}; a reward is a finite "
                "number, or None where there is none."
            )
    return rewards
