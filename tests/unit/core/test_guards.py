"""A step whose loss or gradients are not finite changes nothing, and is said or stops the run."""

import pytest
import torch
from cases import full
from deepspeed.accelerator import get_accelerator
from engines import full_weights, my_rows
from models import tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.checkpoint.resume import load_checkpoint
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.ds_config import read_ds_config
from lisa_dist.errors import SharedError

pytestmark = pytest.mark.usefixtures("cpu_ops")


def weights_of(engine) -> torch.Tensor:
    return torch.cat([weight.view(-1) for weight in full_weights(engine).values()])


def step(engine, lisa, tokens, spoil: str | None = None) -> None:
    lisa.on_step_begin()
    rows = my_rows(tokens)
    loss = engine(input_ids=rows, labels=rows).loss
    if spoil == "loss" and dist.get_rank() == 1:
        loss = loss * float("nan")
    lisa.note_loss(loss)
    if spoil == "gradient":
        weight = engine.module.model.norm.weight
        handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    engine.backward(loss)
    engine.step()
    if spoil == "gradient":
        handle.remove()


def spoil_a_step(ds_config: str, dtype: torch.dtype, policy: str, spoil: str, folder: str = "") -> str | None:
    engine, lisa = lisa_dist.initialize(
        tiny_llama().to(dtype),
        ds_config,
        lisa_dist.LisaConfig(lisa_interval_steps=3, lisa_nonfinite=policy),
        lr=1e-2,
    )
    batches = [tokens for (tokens,) in token_batches(6, rows=4)]
    said = None
    for index, tokens in enumerate(batches):
        before = weights_of(engine)
        step(engine, lisa, tokens, spoil if index == 3 else None)
        assert torch.equal(before, weights_of(engine)) == (index == 3), f"step {index}"
        if index == 3 and policy == "stop":
            with pytest.raises(RuntimeError, match="not finite") as error:
                lisa.on_step_begin()
            said = str(error.value)
            break
        if index == 4:
            save_checkpoint(lisa, f"{folder}/checkpoint-5")
            lisa.config.lisa_nonfinite = "stop"
            load_checkpoint(lisa, f"{folder}/checkpoint-5")
            lisa.on_step_begin()  # the step that was skipped is no new one
    assert weights_of(engine).isfinite().all()
    engine.destroy()
    return said


def spoil_the_last_step(takes_norm: bool) -> str:
    ds_config = read_ds_config("zero2")
    ds_config["zero_optimization"]["compute_grad_norm"] = takes_norm
    how = {"optim": "lisa_adamw", "max_grad_norm": float(takes_norm)}
    engine, lisa = lisa_dist.initialize(tiny_llama().to(torch.bfloat16), ds_config, lisa_dist.LisaConfig.plain(), **how)
    for index, (tokens,) in enumerate(token_batches(2, rows=4)):
        step(engine, lisa, tokens, "gradient" if index == 1 else None)
    with pytest.raises(SharedError, match="not finite") as error:  # of which rank 0 prints one line
        lisa.close()
    engine.destroy()
    return str(error.value)


@pytest.mark.parametrize("takes_norm", [True, False])
def test_a_spoilt_last_step_is_said_at_the_end(takes_norm):
    assert run_ranks(spoil_the_last_step, 1, takes_norm)[0].startswith("step 2, period 0")


@pytest.mark.parametrize(
    ("ds_config", "dtype", "spoil"),
    [
        ("zero1", torch.bfloat16, "loss"),
        ("zero2", torch.bfloat16, "gradient"),
        full("zero2", torch.float32, "loss"),
        full("zero3", torch.bfloat16, "loss"),
        ("zero3", torch.float32, "gradient"),
        full("zero2_offload", torch.bfloat16, "loss"),
        ("zero3_offload", torch.float32, "loss"),
    ],
)
def test_a_spoilt_step_stops_the_run_with_step_ranks_and_layers(ds_config, dtype, spoil):
    for said in run_ranks(spoil_a_step, 2, ds_config, dtype, "stop", spoil):
        assert said.startswith("step 4, period 1, active layers [")
        assert ("the loss of rank(s) [1] is not finite" if spoil == "loss" else "the gradients are not finite") in said


@pytest.mark.parametrize("dtype", [full(torch.float32), torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ds_config", ["zero2", "zero3"])
def test_a_spoilt_step_may_be_skipped_and_the_run_resumed(tmp_path, ds_config, dtype):
    run_ranks(spoil_a_step, 2, ds_config, dtype, "skip", "loss", str(tmp_path))


def scale_over_switches(ds_config: str, folder: str) -> list[float]:
    """fp16: the scaler halves its scale at an overflow, and the scale goes on over switches and a resume."""

    def start(seed: int):
        model = tiny_llama(seed).half()
        config = lisa_dist.LisaConfig(lisa_interval_steps=2)
        return lisa_dist.initialize(model, FP16 | {"zero_optimization": {"stage": int(ds_config[4])}}, config, lr=1e-3)

    accelerator = get_accelerator()
    supported, accelerator.is_fp16_supported = accelerator.is_fp16_supported, lambda: True  # slow on a CPU, but right
    engine, lisa = start(0)
    scales = []
    for index, (tokens,) in enumerate(token_batches(6, rows=4)):
        step(engine, lisa, tokens, "loss" if index in (1, 2) else None)
        scales.append(engine.optimizer.loss_scale)
        if index == 3:
            save_checkpoint(lisa, f"{folder}/checkpoint-4")
    engine.destroy()
    engine, lisa = start(1)
    load_checkpoint(lisa, f"{folder}/checkpoint-4")
    scales.append(engine.optimizer.loss_scale)
    engine.destroy()
    accelerator.is_fp16_supported = supported
    return scales


FP16 = {
    "train_micro_batch_size_per_gpu": 1,
    "fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 100},
}


@pytest.mark.parametrize("ds_config", [full("zero2"), "zero3"])
def test_the_fp16_scale_survives_switches_and_a_resume(tmp_path, ds_config):
    scales = run_ranks(scale_over_switches, 2, ds_config, str(tmp_path))[0]
    assert scales == [256.0, 128.0, 64.0, 64.0, 64.0, 64.0, 64.0]
