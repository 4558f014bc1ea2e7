"""Reward functions of `--reward_funcs`, for TRL's GRPOTrainer: a user's, checked each time that they are called."""

import functools
import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl import rewards

from lisa_dist.distributed.collectives import raise_shared
from lisa_dist.errors import UserError
from lisa_dist.tasks import split_reward
from lisa_dist.text import in_one_line


def load_rewards(given: Sequence[str]) -> list[Any]:
    """What GRPOTrainer takes for each word: a function, or the folder of a reward model.

    Raises UserError for a file that cannot be run or lacks the function, and for a name that is nothing.
    """
    return [_load(word) for word in given]


def _load(given: str) -> Any:
    path, name = split_reward(given)
    if path is None:
        if Path(given).is_dir():
            return given
        function = getattr(rewards, given, None)
        if function is None:
            raise UserError(
                f"--reward_funcs {given}: is no .py file, no folder, and no name of trl.rewards, which has "
                f"{', '.join(name for name in dir(rewards) if name.endswith(('_reward', '_punishment')))}."
            )
        return function() if given.startswith("get_") else function
    function = getattr(_module_of(given, path), name, None)
    if not callable(function):
        raise UserError(f"--reward_funcs {given}: has no function {name}.")
    return _checked(function, given)


def _module_of(given: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"lisa_dist_reward_{path.stem}", path)
    assert spec is not None  # of a .py file there is one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _naming(given):
        spec.loader.exec_module(module)
    return module


class _naming:  # noqa: N801 - reads as a verb
    """An error of a user's code, whichever it is, becomes a UserError that names its file and line."""

    def __init__(self, given: str):
        self._given = given

    def __enter__(self) -> "_naming":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            raise UserError(f"--reward_funcs {self._given}: {_describe(error)}.") from error


def _describe(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {in_one_line(error)} ({last.filename}, line {last.lineno})"


def _checked(function: Callable[..., Any], given: str) -> Callable[..., Any]:
    """The function, whose rewards must be numbers, one for each completion.

    All ranks call it, and fail as one; one that is awaited runs beside others, and fails alone.
    """
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, completions: Sequence[Any], **columns: Any) -> list[float | None]:
            with _naming(given):
                found = await function(*args, completions=completions, **columns)
            return _numbers(found, given, len(completions))

        return awaited

    @functools.wraps(function)
    def called(*args: Any, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        problem, numbers = None, []
        try:
            with _naming(given):
                found = function(*args, completions=completions, **columns)
            numbers = _numbers(found, given, len(completions))
        except UserError as error:
            problem = str(error)
        raise_shared(problem)
        return numbers

    return called


def _numbers(found: Any, given: str, count: int) -> list[float | None]:
    """What a function returned, a list, an array or a tensor, as numbers."""
    if isinstance(found, str) or not hasattr(found, "__len__") or len(found) != count:
        there = f"{len(found)} rewards" if hasattr(found, "__len__") else f"a {type(found).__name__}"
        raise UserError(f"--reward_funcs {given}: returned {there} for {count} completions.")
    rewards = [one.item() if hasattr(one, "item") else one for one in found]
    for number, reward in enumerate(rewards, start=1):
        if reward is not None and not (isinstance(reward, int | float) and math.isfinite(reward)):
            raise UserError(
                f"--reward_funcs {given}: returned {in_one_line(reward)} for completion {number}; a reward is a finite "
                "number, or None where there is none."
            )
    return rewards
