"""Saved models load with plain `from_pretrained`, bit for bit, whatever the stage, the shards and the names."""

import errno
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from cases import full
from engines import full_weights, my_rows, train_step
from models import tiny_gpt2, tiny_llama, tiny_mixtral, token_batches
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed as dist
from transformers import AutoModelForCausalLM

import lisa_dist
from lisa_dist.checkpoint import weights
from lisa_dist.checkpoint.export import export_checkpoint
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.checkpoint.weights import (
    _check_same_model,
    _describe_tensors,
    _fill_shards,
    _open_weights,
    named_parts,
    read_weights,
    save_without_weights,
    write_weights,
)
from lisa_dist.commands.export import main as export_main
from lisa_dist.core.blocks import find_blocks
from lisa_dist.ds_config import read_ds_config

pytestmark = pytest.mark.usefixtures("cpu_ops")


def train_and_save(folder: str, ds_config: str, build, dtype: torch.dtype, max_shard_size: int) -> dict:
    config = read_ds_config(ds_config)
    config["zero_optimization"]["stage3_max_reuse_distance"] = 0  # let go of weights as models larger than this one do
    engine, lisa = lisa_dist.initialize(build().to(dtype), config, lisa_dist.LisaConfig.plain(), lr=1e-2)
    for micro_batches in token_batches(4, rows=4):
        train_step(engine, lisa, micro_batches)
    with torch.no_grad():  # stage 3 now fetches ahead for a backward pass, and must not be left with it
        engine(input_ids=my_rows(micro_batches[0]))
    save_checkpoint(lisa, Path(folder) / "checkpoint-4")
    out = Path(folder) / "saved"
    if dist.get_rank() == 0:
        out.mkdir()
        save_without_weights(lambda path: engine.module.save_pretrained(path, state_dict={}), out)
        (out / "model-00001-of-00099.safetensors").touch()
    write_weights(engine, lisa.blocks, out, dist.get_rank() == 0, max_shard_size)
    assert not (out / "model-00001-of-00099.safetensors").exists(), "a shard of an earlier save"
    trained = full_weights(engine)
    engine.destroy()
    return trained


@pytest.mark.parametrize(
    ("ds_config", "build", "dtype", "max_shard_size"),
    [
        full("zero2", tiny_llama, torch.float32, 1 << 30),
        ("zero3", tiny_llama, torch.bfloat16, 100_000),
        full("zero3_offload", tiny_gpt2, torch.float32, 300_000),
        ("zero2", tiny_mixtral, torch.bfloat16, 1 << 30),
        full("zero3", tiny_mixtral, torch.float32, 300_000),
    ],
)
def test_from_pretrained_loads_what_was_trained(tmp_path, ds_config, build, dtype, max_shard_size):
    trained = run_ranks(train_and_save, 2, str(tmp_path), ds_config, build, dtype, max_shard_size)[0]
    export_checkpoint(tmp_path / "checkpoint-4", tmp_path / "exported")
    for name in ("checkpoint-4", "saved", "exported"):
        folder = tmp_path / name
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for parameter, value in loaded.named_parameters():
            assert value.dtype == dtype
            assert torch.equal(value, trained[parameter]), f"{parameter} in {name}"
        files = [path for path in folder.glob("*.safetensors") if not path.name.startswith("lisa_")]
        assert all(path.stat().st_size < max_shard_size + 200_000 for path in files)
        if max_shard_size < 1 << 30 or name == "checkpoint-4":
            assert len(files) > 2
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(value.nbytes for value in trained.values())
        if build is tiny_mixtral and name != "checkpoint-4":
            keys = {key for path in files for key in safe_open(path, framework="pt").keys()}  # noqa: SIM118
            assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in keys, "the names that the hub's files have"
    assert not list((tmp_path / "exported").glob("lisa_*"))


def test_shards_are_filled_to_the_last_byte():
    model = tiny_llama()
    limit = 2 * sum(value.nbytes for value in model.model.layers[0].parameters())
    shards = _fill_shards([tensors for _, tensors in named_parts(model, find_blocks(model))], limit)
    sizes = [sum(value.nbytes for tensors in parts for value in tensors.values()) for parts in shards]
    assert sizes[1:-1] == [limit, limit], "behind the embedding and one layer, before one layer and the head"


def described(path: Path) -> dict:
    return _describe_tensors(_open_weights(path.parent, [path.name]))


