"""The model that is evaluated: a folder, a checkpoint, an adapter merged into its base, or a model of the hub."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lisa_dist.errors import UserError
from lisa_dist.run_folder import ADAPTER_FILE
from lisa_dist.text import no_such_model


def load_model(
    name: str, dtype: str = "auto", device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode, and its tokenizer; an adapter is merged into its base.

    Raises UserError where no model of this name can be loaded.
    """
    adapter = _settings(name, "adapter_config.json")
    base: str = adapter.get("base_model_name_or_path", name) or ""
    if not base:
        raise UserError(f"{name}: an adapter that names no base; give the folder of a model that it is beside.")
    architecture = str((_settings(name, "config.json").get("architectures") or [""])[0])
    if architecture.endswith("ForSequenceClassification") or adapter.get("task_type") == "SEQ_CLS":
        raise UserError(f"{name}: a reward model, which scores texts and writes none; give a model that writes them.")
    try:
        # Kernels of the hub would make scores depend on whether the package `kernels` is installed.
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_kernels=False)
        tokenizer = AutoTokenizer.from_pretrained(name if (Path(name) / "tokenizer_config.json").is_file() else base)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{base}: torch refuses to load its pickled weights. The file is damaged, or contains more than tensors. "
            "Use a copy of the model with model.safetensors."
        ) from error
    except (OSError, ValueError) as error:
        what = name if base == name else f"{base}, the base of the adapter {name}"
        raise UserError(no_such_model(what, error)) from error
    beside = (Path(name) / ADAPTER_FILE).parent  # of a checkpoint, or of an export that has kept it
    if base != name or beside.is_dir():
        from peft import PeftModel

        if base != name and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # the adapter added tokens
            model.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(model, name if base != name else str(beside)).merge_and_unload()
    return model.to(device).eval(), tokenizer


def _settings(name: str, file: str) -> dict[str, Any]:
    """Settings in a file of a model's folder; none where it has no such file, as one of the hub."""
    path = Path(name) / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def describe_weights(name: str) -> str:
    """Sizes and times of the weight files, which differ once other weights are saved to the same folder.

    For a model of the hub its name, whatever the revision.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin"))
    return ", ".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
