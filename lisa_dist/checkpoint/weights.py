"""The model's weights to files and back, one block at a time, so that ZeRO-3 never gathers a whole model anywhere.

The files are those of `save_pretrained`: `model.safetensors`, or shards with an index; `from_pretrained` loads them.
The rank that writes needs memory for one shard of at most `max_shard_size` bytes on top of its own share of the model.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from lisa_dist.core.blocks import Blocks
from lisa_dist.distributed.collectives import together
from lisa_dist.errors import UserError
from lisa_dist.files import find_foreign_name, replacing, set_mode_by_umask
from lisa_dist.patches import patch
from lisa_dist.run_folder import read_object
from lisa_dist.zero.parameters import is_partitioned, original_of, parameter_numel, parameter_shape, whole_weights
from lisa_dist.zero.stage3 import drop_prefetched

BUFFERS = "buffers"  # in the place of a block's name
MAX_SHARD_SIZE = 5 * 1024**3  # bytes
_DTYPE_NAMES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_weights(
    engine: deepspeed.DeepSpeedEngine,
    blocks: Blocks,
    folder: Path,
    writes: bool,
    max_shard_size: int = MAX_SHARD_SIZE,
    original_names: bool = False,
    reported_folder: Path | None = None,
) -> None:
    """Write every weight and persistent buffer into `folder`; all ranks call it, those with `writes` write.

    The names are the model's own, for `read_weights`, or those of the files on the hub (`original_names`), where
    transformers loads a model under other names, as it does with fused experts. `reported_folder` is what errors name
    where `folder` is a staging folder. Raises SaveError on all ranks when one cannot write.
    """
    model, reported_folder = engine.module, reported_folder or folder
    drop_prefetched(engine)
    shards = list(_fill_shards(model, blocks, max_shard_size))
    names = [SAFE_WEIGHTS_NAME]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with together(reported_folder):
        if writes:  # an index of earlier shards must not stay next to new ones
            (folder / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    nbytes_by_name: dict[str, int] = {}
    file_by_name: dict[str, str] = {}
    for file_name, parts in zip(names, shards, strict=True):
        shard: dict[str, torch.Tensor] = {}
        for tensors in parts:
            with deepspeed.zero.GatheredParameters(list(tensors.values())):
                if writes:
                    part = {name: whole_weights(value).cpu().clone() for name, value in tensors.items()}
                    shard |= _rename(model, part) if original_names else part
        with together(reported_folder):
            if writes:
                with replacing(folder / file_name) as path:
                    save_file(shard, path, metadata={"format": "pt"})
        file_by_name |= dict.fromkeys(shard, file_name)
        nbytes_by_name |= {name: value.nbytes for name, value in shard.items()}
    with together(reported_folder):
        if writes:
            if len(shards) > 1:
                with replacing(folder / SAFE_WEIGHTS_INDEX_NAME) as path:
                    write_index(path, file_by_name, sum(nbytes_by_name.values()))
                names = [*names, SAFE_WEIGHTS_INDEX_NAME]
            _remove_weights(folder, except_names=names)  # those of an earlier save


def write_configs(model: PreTrainedModel, folder: Path) -> None:
    """Write all of `save_pretrained` but the weights; on one rank."""
    save_without_weights(lambda path: model.save_pretrained(path, state_dict={}), folder)


def save_without_weights(save: Callable[[str], None], folder: Path) -> None:
    """Call `save` and keep all it writes but empty weights: those in `folder` stay until others replace them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder) as staging:
        was_enabled = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # it would show how no weights are written
        try:
            save(staging)
        finally:
            if was_enabled:
                logging.enable_progress_bar()
        _remove_weights(Path(staging))
        shutil.copytree(staging, folder, dirs_exist_ok=True)
    set_mode_by_umask(folder)  # copytree has given it the mode of the temporary one


def _remove_weights(folder: Path, except_names: Sequence[str] = ()) -> None:
    for path in (*folder.glob("model*.safetensors"), folder / SAFE_WEIGHTS_INDEX_NAME):
        if path.name not in except_names:
            path.unlink(missing_ok=True)


def read_weights(engine: deepspeed.DeepSpeedEngine, blocks: Blocks, folder: Path, same_dtype: bool = True) -> None:
    """Fill the engine's model from what `write_weights` wrote; all ranks call it.

    Raises ValueError, before anything is changed, when the files are of another model or precision.
    """
    model = engine.module
    drop_prefetched(engine)
    file_by_name = _open_weights(folder)
    parts = _parts(model, blocks)
    expected = {name: value for part in parts for name, value in part.items()}
    _check_same_model(model, expected, file_by_name, folder, same_dtype)
    for tensors in parts:
        with deepspeed.zero.GatheredParameters(list(tensors.values()), modifier_rank=0), torch.no_grad():
            for name, value in tensors.items():
                # What ZeRO-3 has gathered goes from rank 0 to all; anything else every rank reads for itself.
                if (held := original_of(value)) is not None:
                    held.load(file_by_name[name].get_tensor(name))
                elif dist.get_rank() == 0 or not is_partitioned(value):
                    value.copy_(file_by_name[name].get_tensor(name))
    dist.barrier()  # one rank of a host has written the originals of frozen layers, and the others read them


