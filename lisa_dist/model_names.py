"""Models by name: those whose config comes with the package, their ids on the hub, and what can only be a path."""

import difflib
from importlib import resources
from pathlib import Path

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
    asked = model.lower().replace("/meta-llama-3", "/llama-3")  # as Llama 3.1 was called at first
    for end in ("", *_TUNED):
        for name, hub_id in HUB_IDS.items():
            plain = hub_id.lower().removesuffix("-hf")
            if "/" in asked and asked in (hub_id.lower(), plain + end):
                return name
    return None


def nearest_name(model: str) -> str | None:
    """The shipped name, or its id on the hub, that is most like a name; None where none is like it."""
    known = {name: name for name in HUB_IDS} | {hub_id.lower(): hub_id for hub_id in HUB_IDS.values()}
    return next((known[one] for one in difflib.get_close_matches(model.lower(), known, n=1)), None)


def name_or_folder(model: str) -> str:
    """What `--model_name_or_path` is for a `--model` of a plan."""
    path = Path(model)
    if path.exists():
        return str(path.parent if path.is_file() else path)
    return HUB_IDS.get(model, model)


def is_path(name: str) -> bool:
    """Whether a model's name can be no id of the hub: of 96 characters and a slash at most, and that at no end."""
    return name.startswith((".", "/", "~")) or name.endswith(("/", ".json")) or name.count("/") > 1 or len(name) > 96
