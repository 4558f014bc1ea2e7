"""A checkpoint costs what has changed: files of other blocks are linked; and it may be written beside training."""

import contextlib
import errno
import io
import os
import threading
from pathlib import Path

import pytest
import torch
from engines import full_weights, train_step
from models import tiny_llama, token_batches
from ranks import run_ranks
from safetensors.torch import load_file
from torch import distributed as dist
from transformers import AutoModelForCausalLM

import lisa_dist
from lisa_dist.checkpoint import save as save_module
from lisa_dist.checkpoint import weights as weights_module
from lisa_dist.checkpoint.resume import find_checkpoint, load_checkpoint
from lisa_dist.checkpoint.save import assign, end_save, finish_save, host_by_host, save_checkpoint
from lisa_dist.checkpoint.weights import BlockFile, link_unchanged
from lisa_dist.core.run_state import BlockChanges, SavedBlocks
from lisa_dist.files import SaveError

INTERVAL = 2

pytestmark = pytest.mark.usefixtures("cpu_ops")


def start(ds_config: str, seed: int = 0, **settings):
    config = lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL, lisa_debug=True, **settings)
    return lisa_dist.initialize(tiny_llama(seed=seed), ds_config, config, lr=1e-3)


def take_steps(engine, lisa, until: int) -> None:
    batches = token_batches(12, rows=4)
    while engine.global_steps < until:
        train_step(engine, lisa, batches[engine.global_steps])


def trained_between(lisa, first: int, last: int) -> set[str]:
    """The blocks that steps first + 1 to last have changed, by the log of the periods."""
    if first == last:
        return set()
    periods = [(one.step, one.layers) for one in lisa.records]
    periods.append((lisa.period * INTERVAL, lisa.active_layers))  # which is in the log once it has ended
    trained = [layers for begin, layers in periods if begin < last and first < begin + INTERVAL]
    return {"embed", "head", "rest"} | {f"layers.{layer}" for layers in trained for layer in layers}


def inodes(folder: Path, files: dict[str, str]) -> dict[str, int]:
    return {block: (folder / name).stat().st_ino for block, name in files.items()}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("model-*.safetensors") for name, value in load_file(path).items()}


def save_all_along(folder: str, ds_config: str, in_background: bool) -> list[tuple[set[str], set[str]]]:
    """For each save but the first: the blocks that steps have changed since the last one, and those written anew."""
    engine, lisa = start(ds_config)
    found, before, saved_at = [], {}, 0
    for step in (1, 2, 3, 6, 6):  # the last one again, which replaces it
        take_steps(engine, lisa, step)
        checkpoint = Path(folder) / f"checkpoint-{step}"
        save_checkpoint(lisa, checkpoint, in_background=in_background)
        finish_save(lisa)
        saved, weights = weights_in(checkpoint), full_weights(engine)
        assert saved.keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in saved.items())
        now = inodes(checkpoint, lisa.changes.saved.files)
        if before:
            written = {block for block, inode in now.items() if before[block] != inode}
            found.append((trained_between(lisa, saved_at, step), written))
        before, saved_at = now, step
    engine.destroy()
    return found


@pytest.mark.parametrize(("ds_config", "in_background"), [("zero2", False), ("zero3", True)])
def test_what_has_not_changed_is_linked(tmp_path, ds_config, in_background):
    found, other = run_ranks(save_all_along, 2, str(tmp_path), ds_config, in_background)
    assert found == other
    for changed, written in found:
        assert written == changed
    assert [len(changed) for changed, _ in found] == [5, 5, 7, 0], "of nine blocks"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6").lm_head.weight.shape == (128, 64)


def resume_and_save(folder: str, damage: str) -> dict:
    """Blocks that the first save after a resume has written, and what was found to resume from."""
    engine, lisa = start("zero2")
    for step in (2, 4):
        take_steps(engine, lisa, step)
        save_checkpoint(lisa, Path(folder) / f"checkpoint-{step}")
    # Of a block that has not changed in between, in one of the two folders that share it.
    frozen = next(block.name for block in lisa.blocks.layers if block.name not in trained_between(lisa, 2, 4))
    name = lisa.changes.saved.files[frozen]
    engine.destroy()
    dist.barrier()
    if dist.get_rank() == 0:
        if damage == "deleted":
            (Path(folder) / "checkpoint-4" / name).unlink()
        elif damage == "elsewhere":
            os.rename(folder, f"{folder}-moved")
    dist.barrier()
    engine, lisa = start("zero2", seed=9)
    source, state = find_checkpoint(f"{folder}-moved" if damage == "elsewhere" else folder)
    load_checkpoint(lisa, source, state)
    before = inodes(source, lisa.changes.saved.files)
    take_steps(engine, lisa, 5)
    save_checkpoint(lisa, Path(folder) / "checkpoint-5")
    now = inodes(Path(folder) / "checkpoint-5", lisa.changes.saved.files)
    found = {"source": source.name, "written": {block for block in now if now[block] != before[block]}}
    found |= {"trained": trained_between(lisa, 4, 5), "all": set(now)}
    engine.destroy()
    return found