def export_weights(folder: Path, out: Path) -> None:
    """Copy a checkpoint's weights, file by file, under the names of the files on the hub; needs no ranks and no GPU."""
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["none"]
    model_class: Any = getattr(transformers, architectures[0], None)
    is_of_transformers = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    model = None
    if is_of_transformers:  # else its code came with the model, and so did its names
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_pretrained(folder))
    nbytes_by_name: dict[str, int] = {}
    file_by_name: dict[str, str] = {}
    for file_name in weight_files(folder):
        tensors = load_file(folder / file_name)
        tensors = tensors if model is None else _rename(model, tensors)
        (out / file_name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / file_name, metadata={"format": "pt"})
        file_by_name |= dict.fromkeys(tensors, file_name)
        nbytes_by_name |= {name: value.nbytes for name, value in tensors.items()}
    if len(set(file_by_name.values())) > 1:
        write_index(out / SAFE_WEIGHTS_INDEX_NAME, file_by_name, sum(nbytes_by_name.values()))


def write_index(path: Path, file_by_name: dict[str, str], nbytes: int) -> None:
    """The index of sharded weights, `nbytes` in all, as `from_pretrained` reads it."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": file_by_name}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights that `read_weights` reads."""
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def named_parts(model: torch.nn.Module, blocks: Blocks) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Everything that is saved: the parameters of each block, by its name, then the persistent buffers."""
    saved = model.state_dict().keys()
    parts: list[tuple[str, dict[str, torch.Tensor]]] = [(block.name, {**block.parameters}) for block in blocks]
    return [*parts, (BUFFERS, {name: value for name, value in model.named_buffers() if name in saved})]


def _parts(model: torch.nn.Module, blocks: Blocks) -> list[dict[str, torch.Tensor]]:
    return [tensors for _, tensors in named_parts(model, blocks)]


def _fill_shards(
    model: torch.nn.Module, blocks: Blocks, max_shard_size: int
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The parts in order, as many to a shard as fit."""
    shard: list[dict[str, torch.Tensor]] = []
    filled = 0
    for tensors in _parts(model, blocks):
        size = sum(parameter_numel(value) * value.element_size() for value in tensors.values())
        if shard and filled + size > max_shard_size:
            yield shard
            shard, filled = [], 0
        shard.append(tensors)
        filled += size
    yield shard


def _rename(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole blocks under the names, and in the shapes, of the files on the hub.

    Those of a model's conversions count that it was loaded by: under ZeRO-3 transformers keeps all that it knows, and
    would undo one that was never done.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        patch(model, "_weight_conversions", [one for one in conversions if one.was_used()], of="weight_conversions")
    renamed = revert_weight_conversion(model, tensors)
    return {name: value.contiguous() for name, value in renamed.items()}


def weight_files(folder: Path) -> list[str]:
    """The files that a model's weights are in, as its index names them. Raises UserError for names outside `folder`."""
    path = folder / SAFE_WEIGHTS_INDEX_NAME
    if not path.is_file():
        return [SAFE_WEIGHTS_NAME]
    names = set((read_object(path).get("weight_map") or {}).values())
    if (foreign := find_foreign_name(names)) is not None:
        raise UserError(
            f"{path} names the file {foreign!r}: weights lie in the folder of their index; use a copy from whoever "
            "wrote it."
        )
    return sorted(names)


def _open_weights(folder: Path) -> dict[str, safe_open]:
    """The file that each tensor is in, by the tensor's name."""
    files = [safe_open(folder / name, framework="pt") for name in weight_files(folder)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no dict


def _check_same_model(
    model: torch.nn.Module,
    expected: dict[str, torch.Tensor],
    file_by_name: dict[str, safe_open],
    folder: Path,
    same_dtype: bool,
) -> None:
    missing = [name for name in expected if name not in file_by_name]
    # A tied matrix may be in the files under its second name too.
    unknown = [name for name in file_by_name if name not in expected and name not in model.state_dict()]
    other = []
    for name in expected.keys() & file_by_name.keys():
        saved, value = file_by_name[name].get_slice(name), expected[name]
        shape, dtype = saved.get_shape(), value.dtype
        if same_dtype:
            dtype = _DTYPE_NAMES.get(saved.get_dtype(), dtype)
        if (tuple(shape), dtype) != (parameter_shape(value), value.dtype):
            other.append(f"{name} is {dtype} {shape}, not {value.dtype} {list(parameter_shape(value))}")
    if not (missing or unknown or other):
        return
    differences = [f"{len(names)} {what}, such as {sorted(names)[0]}" for names, what in (
        (missing, "parameters of the model are not in it"),
        (unknown, "of its tensors are not in the model"),
        (other, "have another shape or precision"),
    ) if names]  # fmt: skip
    raise UserError(
        f"{folder} is of another model than {type(model).__name__}: {'; '.join(differences)}. A new run begins from "
        "any model that is given as --model_name_or_path."
    )
