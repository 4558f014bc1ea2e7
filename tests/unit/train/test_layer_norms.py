"""Norms of blocks against whole copies of the weights, on any stage, and of adapters against peft's own merge."""

import copy
import csv
import re
from pathlib import Path

import deepspeed
import pytest
import torch
from cases import full
from datasets import Dataset
from models import tiny_gpt2, tiny_llama, token_batches
from peft import LoraConfig, get_peft_model
from ranks import run_ranks
from runs import ROOT
from torch import distributed as dist
from trainers import Shuffled, cpu_arguments, rows_of
from transformers import Trainer, TrainerCallback

from lisa_dist import LisaConfig
from lisa_dist.run.arguments import RunArguments
from lisa_dist.train.layer_norms import LayerNorms
from lisa_dist.zero.parameters import local_shard

STEPS, RATE = 4, 1e-2
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEADER = ["block", "weight_norm", "update_norm", "moved_norm"]


def block_of(name: str) -> str:
    """The block of a parameter of a Llama or a GPT-2, by its name in the model without adapters."""
    layer = re.search(r"\.(?:layers|h)\.(\d+)\.", f".{name}")
    if layer:
        return f"layers.{layer[1]}"
    outer = {"embed_tokens": "embed", "wte": "embed", "wpe": "embed", "lm_head": "head"}
    return next((block for part, block in outer.items() if part in name), "rest")


class Copies(TrainerCallback):
    """The weights of the whole model after each step, by block, as one vector in fp64; of adapters merged by peft."""

    def __init__(self, merged: bool = False):
        self._merged, self.seen, self.products = merged, [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(self._copy(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(self._copy(model))
        self.products.append(product_norms(model) if self._merged else {})

    def _copy(self, model) -> dict[str, torch.Tensor]:
        if self._merged:
            assert not any(hasattr(parameter, "ds_id") for parameter in model.parameters())
            model = copy.deepcopy(model).double().merge_and_unload()
        named = list(model.named_parameters())
        with deepspeed.zero.GatheredParameters([one for _, one in named if hasattr(one, "ds_id")]):
            blocks = {}
            for name, parameter in named:
                blocks.setdefault(block_of(name), []).append(parameter.detach().double().view(-1).clone())
        return {block: torch.cat(parts) for block, parts in blocks.items()}

    def norms(self, every: int = 1) -> dict[str, list[float]]:
        """The columns of each block: mean weight norm, mean norm of a step, norm of all of them."""
        steps = range(every, len(self.seen), every)
        return {
            block: [
                sum(self.seen[step][block].norm().item() for step in steps) / len(steps),
                sum((self.seen[step][block] - self.seen[step - 1][block]).norm().item() for step in steps) / len(steps),
                (self.seen[-1][block] - first).norm().item(),
            ]
            for block, first in self.seen[0].items()
        }


class FilledPadding(TrainerCallback):
    """Makes what fills up the last rank's part of a parameter under ZeRO-3 large: it is no weight."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if hasattr(parameter, "ds_tensor"):
                share = parameter.ds_tensor.numel()
                parameter.ds_tensor[max(0, parameter.ds_numel - dist.get_rank() * share) :] = 1e3


def train(model, folder, kind=Trainer, every: int = 1, callbacks=(), resume=None, own=None, **settings) -> None:
    """A run of STEPS steps of four rows on all ranks together."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    default = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // ranks,
        "learning_rate": RATE,
        "weight_decay": 0.1,
    }
    trainer = kind(
        model=model,
        args=cpu_arguments(str(folder), lr_scheduler_type="constant", bf16=False, **default | settings),
        train_dataset=Dataset.from_list(rows_of(token_batches(STEPS, rows=4).flatten(0, 1).tolist())),
        callbacks=[*callbacks, LayerNorms(every)],
        **own or {},
    )
    trainer.train(resume_from_checkpoint=resume)


def read(folder) -> tuple[list[str], dict[str, list[float]]]:
    with open(Path(folder) / "lisa_norms.csv", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    return header, {block: [float(value) for value in values] for block, *values in lines}


def check_against_copies(ds_config: str, method: str, folder: str) -> None:
    """On each rank, of which rank 0 compares."""
    copies = Copies()
    how = {"deepspeed": str(ROOT / "ds_configs" / f"{ds_config}.json"), "callbacks": [copies, FilledPadding()]}
    if method == "lisa":
        how |= {"kind": Shuffled, "own": {"lisa_config": LisaConfig(lisa_interval_steps=2)}}
    model = tiny_llama()
    model.score = torch.nn.Parameter(torch.ones(3))  # in rest, and padded on two ranks
    train(model, folder, every=2, **how)
    if dist.get_rank() == 0:
        header, found = read(folder)
        assert header == HEADER
        assert list(found) == ["embed", *(f"layers.{layer}" for layer in range(6)), "head", "rest"]
        expected = copies.norms(every=2)
        for block, norms in expected.items():
            assert found[block] == pytest.approx(norms, rel=1e-6), block
        still = [block for block, norms in expected.items() if norms[2] == 0]
        assert bool(still) == (method == "lisa")  # in two periods some layers have slept


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(("ds_config", "method"), [full("zero2", "full"), full("zero3", "full"), ("zero3", "lisa")])
def test_norms_are_those_of_whole_copies(tmp_path, ds_config, method):
    run_ranks(check_against_copies, 2, ds_config, method, str(tmp_path))


def with_adapters(tied: bool, gpt2: bool = False, **settings):
    """A model with adapters whose product is large beside its weights, so that a mistake in either is seen."""
    model = tiny_gpt2(num_layers=2) if gpt2 else tiny_llama(num_layers=2, tied=tied)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=64, task_type="CAUSAL_LM", **settings))


def product_norms(model) -> dict[str, float]:
    """The norm of what the adapters of each block add, by peft."""
    squares = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "scaling", {}):
            block = block_of(f"{name}.")
            delta = module.get_delta_weight("default").detach().double()
            squares[block] = squares.get(block, 0.0) + delta.square().sum().item()
    return {block: square**0.5 for block, square in squares.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"tied": False, "target_modules": "all-linear"},
        {"tied": False, "target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
        {"tied": False, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"tied": True, "gpt2": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ],
    ids=["linear", "ends", "copies", "transposed"],
)
def test_norms_of_adapters_are_those_of_the_merged_model(tmp_path, settings):
    copies = Copies(merged=True)
    train(with_adapters(**settings), tmp_path, callbacks=[copies])
    header, found = read(tmp_path)
    assert header == [*HEADER, "product_norm"]
    for block, norms in copies.norms().items():
        mean = sum(seen.get(block, 0.0) for seen in copies.products) / STEPS
        assert found[block] == pytest.approx([*norms, mean], rel=1e-4), block
    assert found["layers.0"][3] > 0
    if "modules_to_save" in settings or "embed_tokens" in settings["target_modules"]:
        assert min(found["embed"][2], found["head"][2]) > 0
    else:
        assert found["embed"][1:] == [0, 0, 0]


