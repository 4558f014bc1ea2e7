"""Models by name: those whose config comes with the package, folders, and those of the hub."""

import difflib
import json
from importlib import resources
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from lisa_dist.errors import UserError

# Where the weights of the shipped configs are.
HUB_IDS = {
    "gemma2-9b": "google/gemma-2-9b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
}
_TUNED = ("-instruct", "-chat", "-it", "-chat-hf", "-hf")  # ends of names of the same sizes


def shipped_model_configs() -> list[str]:
    """Names of the model configs that come with the package, such as llama3.1-8b."""
    folder = resources.files("lisa_dist") / "model_configs"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def shipped_name(model: str) -> str | None:
    """The shipped name of a model that is called by it or by its id on the hub, of a tuned one too; None of others."""
    if model in shipped_model_configs():
        return model
    for end in ("", *_TUNED):
        for name, hub_id in HUB_IDS.items():
            plain = hub_id.lower().removesuffix("-hf")
            if "/" in model and model.lower() in (hub_id.lower(), plain + end):
                return name
    return None


def name_or_folder(model: str) -> str:
    """What `--model_name_or_path` is for a `--model` of a plan."""
    path = Path(model)
    if path.exists():
        return str(path.parent if path.is_file() else path)
    return HUB_IDS.get(model, model)


def load_model_config(model: str) -> PretrainedConfig:
    """The config of a shipped name, a folder, a config.json, or a model of the hub.

    The hub is not asked for models whose config is shipped. Raises UserError, with the nearest shipped name, where
    there is none.
    """
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
    known = {name: name for name in HUB_IDS} | {hub_id.lower(): hub_id for hub_id in HUB_IDS.values()}
    nearest = [known[one] for one in difflib.get_close_matches(model.lower(), known, n=1)]
    if nearest and "/" not in model and not Path(model).exists():
        raise UserError(f"--model {model}: no such folder, and no shipped name; did you mean {nearest[0]}?")
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        meant = f"Did you mean {nearest[0]}? " if nearest else ""
        raise UserError(
            f"--model {model}: no such folder, and no such model can be reached on the hub "
            f"({type(error).__name__}). {meant}Give the path of its config.json, or one of the shipped names: "
            f"{', '.join(shipped_model_configs())}."
        ) from error
