"""The model's weights to files and back, one block at a time, so that ZeRO-3 never gathers a whole model anywhere.

`from_pretrained` loads them all. A model that is saved has the files of `save_pretrained`: `model.safetensors`, or
shards with an index, and adapters merged. A checkpoint has a file for each block, under the model's own names, and an
index; one that has not changed is linked to the last checkpoint's. Adapters are in a folder of PEFT's beside them.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed as dist
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from lisa_dist.checkpoint.optimizer_states import copy_on_host
from lisa_dist.config_rules import ADAPTERS
from lisa_dist.core.adapters import adapter_config, beside, merge
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.run_state import SavedBlocks
from lisa_dist.distributed.collectives import gather, sharing_errors, together
from lisa_dist.distributed.health import first_ranks_of_hosts
from lisa_dist.distributed.run_lock import run_id
from lisa_dist.errors import UserError
from lisa_dist.files import find_foreign_name, make_durable, replacing, set_mode_by_umask
from lisa_dist.patches import patch
from lisa_dist.run_folder import ADAPTER_FILE, read_object
from lisa_dist.zero.parameters import (
    is_partitioned,
    naming_of,
    original_of,
    parameter_numel,
    parameter_shape,
    whole_weights,
)
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
) -> None:
    """Write every weight and persistent buffer into `folder`; all ranks call it, one of them with `writes`.

    The first rank of each host that sees `folder` writes its shards at the same time as the others theirs, and needs
    memory for one of `max_shard_size` bytes. The rank with `writes` adds the index. The names are those of the files on
    the hub: transformers loads some models under others, as with fused experts; adapters are merged. Raises SaveError
    on all ranks when one cannot write.
    """
    model, rank = engine.module, dist.get_rank()
    drop_prefetched(engine)
    parts = [part | beside(part, blocks) for block, part in named_parts(model, blocks) if block != ADAPTERS]
    shards = list(_fill_shards(parts, max_shard_size))
    names = [SAFE_WEIGHTS_NAME]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with together(folder):
        if writes:  # an index of earlier shards must not stay next to new ones
            (folder / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    writers = _find_writers(folder, writes)
    file_by_name, nbytes = dict[str, str](), 0  # of what this rank writes
    for begin in range(0, len(shards), len(writers)):
        shard = dict[str, torch.Tensor]()
        for writer, parts in zip(writers, shards[begin:], strict=False):
            shard |= _gather_shard(model, parts, writer)
        own_name = dict(zip(writers, names[begin:], strict=False)).get(rank, "")
        with together(folder):
            if own_name:
                with replacing(folder / own_name) as path:
                    save_file(shard, path, metadata={"format": "pt"})
        file_by_name |= dict.fromkeys(shard, own_name)
        nbytes += sum(value.nbytes for value in shard.values())
    written = gather((file_by_name, nbytes))
    with together(folder):
        if writes:
            if len(shards) > 1:
                with replacing(folder / SAFE_WEIGHTS_INDEX_NAME) as path:
                    places = {name: place for files, _ in written for name, place in files.items()}
                    write_index(path, places, sum(nbytes for _, nbytes in written))
                names = [*names, SAFE_WEIGHTS_INDEX_NAME]
            remove_weights(folder, except_names=names)  # those of an earlier save


def _gather_shard(
    model: PreTrainedModel, parts: Iterable[dict[str, torch.Tensor]], writer: int
) -> dict[str, torch.Tensor]:
    """The parts as the rank that writes them has them on its host; nothing on the others."""
    shard: dict[str, torch.Tensor] = {}
    for tensors in parts:
        with deepspeed.zero.GatheredParameters(list(tensors.values())):
            if dist.get_rank() == writer:
                part = {name: copy_on_host(whole_weights(value)) for name, value in tensors.items()}
                shard |= rename(model, merge(part, adapter_config(model)))
    return shard


def _find_writers(folder: Path, writes: bool) -> list[int]:
    """The first rank of each host that sees the folder of the rank with `writes`; of others the files would be lost."""
    token = folder / f"tmp-writers-{gather(run_id())[0]}"
    with together(folder):
        if writes:
            token.touch()
    sees = gather(os.path.exists(token))  # Path.exists raises where a host may not look
    with together(folder):
        if writes:
            token.unlink()
    return [rank for rank in first_ranks_of_hosts() if sees[rank]]


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
        remove_weights(Path(staging))
        shutil.copytree(staging, folder, dirs_exist_ok=True)
    set_mode_by_umask(folder)  # copytree has given it the mode of the temporary one


def remove_weights(folder: Path, except_names: Sequence[str] = ()) -> None:
    for path in (*folder.glob("model*.safetensors"), folder / SAFE_WEIGHTS_INDEX_NAME):
        if path.name not in except_names:
            path.unlink(missing_ok=True)


def read_weights(engine: deepspeed.DeepSpeedEngine, blocks: Blocks, folder: Path, same_dtype: bool = True) -> None:
    """Fill the engine's model from what `write_weights` wrote; all ranks call it.

    The first rank of each host that sees rank 0's files opens its share, reads MAX_SHARD_SIZE bytes at the same time as
    the others theirs, and sends them to all ranks. Raises ValueError on all ranks where one cannot read; and, before
    anything is changed, when the files are of another model or precision.
    """
    model, rank = engine.module, dist.get_rank()
    drop_prefetched(engine)
    readers, names = _find_readers(folder)
    with sharing_errors(OSError):
        files = _open_weights(folder, names[readers.index(rank) :: len(readers)] if rank in readers else [])
        described = _describe_tensors(files)
    of_ranks = gather(described)
    reader_of = {name: reader for reader, found in enumerate(of_ranks) for name in found}
    saved = {name: about for found in of_ranks for name, about in found.items()}
    new = ADAPTERS if not same_dtype and saved.keys().isdisjoint(blocks.adapters.parameters) else None  # to this model
    parts = [tensors for block, tensors in named_parts(model, blocks) if block != new]
    expected = {name: value for part in parts for name, value in part.items()}
    _check_same_model(model, expected, saved, folder, same_dtype)
    for shard_of in _deal_out(parts, reader_of, readers):
        with sharing_errors(OSError):
            read = {name: files[name].get_tensor(name) for tensors in shard_of.get(rank, []) for name in tensors}
            if len(readers) > 1:  # mapped tensors are read where they are copied: here all readers do so at once
                read = {name: value.clone() for name, value in read.items()}
        for reader, shard in shard_of.items():
            for tensors in shard:
                _send(tensors, reader, read)
    dist.barrier()  # one rank of a host has written the originals of frozen layers, and the others read them


def _find_readers(folder: Path) -> tuple[list[int], list[str]]:
    """The first rank of each host that sees the files of rank 0, not others under one path, and these files' names."""
    readers, found = first_ranks_of_hosts(), list[tuple[str, int, int]]()
    with sharing_errors(OSError), suppress(OSError, UserError) if dist.get_rank() else nullcontext():
        for name in weight_files(folder) if dist.get_rank() in readers else []:
            about = (folder / name).stat()
            found.append((name, about.st_size, about.st_mtime_ns))
    of_ranks = gather(found)
    return [rank for rank in readers if of_ranks[rank] == of_ranks[0]], [name for name, *_ in of_ranks[0]]


