"""A resumed run goes on as if nothing had happened: N steps, resume, N steps are 2N steps, bit for bit.

Every resume begins from other initial weights than the run had, so that what is not restored is seen.
"""

from pathlib import Path

import deepspeed
import pytest
import torch
from models import tiny_gpt2, tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.checkpoint import load_checkpoint, save_checkpoint

STAGES = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
STEPS, INTERVAL = 8, 3
# After the last step of a period, where the next one switches; after the first step of one; before its last.
CUTS = {"switch step": 3, "first step": 4, "last step": 5}

pytestmark = pytest.mark.usefixtures("cpu_ops")


def start(ds_config, dtype, options, model=None):
    build = tiny_gpt2 if options.get("tied") else tiny_llama
    return lisa_dist.initialize(
        (model or build()).to(dtype),
        ds_config,
        lisa_dist.LisaConfig(**{"lisa_interval_steps": INTERVAL, "lisa_debug": True} | options.get("lisa", {})),
        lr=1e-3,
        weight_decay=0.1,
        optim=options.get("optim", "adamw_torch"),
        gradient_accumulation_steps=options.get("accumulation", 1),
        output_dir=options.get("output_dir"),
    )


def train(engine, lisa, until: int, options: dict, at_step=None) -> list[float]:
    """Train from the engine's step to `until`; the losses of the global batches."""
    losses = []
    batches = token_batches(STEPS, rows=4, micro_batches=options.get("accumulation", 1))
    for step in range(engine.global_steps, until):
        total = torch.zeros(())
        for tokens in batches[step]:
            lisa.on_step_begin()
            rows = tokens.chunk(dist.get_world_size())[dist.get_rank()]
            loss = engine(input_ids=rows, labels=rows).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(batches[step])
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        if at_step is not None:
            at_step(engine.global_steps)
    return losses


def everything(engine, lisa) -> dict[str, torch.Tensor]:
    """Copies of all weights, and of this rank's masters and optimizer states."""
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        found = {name: value.detach().clone() for name, value in parameters.items()}
    for key, state in lisa.partition_states().items():
        for field, value in {"master": state.master, **state.optimizer_state}.items():
            found[f"{key}:{field}"] = torch.as_tensor(value).detach().clone()
    return found


def run_and_save(folder: str, ds_config: str, dtype: torch.dtype, options: dict) -> dict:
    """A run to the end that is saved at every cut on its way."""
    engine, lisa = start(ds_config, dtype, options)

    def save(step: int) -> None:
        if step in options.get("cuts", CUTS.values()):
            save_checkpoint(lisa, Path(folder) / f"checkpoint-{step}")

    losses = train(engine, lisa, STEPS, options, save)
    outcome = {"losses": losses, "everything": everything(engine, lisa), "layers": lisa.active_layers}
    outcome["visits"] = lisa.visit_counts
    engine.destroy()
    return outcome


def resume(folder: str, cut: int, ds_config: str, dtype: torch.dtype, options: dict) -> dict:
    """The rest of that run, from a checkpoint and other initial weights."""
    build = tiny_gpt2 if options.get("tied") else tiny_llama
    engine, lisa = start(ds_config, dtype, options, build(seed=99))
    load_checkpoint(lisa, Path(folder) / f"checkpoint-{cut}")
    losses = train(engine, lisa, STEPS, options)
    outcome = {"losses": losses, "everything": everything(engine, lisa), "layers": lisa.active_layers}
    outcome["visits"] = lisa.visit_counts
    engine.destroy()
    return outcome


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ds_config", STAGES)
def test_a_resumed_run_is_the_run(tmp_path, ds_config, dtype):
    check_resume(tmp_path, ds_config, dtype, {})


@pytest.mark.parametrize(
    ("ds_config", "options"),
    [
        ("zero1", {"accumulation": 2, "tied": True}),
        ("zero3", {"accumulation": 2, "tied": True, "lisa": {"lisa_state": "reset_all"}}),
        ("zero2", {"optim": "adamw_8bit"}),
        ("zero3", {"optim": "adamw_8bit"}),
        ("zero2", {"lisa": {"lisa_always_on": "head,rest", "lisa_frozen": "embed", "lisa_sampler": "reshuffle"}}),
    ],
)
def test_a_resumed_run_is_the_run_with(tmp_path, ds_config, options):
    check_resume(tmp_path, ds_config, torch.bfloat16, options)


def check_resume(tmp_path, ds_config, dtype, options) -> None:
    whole = run_ranks(run_and_save, 2, str(tmp_path), ds_config, dtype, options)
    for cut in CUTS.values():
        resumed = run_ranks(resume, 2, str(tmp_path), cut, ds_config, dtype, options)
        for rank in (0, 1):
            assert resumed[rank]["losses"] == whole[rank]["losses"][cut:]
            assert resumed[rank]["layers"] == whole[rank]["layers"]
            assert resumed[rank]["visits"] == whole[rank]["visits"]
            assert resumed[rank]["everything"].keys() == whole[rank]["everything"].keys()
            for name, value in whole[rank]["everything"].items():
                assert torch.equal(value, resumed[rank]["everything"][name]), f"{name} after step {cut}, rank {rank}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("zero2", 2), [("zero2", 1), ("zero2", 4), ("zero3", 2), ("zero2_offload", 2), ("zero1", 2)]),
        (("zero3", 2), [("zero3", 1), ("zero3", 4), ("zero2", 2), ("zero3_offload", 4)]),
        (("zero2_offload", 4), [("zero3", 2)]),
        (("zero1", 1), [("zero2", 2)]),
    ],
    ids=lambda value: str(value[0]),
)
def test_another_world_size_and_stage_goes_on_with_the_same_losses(tmp_path, before, after):
    ds_config, world_size = before
    options = {"cuts": [5]}
    whole = run_ranks(run_and_save, world_size, str(tmp_path), ds_config, torch.float32, options)[0]
    for ds_config, world_size in after:
        resumed = run_ranks(resume, world_size, str(tmp_path), 5, ds_config, torch.float32, options)[0]
        assert resumed["losses"] == pytest.approx(whole["losses"][5:], abs=1e-5), (ds_config, world_size)
        assert resumed["layers"] == whole["layers"]
        for name, value in whole["everything"].items():
            if name in dict(tiny_llama().named_parameters()):
                torch.testing.assert_close(resumed["everything"][name], value, rtol=0, atol=1e-4)  # a step is 1e-3


def test_8bit_states_go_on_elsewhere(tmp_path):
    """Quantized moments are cut anew: not bit for bit, but far nearer to the run than without them."""
    options = {"optim": "adamw_8bit", "cuts": [5]}
    whole = run_ranks(run_and_save, 2, str(tmp_path), "zero2", torch.float32, options)[0]
    elsewhere = [("zero2", 1, "adamw_8bit"), ("zero3", 2, "adamw_8bit"), ("zero2", 2, "adamw_torch")]
    for ds_config, world_size, optim in elsewhere:
        changed = options | {"optim": optim}
        resumed = run_ranks(resume, world_size, str(tmp_path), 5, ds_config, torch.float32, changed)[0]
        assert resumed["losses"] == pytest.approx(whole["losses"][5:], abs=2e-3), (ds_config, world_size, optim)