def test_weights_of_another_model_are_refused(tmp_path):
    model, path = tiny_llama(tied=True), tmp_path / "model.safetensors"
    parameters = dict(model.named_parameters())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert weights.keys() - parameters.keys() == {"lm_head.weight"}, "the second name of the tied matrix"
    save_file(weights, path)
    _check_same_model(model, parameters, described(path), tmp_path, same_dtype=True)
    save_file(weights | {"model.more.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 of its tensors are not in the model, such as model\.more\.weight"):
        _check_same_model(model, parameters, described(path), tmp_path, same_dtype=True)


def test_an_export_is_refused_where_it_cannot_be_right(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"is no checkpoint of a LISA run: there is no lisa_state\.json in it"):
        export_checkpoint(tmp_path, tmp_path / "out")
    run_ranks(train_and_save, 1, str(tmp_path), "zero2", tiny_llama, torch.float32, 1 << 30)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file can be no folder \(File exists\); choose another"):
        export_checkpoint(tmp_path / "checkpoint-4", tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="saved is there already"):
        export_checkpoint(tmp_path / "checkpoint-4", tmp_path / "saved")
    (tmp_path / "checkpoint-4" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        export_checkpoint(tmp_path / "checkpoint-4", tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        export_main(str(tmp_path / "checkpoint-4"), str(tmp_path / "out"))
    assert "lisa-dist export: " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def write_and_read(ds_config: str, written: str, on_a_host: int, fault: str | None = None) -> dict:
    """Which files of weights this rank has written and opened, with their bytes; what is read, or the error."""
    rank, folder, used = dist.get_rank(), Path(written), {"wrote": {}, "opened": {}}
    of_second_host = {"other disk": "x" * 300, "other model": "elsewhere", "torn index": "elsewhere"}

    def write(tensors, path, **options):
        if fault == "full disk" and rank == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **options)
        used["wrote"][path.name.removeprefix("tmp-")] = path.stat().st_size

    def opened(path, **options):
        used["opened"][path.name] = path.stat().st_size
        return safe_open(path, **options)

    models = [tiny_llama(seed=seed).to(torch.bfloat16) for seed in (0, 9)]
    models[0].register_buffer("counts", torch.arange(3))
    models[1].register_buffer("counts", torch.zeros(3, dtype=torch.long))
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, SLURMD_NODENAME=f"host{rank // on_a_host}"))
        stack.enter_context(patch.multiple(weights, save_file=write, safe_open=opened))
        engines = [lisa_dist.initialize(model, ds_config, lisa_dist.LisaConfig.plain(), lr=1e-2) for model in models]
        try:
            if fault == "other model":
                write_weights(engines[1][0], engines[1][1].blocks, folder / "elsewhere", rank == 0, 50_000)
                used["wrote"].clear()
            folder = folder / of_second_host.get(fault, "") if rank >= 2 else folder
            write_weights(engines[0][0], engines[0][1].blocks, folder, rank == 0, 50_000)
            if fault == "torn index" and rank == 0:
                os.truncate(folder / "model.safetensors.index.json", 99)
            if fault == "torn file" and rank == 0:
                os.truncate(sorted(folder.glob("*.safetensors"))[1], 9_000)
            dist.barrier()
            read_weights(engines[1][0], engines[1][1].blocks, folder)
        except ValueError as error:
            used["error"] = str(error).replace(written, "")
    weights_of = [full_weights(engine) | dict(engine.module.named_buffers()) for engine, _ in engines]
    used["same"] = all(torch.equal(value, weights_of[1][name]) for name, value in weights_of[0].items())
    for engine, _ in engines:
        engine.destroy()
    return used


@pytest.mark.parametrize("ds_config", ["zero3", full("zero2")])
def test_each_host_writes_and_reads_its_share_of_the_files(tmp_path, ds_config):
    """As many bytes as of one host, in the same files."""
    folders = {on_a_host: tmp_path / str(on_a_host) for on_a_host in (2, 4)}
    used = {}
    for on_a_host, folder in folders.items():
        folder.mkdir()
        used[on_a_host] = run_ranks(write_and_read, 4, ds_config, str(folder), on_a_host)
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders.values()]
    assert files[0] == files[1]
    shards = sorted(name for name in files[0] if name.endswith(".safetensors"))
    assert len(shards) > 4
    for on_a_host, ranks in used.items():
        assert all(one["same"] for one in ranks)
        for what in ("wrote", "opened"):
            hosts = 4 // on_a_host
            for rank, one in enumerate(ranks):
                own = shards[rank // on_a_host :: hosts] if rank % on_a_host == 0 else []
                assert one[what] == {name: len(files[0][name]) for name in own}, (on_a_host, what, rank)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("full disk", r"could not be written \(rank 2: OSError: .*No space left on device\); .* choose another"),
        ("torn index", r"model\.safetensors\.index\.json: cannot be read"),
        ("torn file", r"model-00002-of-\d+\.safetensors is damaged \(.*\); use a whole copy of it\."),
    ],
)
def test_an_error_of_one_host_s_rank_is_raised_on_all(tmp_path, fault, said):
    ranks = run_ranks(write_and_read, 4, "zero3", str(tmp_path), 2, fault)
    assert [re.search(said, one["error"]) is not None for one in ranks] == [True] * 4
    assert {one["error"] for one in ranks} == {ranks[0]["error"]}
    assert "\n" not in ranks[0]["error"]
    assert not any(one["same"] for one in ranks)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() is (fault != "full disk")
    assert not list(tmp_path.glob("tmp-*"))


@pytest.mark.parametrize("fault", ["other disk", "other model"])
def test_a_host_that_sees_other_files_than_rank_0_neither_writes_nor_reads(tmp_path, fault):
    (tmp_path / "elsewhere").mkdir()
    ranks = run_ranks(write_and_read, 4, "zero3", str(tmp_path), 2, fault)
    assert [one.get("error") for one in ranks] == [None] * 4
    assert [one["same"] for one in ranks] == [True] * 4, "what rank 0 has written, and nothing of another model"
    shards = {path.name: path.stat().st_size for path in tmp_path.glob("model-*")}
    for what in ("wrote", "opened"):
        assert [one[what] for one in ranks] == [shards, {}, {}, {}], what