def _deal_out(
    parts: list[dict[str, torch.Tensor]], reader_of: Mapping[str, int], readers: Sequence[int]
) -> Iterator[dict[int, list[dict[str, torch.Tensor]]]]:
    """What the readers read at the same time, by their ranks: of each the next MAX_SHARD_SIZE bytes of its files."""
    shards = []
    for reader in readers:
        own = [{name: value for name, value in part.items() if reader_of[name] == reader} for part in parts]
        shards.append(_fill_shards(filter(None, own), MAX_SHARD_SIZE))
    for at_once in zip_longest(*shards, fillvalue=[]):
        yield dict(zip(readers, at_once, strict=True))


def _send(tensors: dict[str, torch.Tensor], sender: int, read: dict[str, torch.Tensor]) -> None:
    """Fill tensors of the model on all ranks with what the sender has read, which it lets go of."""
    with deepspeed.zero.GatheredParameters(list(tensors.values()), modifier_rank=sender), torch.no_grad():
        for name, value in tensors.items():
            quantized = original_of(value)
            whole = value.detach() if quantized is None else torch.empty_like(quantized.original, device=value.device)
            if dist.get_rank() == sender:
                whole.copy_(read.pop(name))
            if not is_partitioned(value):  # else DeepSpeed sends it
                dist.broadcast(whole, sender)
            if quantized is not None:
                quantized.load(whole)


def write_index(path: Path, file_by_name: dict[str, str], nbytes: int) -> None:
    """The index of sharded weights, `nbytes` in all, as `from_pretrained` reads it."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": file_by_name}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights that `read_weights` reads."""
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def named_parts(model: torch.nn.Module, blocks: Blocks) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Everything that is saved: the parameters of each block, by its name, then the persistent buffers."""
    parts: list[tuple[str, dict[str, torch.Tensor]]] = [(block.name, {**block.parameters}) for block in blocks]
    left_out = {
        f"{path}.{name}".lstrip(".") for path, one in model.named_modules() for name in one._non_persistent_buffers_set
    }
    return [*parts, (BUFFERS, {name: value for name, value in model.named_buffers() if name not in left_out})]


def _fill_shards(
    parts: Iterable[dict[str, torch.Tensor]], max_shard_size: int
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The parts in order, as many to a shard as fit."""
    shard: list[dict[str, torch.Tensor]] = []
    filled = 0
    for tensors in parts:
        size = _nbytes(tensors)
        if shard and filled + size > max_shard_size:
            yield shard
            shard, filled = [], 0
        shard.append(tensors)
        filled += size
    yield shard


