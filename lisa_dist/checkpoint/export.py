"""Export a checkpoint: a folder with the model alone, which `from_pretrained` loads."""

import json
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lisa_dist.checkpoint.folders import put_in_place
from lisa_dist.checkpoint.optimizer_states import STATE_FILES
from lisa_dist.checkpoint.resume import read_state
from lisa_dist.checkpoint.weights import has_weights, rename, weight_files, write_index
from lisa_dist.core.adapters import loads_adapter, merge, weight_of
from lisa_dist.distributed.collectives import describe_files
from lisa_dist.errors import UserError
from lisa_dist.run_folder import ADAPTER_FILE, STATE_NAME

# Files of a checkpoint that are not copied; weights are exported by themselves.
_NOT_THE_MODEL = (
    STATE_FILES,
    "*.safetensors",
    "*.safetensors.index.json",
    "rng_state*",
    "stream_*.json",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)


def export_checkpoint(folder: str | Path, out: str | Path, keep_adapter: bool = False) -> None:
    """Turn a checkpoint into a folder that `from_pretrained` loads, with nothing else in it; needs no ranks and no GPU.

    Adapters are merged into the weights; with `keep_adapter` they are in a folder of PEFT's beside these. Raises
    ValueError when a file of the checkpoint is damaged, or `out` exists.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / STATE_NAME).is_file():
        raise UserError(f"{folder} is no checkpoint of a LISA run: there is no {STATE_NAME} in it{_advice(folder)}.")
    if out.exists():
        raise UserError(f"{out} is there already: choose a folder that is not.")
    state = read_state(folder)
    if "config.json" not in state["files"]:
        raise UserError(f"{folder}: there is no config.json in it, which says what model it is; it cannot be exported.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: {out.parent} can be no folder ({error.strerror}); choose another.") from error
    staging = Path(tempfile.mkdtemp(prefix=f"tmp-{out.name}-", dir=out.parent))
    try:
        _export_weights(folder, staging, keep_adapter)
        for name in state["files"]:
            of_adapter = name.startswith(ADAPTER_FILE.partition("/")[0] + "/")
            if keep_adapter if of_adapter else not any(fnmatch(name, pattern) for pattern in _NOT_THE_MODEL):
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, staging / name)
        if keep_adapter:
            config = (staging / ADAPTER_FILE).with_name("adapter_config.json")
            about = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": str(out)}
            config.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        describe_files(staging)  # flushes them
        put_in_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _export_weights(folder: Path, out: Path, keep_adapter: bool) -> None:
    """Copy a checkpoint's weights, file by file, under the names of the files on the hub; needs no ranks and no GPU."""
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["none"]
    model_class: Any = getattr(transformers, architectures[0], None)
    is_of_transformers = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    model = None
    if is_of_transformers:  # else its code came with the model, and so did its names
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_pretrained(folder))
    file_by_name, nbytes = dict[str, str](), 0
    files, adapters, config = weight_files(folder), dict[str, torch.Tensor](), dict[str, Any]()
    if ADAPTER_FILE in files:
        files.remove(ADAPTER_FILE)
        if not keep_adapter:
            adapters = load_file(folder / ADAPTER_FILE)
            config = json.loads((folder / ADAPTER_FILE).with_name("adapter_config.json").read_text(encoding="utf-8"))
        elif model is not None and not loads_adapter(model, folder):
            raise UserError(f"{folder}: peft renames the adapters of this architecture; leave --keep_adapter out.")
    elif keep_adapter:
        raise UserError(f"{folder}: has no adapter to keep; leave --keep_adapter out.")
    for file_name in files:
        tensors = load_file(folder / file_name)
        of_file = {name: value for name, value in adapters.items() if weight_of(name) in tensors}
        tensors = merge(tensors | of_file, config)
        tensors = tensors if model is None else rename(model, tensors)
        (out / file_name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / file_name, metadata={"format": "pt"})
        file_by_name |= dict.fromkeys(tensors, file_name)
        nbytes += sum(value.nbytes for value in tensors.values())
    if len(set(file_by_name.values())) > 1:
        write_index(out / SAFE_WEIGHTS_INDEX_NAME, file_by_name, nbytes)


def _advice(folder: Path) -> str:
    """What to do with a folder of another method's run, which needs no export."""
    if has_weights(folder):
        return "; it holds a model already, which from_pretrained loads as it is"
    if (folder / "adapter_config.json").is_file():
        return "; it holds an adapter: from_pretrained loads it with its base, and peft's merge_and_unload() merges it"
    return ""
