"""Settings of LISA in the place where a plugin's program has its own, and the versions that a plugin is for."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, create_model

from lisa_dist.config import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.flags import nearest
from lisa_dist.removed import without_removed

# What a plugin's settings may hold besides LisaConfig's: keyword arguments of LisaMixin.
OF_MIXIN = ("checkpointed_layers", "gpu_memory", "hang_timeout", "save_async", "eval_frozen_bits")
NAMES = [*(field.name for field in fields(LisaConfig)), *OF_MIXIN]
# Axolotl's type of its keys, by the names that they have in a recipe; one of them is its own too, of the same meaning.
KEYS = [name for name in NAMES if name != "lisa_layers_attribute"]
LisaArgs: type[BaseModel] = create_model("LisaArgs", **dict.fromkeys(KEYS, (Any, None)))  # type: ignore[call-overload]


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """End the process, whose program would print a traceback, by the one line of an error that is for users."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"lisa_dist: {error}") from None


def check_host(name: str, versions: str) -> None:
    """Raise UserError where the program that a plugin is imported by is of another version than it is for."""
    there = version(name)
    if not SpecifierSet(versions).contains(there, prereleases=True):
        raise UserError(f"{name} {there}: lisa_dist's plugin is for {name}{versions}; install one of them.")


def arguments_of(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """LisaMixin's keyword arguments, of settings by the names of LisaConfig's fields and of its own arguments.

    Raises UserError, naming `where` they stand, for a name that there is not or a value that cannot work.
    """
    settings = without_removed(settings, f"{where}: ")
    for name in settings:
        if name not in NAMES:
            raise UserError(f"{where}: {name}: no such setting; {nearest(name, NAMES)}")
    config = {name: value for name, value in settings.items() if name not in OF_MIXIN}
    mixin = {name: value for name, value in settings.items() if name in OF_MIXIN}
    return mixin | {"lisa_config": LisaConfig(**config)}
