"""The weights of a checkpoint, a file for each block: one that has not changed is linked to the last checkpoint's.

An index maps the model's own names to the files, so `from_pretrained` loads them as it loads any shards.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lisa_dist.checkpoint.weights import BUFFERS, named_parts, write_index
from lisa_dist.core.blocks import Blocks
from lisa_dist.core.run_state import SavedBlocks
from lisa_dist.files import flush_file
from lisa_dist.zero.parameters import parameter_numel


@dataclass(frozen=True)
class BlockFile:
    """A file of weights: its name, the block that it is of, and the tensors by their names; `nbytes` of all of them."""

    name: str
    block: str
    tensors: dict[str, torch.Tensor]
    nbytes: int


def block_files(model: torch.nn.Module, blocks: Blocks) -> list[BlockFile]:
    """The files of a model, in the order of its blocks; persistent buffers are one more."""
    parts = [(block, tensors) for block, tensors in named_parts(model, blocks) if tensors]
    return [
        BlockFile(f"model-{number:05d}-of-{len(parts):05d}.safetensors", block, tensors, _nbytes(tensors))
        for number, (block, tensors) in enumerate(parts, start=1)
    ]


def write_index_of(files: Sequence[BlockFile], folder: Path) -> None:
    """Write the index of the model's weights."""
    file_by_name = {name: file.name for file in files for name in file.tensors}
    write_index(folder / SAFE_WEIGHTS_INDEX_NAME, file_by_name, sum(file.nbytes for file in files))


def saved_blocks(folder: Path, described: Mapping[str, dict[str, Any]], files: Sequence[BlockFile]) -> SavedBlocks:
    """Which of the files a checkpoint has, by its index: each has the tensors of one block, and no others."""
    path = folder / SAFE_WEIGHTS_INDEX_NAME
    names_in: dict[str, set[str]] = {}
    if path.is_file():
        for name, file in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items():
            names_in.setdefault(file, set()).add(name)
    found = {file.block: file.name for file in files if names_in.get(file.name) == set(file.tensors)}
    return SavedBlocks(folder, found, {name: described[name] for name in found.values()})


def link_unchanged(
    files: Sequence[BlockFile], changed: set[str], saved: SavedBlocks | None, staging: Path
) -> dict[str, dict[str, Any]]:
    """Link what has not changed since the last checkpoint beside this one; size and sum of each file, by its name.

    Where the file system has no hard links they are copied. A file that is not as large as it was is left out, and that
    of the buffers, which forward passes change.
    """
    if saved is None or saved.folder.resolve().parent != staging.resolve().parent:
        return {}
    linked = {}
    for file in files:
        if file.block in (*changed, BUFFERS) or saved.files.get(file.block) != file.name:
            continue
        path, about = saved.folder / file.name, saved.described[file.name]
        if not path.is_file() or path.stat().st_size != about["bytes"]:
            continue
        _link_or_copy(path, staging / file.name)
        linked[file.name] = about
    return linked


def _link_or_copy(path: Path, to: Path) -> None:
    try:
        os.link(path, to, follow_symlinks=False)
    except OSError:  # of another kind on each file system that has no hard links, or no more of them for this file
        shutil.copyfile(path, to)
        flush_file(to)


def assign(files: Sequence[BlockFile], order: Sequence[int]) -> dict[str, int]:
    """Which rank writes which file: the largest first, each to the rank that has least, by `order` where several do."""
    held = dict.fromkeys(order, 0)
    owners = {}
    for file in sorted(files, key=lambda file: -file.nbytes):
        owner = min(held, key=lambda rank: held[rank])
        owners[file.name] = owner
        held[owner] += file.nbytes
    return owners


def host_by_host(hosts: Sequence[str]) -> list[int]:
    """The ranks, of which the hosts are given, in an order in which every host comes by before one comes again."""
    before = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    return sorted(range(len(hosts)), key=lambda rank: (before[rank], rank))


def _nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(parameter_numel(value) * value.element_size() for value in tensors.values())
