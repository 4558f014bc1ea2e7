"""Training arguments whose tokens are used and never written: not as a pickle, and not as text for a tracker."""

import copy
import copyreg
from typing import Any

from transformers import TrainingArguments

from lisa_dist.run_folder import hide_secrets


def hide_secrets_of(args: TrainingArguments) -> None:
    """From now on pickles and dicts of `args` have *** in place of tokens, keys and passwords, nested ones too.

    The Trainer pickles its arguments into `training_args.bin`, which `push_to_hub` uploads, and gives their dict to
    trackers. `args` itself, and copies of it, keep what they need for the hub. Pickles load as the class it was.
    """
    plain: Any = type(args)
    if not issubclass(plain, _HidesSecrets):
        args.__class__ = type(plain.__name__, (_HidesSecrets, plain), {"__module__": plain.__module__})


class _HidesSecrets:
    """Put before a class of arguments."""

    def to_dict(self) -> dict[str, Any]:
        arguments: Any = super()
        return hide_secrets(arguments.to_dict())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, plain = type(self).__bases__
        return copyreg._reconstructor, (plain, object, None), _written_state(self)  # type: ignore[attr-defined]

    def __copy__(self) -> Any:  # not by __reduce_ex__, as copies are by default
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = object.__new__(type(self))
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new


def _written_state(args: Any) -> dict[str, Any]:
    state = hide_secrets(vars(args))
    if state.get("deepspeed_plugin") is not None:  # it has DeepSpeed's config as a dict and in two objects
        plugin = state["deepspeed_plugin"] = copy.deepcopy(args.deepspeed_plugin)
        vars(plugin).update(hide_secrets(vars(plugin)))
        for held in vars(plugin).values():
            if isinstance(getattr(held, "config", None), dict):
                held.config = hide_secrets(held.config)
        state["hf_deepspeed_config"] = plugin.hf_ds_config
    return state
