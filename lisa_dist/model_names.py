"""Models by name: those whose config comes with the package, their ids on the hub, and what can only be a path."""

import difflib
from importlib import resources
from pathlib import Path

# Where the weights of the shipped configs are.
HUB_IDS = {
    "gemma2-9b": "google/gemma-2-9b",
    "gemma3-1b": "google/gemma-3-1b-pt",
    "gemma3-4b": "google/gemma-3-4b-pt",
    "gemma3-12b": "google/gemma-3-12b-pt",
    "gemma3-27b": "google/gemma-3-27b-pt",
    "glm-4-9b": "zai-org/GLM-4-9B-0414",
    "glm-4.5-air": "zai-org/GLM-4.5-Air",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama3.1-405b": "meta-llama/Llama-3.1-405B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-small-24b": "mistralai/Mistral-Small-24B-Base-2501",
    "phi-4": "microsoft/phi-4",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
}
_TUNED_FAMILIES = ("qwen3-", "gpt-oss-", "glm-4", "phi-4", "smollm3-")  # whose plain name is the tuned model's
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
    for end in ("", "-base", *_TUNED):
        for name, hub_id in HUB_IDS.items():
            plain = hub_id.lower().removesuffix("-hf").removesuffix("-pt")
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


def is_tuned(model: str) -> bool:
    """Whether a model's name, a shipped one or its own, says that it follows instructions already."""
    path = Path(HUB_IDS.get(model, model)).absolute()
    name = (path.parent if path.name == "config.json" else path).name.lower()
    is_named = any(word in name for word in ("-instruct", "-chat")) or name.endswith("-it")
    return "-base" not in name and (is_named or name.startswith(_TUNED_FAMILIES))


def is_path(name: str) -> bool:
    """Whether a model's name can be no id of the hub: of 96 characters and a slash at most, and that at no end."""
    return name.startswith((".", "/", "~")) or name.endswith(("/", ".json")) or name.count("/") > 1 or len(name) > 96