def rename(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
    """The files that a model's weights are in, as its index names them, and that of adapters where there is one.

    Raises UserError for names outside `folder`.
    """
    path, adapters = folder / SAFE_WEIGHTS_INDEX_NAME, [ADAPTER_FILE] if (folder / ADAPTER_FILE).is_file() else []
    if not path.is_file():
        return [SAFE_WEIGHTS_NAME, *adapters]
    names = set((read_object(path).get("weight_map") or {}).values())
    if (foreign := find_foreign_name(names)) is not None:
        raise UserError(
            f"{path} names the file {foreign!r}: weights lie in the folder of their index; use a copy from whoever "
            "wrote it."
        )
    return sorted(names) + adapters


def _open_weights(folder: Path, names: Iterable[str]) -> dict[str, safe_open]:
    """The file that each tensor is in, by the tensor's name. Raises UserError for one that is damaged."""
    files: dict[str, safe_open] = {}
    for path in (folder / name for name in names):
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); use a whole copy of it.") from error
        files |= dict.fromkeys(file.keys(), file)
    return files


def _describe_tensors(files: Mapping[str, safe_open]) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each tensor, as the files have them."""
    slices = {name: file.get_slice(name) for name, file in files.items()}
    return {name: (one.get_shape(), one.get_dtype()) for name, one in slices.items()}


def _check_same_model(
    model: torch.nn.Module,
    expected: dict[str, torch.Tensor],
    saved: Mapping[str, tuple[list[int], str]],
    folder: Path,
    same_dtype: bool,
) -> None:
    other = []
    for name in expected.keys() & saved.keys():
        (shape, dtype_name), value = saved[name], expected[name]
        dtype = _DTYPE_NAMES.get(dtype_name, value.dtype) if same_dtype else value.dtype
        if (tuple(shape), dtype) != (parameter_shape(value), value.dtype):
            other.append(f"{name} is {dtype} {shape}, not {value.dtype} {list(parameter_shape(value))}")
    named = model.named_parameters(remove_duplicate=False)  # a tied matrix may be in the files by its second name too
    known = expected.keys() | set(map(naming_of(model), (name for name, _ in named)))
    differences = {
        "parameters of the model are not in it": expected.keys() - saved.keys(),
        "of its tensors are not in the model": saved.keys() - known,
        "have another shape or precision": other,
    }
    said = "; ".join(f"{len(names)} {what}, such as {min(names)}" for what, names in differences.items() if names)
    if said:
        raise UserError(
            f"{folder} is of another model than {type(model).__name__}: {said}. A new run begins from any model that "
            "is given as --model_name_or_path."
        )


@dataclass(frozen=True)
class BlockFile:
    """A file of weights: its name, the block that it is of, and the tensors by their names; `nbytes` of all of them."""

    name: str
    block: str
    tensors: dict[str, torch.Tensor]
    nbytes: int


def block_files(model: torch.nn.Module, blocks: Blocks) -> list[BlockFile]:
    """The files of a model, in the order of its blocks; persistent buffers are one more, adapters PEFT's."""
    parts = [(block, tensors) for block, tensors in named_parts(model, blocks) if tensors and block != ADAPTERS]
    files = [
        BlockFile(f"model-{number:05d}-of-{len(parts):05d}.safetensors", block, tensors, _nbytes(tensors))
        for number, (block, tensors) in enumerate(parts, start=1)
    ]
    adapters: dict[str, torch.Tensor] = {**blocks.adapters.parameters}
    return [*files, BlockFile(ADAPTER_FILE, ADAPTERS, adapters, _nbytes(adapters))] if adapters else files


def saved_blocks(folder: Path, described: Mapping[str, dict[str, Any]], files: Sequence[BlockFile]) -> SavedBlocks:
    """Which of the files a checkpoint has, by its index: each has the tensors of one block, and no others."""
    path = folder / SAFE_WEIGHTS_INDEX_NAME
    places = json.loads(path.read_text(encoding="utf-8"))["weight_map"].items() if path.is_file() else ()
    found = {
        file.block: file.name
        for file in files
        if {name for name, place in places if place == file.name} == file.tensors.keys()
    }
    return SavedBlocks(folder, found, {name: described[name] for name in found.values()})


def link_unchanged(
    files: Sequence[BlockFile], changed: set[str], saved: SavedBlocks | None, staging: Path
) -> dict[str, dict[str, Any]]:
    """Link what has not changed since the last checkpoint beside this one; size and sum of each file, by its name.

    Where the file system has no hard links they are copied. A file that is not as large as it was is left out, that of
    the buffers, which forward passes change, and that of adapters, which always train.
    """
    if saved is None or saved.folder.resolve().parent != staging.resolve().parent:
        return {}
    linked = {}
    for file in files:
        if file.block in (*changed, BUFFERS, ADAPTERS) or saved.files.get(file.block) != file.name:
            continue
        path, about = saved.folder / file.name, saved.described[file.name]
        if not path.is_file() or path.stat().st_size != about["bytes"]:
            continue
        try:
            os.link(path, staging / file.name, follow_symlinks=False)
        except OSError:  # of another kind on each file system that has no hard links, or no more of them for this file
            shutil.copyfile(path, staging / file.name)
            make_durable(staging / file.name)
        linked[file.name] = about
    return linked


def _nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(parameter_numel(value) * value.element_size() for value in tensors.values())
