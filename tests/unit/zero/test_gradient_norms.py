"""The norm of gradients: in chunks, as DeepSpeed's own, and under model parallelism."""

from types import SimpleNamespace

import deepspeed
import pytest
import torch
from cases import full
from engines import GRADIENT_NAMES, train_step, without
from models import tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.zero import gradients

INTERVAL, LR = 3, 1e-3

pytestmark = pytest.mark.usefixtures("cpu_ops")


@pytest.mark.parametrize("ds_config", ["zero2", "zero3", "zero2_offload"])
def test_a_norm_taken_in_chunks_is_the_norm(ds_config):
    accumulation = 2 if "offload" in ds_config else 1
    whole, chunks = (run_ranks(norms_of_steps, 2, ds_config, size, accumulation)[0] for size in (1 << 30, 300))
    if "offload" not in ds_config:
        plain = run_ranks(norms_of_steps, 2, ds_config, 1 << 30, accumulation, True)[0]
        assert whole["norms"] == plain["norms"], "DeepSpeed's own, to the bit, with one collective"
        assert whole["calls"] < plain["calls"]
    assert chunks["norms"] == pytest.approx(whole["norms"], rel=1e-6)
    assert chunks["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    assert chunks["most"] <= 300 < whole["most"]


def norms_of_steps(ds_config: str, chunk: int, accumulation: int, plain: bool = False) -> dict:
    """Norms, losses and collectives of some steps; `plain`: the norms are DeepSpeed's own."""
    defaults = gradients.NORM_CHUNK, gradients.CPU_NORM_CHUNK
    gradients.NORM_CHUNK = gradients.CPU_NORM_CHUNK = chunk
    with without(*(GRADIENT_NAMES if plain else ())):
        found = watch_norms(ds_config, accumulation)
    gradients.NORM_CHUNK, gradients.CPU_NORM_CHUNK = defaults
    return found


def watch_norms(ds_config: str, accumulation: int) -> dict:
    # Drawn blocks leave groups empty, of which rank 0 holds a placeholder and rank 1 nothing.
    config = lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL, lisa_always_on="rest")
    settings = {"max_grad_norm": 0.1, "gradient_accumulation_steps": accumulation}
    engine, lisa = lisa_dist.initialize(tiny_llama(), ds_config, config, lr=LR, **settings)
    losses, norms, most, calls, all_reduce = [], [], 0, 0, dist.all_reduce
    vector_norm, tensor_norm = torch.linalg.vector_norm, torch.Tensor.norm

    def watch(norm):
        def watched(tensor, *args, **kwargs):
            nonlocal most
            most = max(most, tensor.numel() if tensor.dtype == torch.float64 else 0)
            return norm(tensor, *args, **kwargs)

        return watched

    def count(*args, **kwargs):
        nonlocal calls
        calls += 1
        return all_reduce(*args, **kwargs)

    torch.linalg.vector_norm, torch.Tensor.norm, dist.all_reduce = watch(vector_norm), watch(tensor_norm), count
    for micro_batches in token_batches(2 * INTERVAL + 1, rows=4, micro_batches=accumulation):
        losses.append(train_step(engine, lisa, micro_batches))
        norms.append(float(engine.get_global_grad_norm()))
    torch.linalg.vector_norm, torch.Tensor.norm, dist.all_reduce = vector_norm, tensor_norm, all_reduce
    engine.destroy()
    return {"losses": losses, "norms": norms, "most": most, "calls": calls}


@pytest.mark.parametrize("ds_config", ["zero2", full("zero3")])
def test_norms_under_model_parallelism_count_the_parts_of_other_ranks(ds_config):
    plain, own = (run_ranks(norms_of_parts, 2, ds_config, plain) for plain in (True, False))
    assert own == plain, "there DeepSpeed takes its own"
    assert own[0] == own[1], "each rank has gradients of its own rows, and both know the norm of all"


def two_parts() -> SimpleNamespace:
    """An mpu as Megatron has it: two ranks with a part of the model each."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    return SimpleNamespace(
        get_model_parallel_rank=dist.get_rank,
        get_model_parallel_world_size=lambda: 2,
        get_model_parallel_group=lambda: dist.group.WORLD,
        get_data_parallel_rank=lambda: 0,
        get_data_parallel_world_size=lambda: 1,
        get_data_parallel_group=lambda: alone,
    )


def norms_of_parts(ds_config: str, plain: bool) -> list[float]:
    with without(*(GRADIENT_NAMES if plain else ())):
        return norms_under_model_parallelism(ds_config)


def norms_under_model_parallelism(ds_config: str) -> list[float]:
    model = tiny_llama()
    for parameter in model.model.layers.parameters():
        parameter.model_parallel = parameter.ndim > 1  # so Megatron marks what is one rank's part
    lisa = lisa_dist.LisaController(model, lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL))
    optimizer = lisa_dist.build_optimizer(lisa.param_groups(), lr=LR)
    config = lisa_dist.load_ds_config(ds_config, model=model)
    parts = two_parts()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=parts)
    lisa.attach(engine)
    norms = []
    for micro_batches in token_batches(INTERVAL + 2, rows=4):
        train_step(engine, lisa, micro_batches)
        norms.append(float(engine.get_global_grad_norm()))
    lisa.close()
    engine.destroy()
    dist.destroy_process_group(parts.get_data_parallel_group())
    deepspeed.utils.groups.mpu = None  # which DeepSpeed would keep for the engines of other tests
    return norms
