"""The config of a model by its name: of those that come with the package, of folders, and of those of the hub."""

import json
import sys
from importlib import resources
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from lisa_dist.core.blocks import why_not_trained
from lisa_dist.errors import UserError
from lisa_dist.model_names import nearest_name, shipped_model_configs, shipped_name
from lisa_dist.tasks import REWARD
from lisa_dist.text import no_such_model


def load_model_config(model: str) -> PretrainedConfig:
    """The config of a shipped name, a folder, a config.json, or a model of the hub.

    The hub is not asked for models whose config is shipped. Raises UserError, with the nearest shipped name, where
    there is none, and for a model that LISA cannot train.
    """
    config = _find_config(model)
    if (why := why_not_trained(config, REWARD)) is not None:
        raise UserError(f"--model {model}: {why}.")
    return config


def _find_config(model: str) -> PretrainedConfig:
    path = Path(model)
    name = None if path.exists() else shipped_name(model)
    if name is not None:
        text = (resources.files("lisa_dist") / "model_configs" / f"{name}.json").read_text(encoding="utf-8")
    elif path.is_file():
        text = None
    else:
        return _of_folder_or_hub(model)
    try:
        return AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8") if text is None else text))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"--model {model}: is no model's config.json ({error}).") from error


def _of_folder_or_hub(model: str) -> PretrainedConfig:
    is_here = Path(model).exists()
    nearest = None if is_here else nearest_name(model)
    if nearest and "/" not in model:
        raise UserError(f"--model {model}: no such folder, and no shipped name; did you mean {nearest}?")
    if nearest:  # the hub may take its time to answer
        print(f"asking the hub for {model}; a shipped name like it is {nearest}", file=sys.stderr, flush=True)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        meant = f"Did you mean {nearest}? " if nearest else ""
        raise UserError(
            f"{no_such_model(f'--model {model}', error)} {meant}Give the path of its config.json, or one of the "
            f"shipped names: {', '.join(shipped_model_configs())}."
        ) from error