@pytest.mark.parametrize("at", ["embed_tokens", "lm_head"])
def test_a_tied_matrix_with_an_adapter_at_one_end_is_two(tmp_path, at):
    """There embedding and head are different matrices as they act, which no merge can write down."""
    model = with_adapters(tied=True, target_modules=["q_proj", at])
    train(model, tmp_path, learning_rate=RATE)
    _, found = read(tmp_path)
    base = model.get_base_model().model.embed_tokens
    base = (base.base_layer if at == "embed_tokens" else base).weight.detach()
    adapted, other = ("embed", "head") if at == "embed_tokens" else ("head", "embed")
    assert found[other] == pytest.approx([base.norm().item(), 0, 0, 0], rel=1e-5)
    assert found[adapted][2] == pytest.approx(product_norms(model)[adapted], rel=1e-4)
    assert found[adapted][0] > 1.01 * base.norm().item()


def train_adapters(ds_config: str, folder: str) -> None:
    model = with_adapters(tied=False, target_modules=[*LINEAR, "embed_tokens", "lm_head"], lora_dropout=0.0)
    train(model, folder, deepspeed=str(ROOT / "ds_configs" / f"{ds_config}.json"))


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_norms_of_adapters_are_the_same_on_every_stage(tmp_path):
    for ds_config in ("zero2", "zero3"):
        run_ranks(train_adapters, 2, ds_config, str(tmp_path / ds_config))
    header, whole = read(tmp_path / "zero2")
    assert header == [*HEADER, "product_norm"]
    for block, norms in read(tmp_path / "zero3")[1].items():
        assert norms == pytest.approx(whole[block], rel=1e-4), block
    assert whole["head"][3] > 0


def test_a_cut_run_leaves_what_it_has_seen(tmp_path):
    copies = Copies()

    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_llama(num_layers=2), tmp_path, callbacks=[copies, Cut()], save_strategy="steps", save_steps=2)
    copies.seen = copies.seen[:3]  # until the save
    _, found = read(tmp_path)
    for block, norms in copies.norms().items():
        assert found[block] == pytest.approx(norms, rel=1e-6), block


def test_a_resumed_run_begins_anew(tmp_path):
    train(tiny_llama(num_layers=2), tmp_path, save_strategy="steps", save_steps=3)
    whole, copies = read(tmp_path)[1], Copies()
    train(tiny_llama(num_layers=2), tmp_path, callbacks=[copies], resume=str(tmp_path / "checkpoint-3"))
    assert len(copies.seen) == 2
    _, found = read(tmp_path)
    for block, norms in copies.norms().items():
        assert found[block] == pytest.approx(norms, rel=1e-6), block
        assert found[block][2] < whole[block][2], block


def test_what_cannot_be_looked_at_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--layer_norms 5: the run has 4 steps, so none would be looked at; give at"):
        train(tiny_llama(num_layers=2), tmp_path, every=5)
    with pytest.raises(ValueError, match=r"--layer_norms: .*lora_magnitude_vector.* is of an adapter whose norms are"):
        train(with_adapters(tied=False, target_modules=["q_proj"], use_dora=True), tmp_path)
    with pytest.raises(ValueError, match="--layer_norms -1: looks at every N-th step"):
        RunArguments(layer_norms=-1)
    absent = torch.nn.Parameter(torch.zeros(4))
    absent.ds_tensor = torch.zeros(2, dtype=torch.int8)
    absent.ds_tensor.status = type("Status", (), {"name": "AVAILABLE"})
    with pytest.raises(ValueError, match="keeps weights on NVMe"):
        local_shard(absent)