@pytest.mark.parametrize(("damage", "source"), [("none", 4), ("deleted", 2), ("elsewhere", 4)])
def test_a_resumed_run_links_to_what_it_was_resumed_from(tmp_path, damage, source):
    """A file that was deleted the older checkpoint has still, though both were one; into another folder none is."""
    found = run_ranks(resume_and_save, 2, str(tmp_path / "run"), damage)[0]
    assert found["source"] == f"checkpoint-{source}"
    assert damage == "deleted" or found["written"] == found["trained" if damage == "none" else "all"]


class Gate:
    """Holds back every file that a save writes until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None):
        self._save_file, self._error = save_module.save_file, error
        self.is_open = threading.Event()
        monkeypatch.setattr(save_module, "save_file", self)

    def __call__(self, *args, **kwargs):
        assert self.is_open.wait(60)
        if self._error is not None:
            raise self._error
        self._save_file(*args, **kwargs)


def train_while_it_saves(folder: str, ds_config: str) -> None:
    """Steps and a switch go by before a byte is written; the checkpoint is that of a save that is waited for."""
    engine, lisa = start(ds_config, lisa_state="keep")
    take_steps(engine, lisa, 3)
    save_checkpoint(lisa, Path(folder) / "a" / "checkpoint-3")
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        save_checkpoint(lisa, Path(folder) / "b" / "checkpoint-3", in_background=True)
        take_steps(engine, lisa, 5)
        assert not (Path(folder) / "b" / "checkpoint-3").exists()
        gate.is_open.set()
        finish_save(lisa)
    waited, other = (Path(folder) / name / "checkpoint-3" for name in ("a", "b"))
    assert {path.name for path in waited.iterdir()} == {path.name for path in other.iterdir()}
    for path in waited.glob("*.safetensors"):
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    engine.destroy()


@pytest.mark.parametrize("ds_config", ["zero2_offload", "zero3"])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, ds_config):
    run_ranks(train_while_it_saves, 2, str(tmp_path), ds_config)


def fail_in_the_background(folder: str) -> tuple[str, int]:
    """What is said of a full disk of rank 1, and how many blocks the next save writes."""
    engine, lisa = start("zero2")
    take_steps(engine, lisa, 2)
    save_checkpoint(lisa, Path(folder) / "checkpoint-2")
    before = inodes(Path(folder) / "checkpoint-2", lisa.changes.saved.files)
    take_steps(engine, lisa, 4)
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch, OSError(errno.ENOSPC, "No space left on device") if dist.get_rank() == 1 else None)
        save_checkpoint(lisa, Path(folder) / "checkpoint-4", in_background=True)
        gate.is_open.set()
        take_steps(engine, lisa, 5)
        with pytest.raises(SaveError) as error:
            save_checkpoint(lisa, Path(folder) / "checkpoint-5")
    dist.barrier()
    assert [path.name for path in Path(folder).iterdir()] == ["checkpoint-2"]
    dist.barrier()
    save_checkpoint(lisa, Path(folder) / "checkpoint-5")
    now = inodes(Path(folder) / "checkpoint-5", lisa.changes.saved.files)
    assert {block for block in now if now[block] != before[block]} == trained_between(lisa, 2, 5)
    engine.destroy()
    return str(error.value), len(now)


def test_a_save_that_fails_in_the_background_is_named_by_all_and_its_blocks_are_written_by_the_next(tmp_path):
    (said, _), (other, _) = run_ranks(fail_in_the_background, 2, str(tmp_path))
    assert said == other
    assert "checkpoint-4 could not be written (rank 1: OSError: [Errno 28] No space left on device)" in said


def save_what_a_forward_pass_counts(folder: str) -> list[float]:
    """The buffer in each checkpoint, which no step of an optimizer changes."""

    def count(module: torch.nn.Module, _: object) -> None:
        module.passes += 1

    model = tiny_llama()
    model.register_buffer("passes", torch.zeros(1))
    model.register_forward_pre_hook(count)
    engine, lisa = lisa_dist.initialize(model, "zero2", lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL), lr=1e-3)
    found = []
    for step in (1, 2, 3):
        take_steps(engine, lisa, step)
        checkpoint = Path(folder) / f"checkpoint-{step}"
        save_checkpoint(lisa, checkpoint)
        found.append(weights_in(checkpoint)["passes"].item())
    engine.destroy()
    return found


def test_buffers_are_written_anew_each_time(tmp_path):
    assert run_ranks(save_what_a_forward_pass_counts, 1, str(tmp_path))[0] == [1.0, 2.0, 3.0]


def raise_while_a_save_goes_on(folder: str, error: OSError | None) -> tuple[list[str], str]:
    """The folder after a run has raised, as it gives it back; and what is said."""
    engine, lisa = start("zero2")
    take_steps(engine, lisa, 2)
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch, error)
        save_checkpoint(lisa, Path(folder) / "checkpoint-2", in_background=True)
        threading.Timer(0.5, gate.is_open.set).start()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            end_save(lisa)
    engine.destroy()
    return sorted(path.name for path in Path(folder).iterdir()), said.getvalue()


def test_a_run_that_raises_waits_for_its_save(tmp_path):
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    assert run_ranks(raise_while_a_save_goes_on, 2, str(whole), None) == [(["checkpoint-2"], "")] * 2
    full_disk = OSError(errno.ENOSPC, "No space left")
    (left, said), (_, of_rank_1) = run_ranks(raise_while_a_save_goes_on, 2, str(failed), full_disk)
    assert left == []
    assert "checkpoint-2 could not be written (rank 0: OSError: [Errno 28] No space left" in said
    assert of_rank_1 == ""


def save_with_little_memory(folder: str, host_bytes: int) -> int:
    """The most bytes of weights that this rank has held at a time."""
    engine, lisa = start("zero3")
    take_steps(engine, lisa, 2)
    held = most = 0
    copy_on_host, save_file = save_module.copy_on_host, save_module.save_file

    def copying(value: torch.Tensor) -> torch.Tensor:
        nonlocal held, most
        held += value.nbytes
        most = max(most, held)
        return copy_on_host(value)

    def writing(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        nonlocal held
        held -= sum(value.nbytes for value in tensors.values()) if path.name.startswith("model-") else 0
        save_file(tensors, path, metadata=metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "copy_on_host", copying)
        patch.setattr(save_module, "save_file", writing)
        save_checkpoint(lisa, Path(folder) / "checkpoint-2", host_bytes=host_bytes)
    saved, weights = weights_in(Path(folder) / "checkpoint-2"), full_weights(engine)
    assert all(torch.equal(value, saved[name]) for name, value in weights.items())
    engine.destroy()
    return most


def test_copies_on_the_host_are_bounded(tmp_path):
    layer = sum(parameter.numel() for parameter in tiny_llama().model.layers[0].parameters()) * 4
    assert max(run_ranks(save_with_little_memory, 2, str(tmp_path / "one"), 1)) == layer, "a file at a time"
    assert max(run_ranks(save_with_little_memory, 2, str(tmp_path / "two"), 2 * layer)) == 2 * layer
    assert min(run_ranks(save_with_little_memory, 2, str(tmp_path / "all"), 1 << 40)) > 2 * layer


# Without ranks


def files_of(*sizes: int) -> list[BlockFile]:
    return [BlockFile(f"model-{n}.safetensors", f"layers.{n}", {}, size) for n, size in enumerate(sizes)]


def test_every_host_and_every_rank_has_as_much_to_write():
    hosts = ["a"] * 4 + ["b"] * 4
    order = host_by_host(hosts)
    assert sorted(order) == list(range(8))
    assert [hosts[rank] for rank in order[:4]] == ["a", "b", "a", "b"]
    owners = assign(files_of(5, 17, 17, 5, 1), order)
    by_host = dict.fromkeys(hosts, 0)
    for file in files_of(5, 17, 17, 5, 1):
        by_host[hosts[owners[file.name]]] += file.nbytes
    assert sorted(by_host.values()) == [22, 23]
    assert len(set(owners.values())) == 5


@pytest.fixture
def saved(tmp_path) -> SavedBlocks:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (tmp_path / "tmp-checkpoint-2").mkdir()
    described = {}
    for file in files_of(3, 3, 3):
        (folder / file.name).write_bytes(b"abc")
        described[file.name] = {"bytes": 3, "sha256": file.name}
    return SavedBlocks(folder, {file.block: file.name for file in files_of(3, 3, 3)}, described)


def test_what_is_linked(saved):
    staging = saved.folder.with_name("tmp-checkpoint-2")
    (saved.folder / "model-2.safetensors").write_bytes(b"ab")
    linked = link_unchanged(files_of(3, 3, 3, 3), {"layers.0"}, saved, staging)
    assert linked == {"model-1.safetensors": {"bytes": 3, "sha256": "model-1.safetensors"}}
    assert (staging / "model-1.safetensors").samefile(saved.folder / "model-1.safetensors")


def test_without_hard_links_files_are_copied(saved, monkeypatch):
    def link(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(weights_module.os, "link", link)
    staging = saved.folder.with_name("tmp-checkpoint-2")
    assert len(link_unchanged(files_of(3, 3, 3), set(), saved, staging)) == 3
    copy = staging / "model-1.safetensors"
    assert copy.read_bytes() == b"abc"
    assert copy.stat().st_nlink == 1


def test_what_counts_as_changed():
    changes = BlockChanges()
    changes.note(["a"], 1)
    assert changes.take(1) == {"a"}
    changes.note(["a"], 1)  # a period that ends with the checkpoint
    changes.note(["b"], 2)
    assert changes.take(3) == {"b"}
    changes.give_back({"b"})
    changes.note(["c"], 4)
    assert changes.take(4) == {"b", "c"}
