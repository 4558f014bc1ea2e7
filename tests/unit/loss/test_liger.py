"""Liger's kernels under LISA: the same losses as without them, and at start an error for what cannot work.

Triton's interpreter runs the kernels, on ranks of their own: it must be chosen before Triton is imported, and Liger
replaces names in the modeling code of the whole process.
"""

import contextlib
import copy
import importlib.util
import io
import json
import sys
from unittest import mock

import numpy as np
import pytest
import ranks
import torch
from datasets import Dataset
from engines import full_weights, train_step
from models import tiny_gpt2, tiny_llama, tiny_mixtral, token_batches
from ranks import run_ranks
from reference import train_reference_by_blocks
from tokenizers import Tokenizer, models, pre_tokenizers
from trainers import InOrder, cpu_arguments
from transformers import PreTrainedTokenizerFast, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.liger import apply_liger_kernel
from trl import SFTConfig

import lisa_dist
from lisa_dist import LisaConfig, LisaTrainer
from lisa_dist.config import UserError
from lisa_dist.ds_config import find_ds_config
from lisa_dist.loss import liger
from lisa_dist.loss.liger import check_liger, settle_liger, why_no_liger_loss
from lisa_dist.memory.stand_ins import without_liger
from lisa_dist.memory.trace import FakeRun
from lisa_dist.memory.workload import Trained, Workload

LAYERS, STEPS, INTERVAL, LR, DECAY = 3, 4, 2, 1e-2, 0.1
ROWS, LENGTH = 2, 4  # few tokens: each takes the interpreter milliseconds a kernel
NO_FUSED_LOSS = {"fused_linear_cross_entropy": False}
ALWAYS_ON = "embed,head,rest"

needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="no liger-kernel")
# Importing its kernels takes ten seconds: one worker does.
pytestmark = [pytest.mark.usefixtures("cpu_ops"), pytest.mark.xdist_group("liger")]


@pytest.fixture(scope="module", autouse=True)
def _interpreting_ranks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(ranks, "_pools", {})
        yield
        ranks.stop_ranks()


def interpret_liger() -> list[str]:
    """Mend what the interpreter lacks; the list grows by the name of each kernel that is launched."""
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    if not hasattr(interpreter, "launched"):
        convert, call = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

        def scalars_too(value):
            """A compiled kernel has its float arguments as fp32 scalars; the interpreter leaves Python's floats."""
            if not isinstance(value, float):
                return convert(value)
            handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)

        def noted(self, *args, **kwargs):
            interpreter.launched.append(self.fn.__name__)
            return call(self, *args, **kwargs)

        interpreter.launched = []
        interpreter._implicit_cvt, interpreter.GridExecutor.__call__ = scalars_too, noted
        rms_norm.rsqrt = lambda value: tl.math.rsqrt(value)  # CUDA's own, which is a stub here
    interpreter.launched.clear()
    return interpreter.launched


def train_with_liger(ds_config: str, tied: bool, kernels: dict | None, settings: dict, checkpointing: bool) -> dict:
    """A loop of one's own; after every step what sleeps has not moved, and what is active has."""
    launched = interpret_liger()
    model = tiny_llama(num_layers=LAYERS, tied=tied)
    apply_liger_kernel(model, kernels)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = LisaConfig(lisa_interval_steps=INTERVAL, lisa_activated_layers=1, lisa_debug=True, **settings)
    engine, lisa = lisa_dist.initialize(model, ds_config, config, lr=LR, weight_decay=DECAY)
    losses, blocks_of_period = [], []
    weights = full_weights(engine)
    for micro_batches in token_batches(STEPS, ROWS, length=LENGTH):
        losses.append(train_step(engine, lisa, micro_batches))
        before, weights = weights, full_weights(engine)
        active = {f"layers.{layer}" for layer in lisa.active_layers} | {*lisa.active_blocks, *config.always_on}
        for block in lisa.blocks:
            moved = {name for name in block.parameters if not torch.equal(before[name], weights[name])}
            assert moved == (set(block.parameters) if block.name in active else set()), block.name
        blocks_of_period.append((*lisa.active_layers, *lisa.active_blocks))
    lisa.close()
    engine.destroy()
    return {"losses": losses, "blocks_of_period": blocks_of_period[::INTERVAL], "launched": set(launched)}


def reference_losses(blocks_of_period, always_on: str, **model_settings) -> list[float]:
    model, batches = tiny_llama(num_layers=LAYERS, **model_settings), token_batches(STEPS, ROWS, length=LENGTH)
    settings = {"lr": LR, "weight_decay": DECAY}
    return train_reference_by_blocks(model, blocks_of_period, always_on, INTERVAL, batches, **settings)


DRAWN = {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.5,head=0.5", "lisa_seed": 2}
FROZEN = {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}


@needs_liger
@pytest.mark.full
@pytest.mark.parametrize(
    ("ds_config", "tied", "kernels", "settings", "checkpointing"),
    [
        ("zero1", True, NO_FUSED_LOSS, FROZEN, True),
        ("zero2", False, None, DRAWN, True),
        ("zero3", False, NO_FUSED_LOSS | {"cross_entropy": True}, FROZEN, False),
    ],
)
def test_losses_equal_the_reference(ds_config, tied, kernels, settings, checkpointing):
    outcome = run_ranks(train_with_liger, 2, ds_config, tied, kernels, settings, checkpointing, interpret=True)[0]
    reference = reference_losses(outcome["blocks_of_period"], settings["lisa_always_on"], tied=tied)
    assert outcome["losses"] == pytest.approx(reference, abs=1e-5)
    assert len(set(outcome["blocks_of_period"])) > 1, "the test needs a switch to another set"
    kinds = ["_triton_rope", "_rms_norm_forward_kernel", "_rms_norm_backward_kernel", "_swiglu_backward_kernel"]
    if kernels is None or "cross_entropy" in kernels:
        kinds.append("liger_cross_entropy_kernel")
    assert set(kinds) <= outcome["launched"]


# In a Trainer


class InOrderSFT(InOrder, LisaTrainer):
    """TRL's, with its fused head."""


def train_in_trainer(
    output_dir: str, ds_config: str, sft: bool, settings: dict, vocab_size: int, checkpointed, loss: str = "chunked"
) -> dict:
    unset_hf_deepspeed_config()
    launched = interpret_liger()
    rows = [{"input_ids": row.tolist()} for row in token_batches(STEPS, ROWS, length=LENGTH).flatten(0, 2)]
    tokenizer = Tokenizer(models.WordLevel({str(index): index for index in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="1", pad_token="2")
    arguments = {
        "deepspeed": find_ds_config(ds_config),
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": DECAY,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "use_liger_kernel": True,
    }
    if sft:
        arguments |= {"bf16": False, "max_length": LENGTH, "gradient_checkpointing": False}
        rows = Dataset.from_list(rows)
    else:
        rows = [row | {"labels": row["input_ids"]} for row in rows]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer = (InOrderSFT if sft else InOrder)(
            model=tiny_llama(num_layers=LAYERS, vocab_size=vocab_size),
            args=cpu_arguments(output_dir, SFTConfig if sft else TrainingArguments, **arguments),
            train_dataset=rows,
            eval_dataset=rows.select([0, 1]) if sft else rows[:2],
            processing_class=tokenizer,
            lisa_config=LisaConfig(lisa_interval_steps=INTERVAL, lisa_activated_layers=1, **settings),
            checkpointed_layers=checkpointed,
            gpu_memory="1GiB" if checkpointed == "auto" else None,
            **({"loss": loss} if sft else {}),
        )
        trainer.train()
    history = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "right": [entry["mean_token_accuracy"] for entry in history if "mean_token_accuracy" in entry],
        "logged": {name for entry in history for name in entry},
        "evaluations": sum("eval_loss" in entry for entry in history),
        "blocks_of_period": [(*record.layers, *record.blocks) for record in trainer.lisa.records],
        "launched": set(launched),
        "output": output.getvalue().splitlines(),
    }


@needs_liger
@pytest.mark.full
def test_a_trl_trainer_is_planned_as_without_liger(tmp_path):
    outcome = run_ranks(train_in_trainer, 2, str(tmp_path), "zero3", True, {}, 128, "auto", interpret=True)[0]
    assert outcome["losses"] == pytest.approx(reference_losses(outcome["blocks_of_period"], ALWAYS_ON), abs=1e-5)
    assert outcome["evaluations"] == 2
    assert "Liger kernels: rope, rms_norm, swiglu" in outcome["output"]
    assert {"_triton_rope", "_rms_norm_backward_kernel"} <= outcome["launched"]
    assert json.loads((tmp_path / "lisa_memory.json").read_text())["planned"] is not None


@needs_liger
@pytest.mark.full
def test_a_trl_trainer_with_the_loss_of_liger(tmp_path):
    arguments = (2, str(tmp_path), "zero2", True, {}, 128, 0)
    outcome, chunked = (
        run_ranks(train_in_trainer, *arguments, loss, interpret=True)[0] for loss in ("liger", "chunked")
    )
    assert outcome["losses"] == pytest.approx(reference_losses(outcome["blocks_of_period"], ALWAYS_ON), abs=1e-5)
    assert outcome["right"] == chunked["right"]
    assert chunked["logged"] - outcome["logged"] == {"entropy"}, "of which Liger has none; evaluations have them"
    assert "liger_cross_entropy_kernel" in outcome["launched"] - chunked["launched"]


@needs_liger
@pytest.mark.full
def test_no_fused_loss_for_a_head_that_trains_alone(tmp_path):
    """A head as large as a layer takes its place, so nothing below it trains: the fused loss has no gradient then."""
    settings = {"lisa_always_on": "", "lisa_frozen": "embed,rest", "lisa_block_probability": "head=0.7", "lisa_seed": 1}
    outcome = run_ranks(train_in_trainer, 2, str(tmp_path), "zero3", False, settings, 512, None, interpret=True)[0]
    assert ("head",) in outcome["blocks_of_period"]
    reference = reference_losses(outcome["blocks_of_period"], "", vocab_size=512)
    assert outcome["losses"] == pytest.approx(reference, abs=1e-5)
    assert outcome["evaluations"] == 2
    off = "fused_linear_cross_entropy is off, since it has no gradient for a head that trains alone"
    assert off in str(outcome["output"])


def fake_run_after_liger() -> list[bool]:
    """Plan a Llama before Liger has replaced its modeling code, after that, and see what was replaced come back."""
    interpret_liger()
    from transformers.models.llama import modeling_llama

    def trace(loss: str):
        run = FakeRun(tiny_llama().config, Workload(seq_length=LENGTH, loss=loss))
        step = run.trace(run.groups(Trained((1,), ("embed", "head", "rest"))))
        return step.activations, step.logits, step.peak_after, [arrival.peak_before for arrival in step.arrivals]

    def traced() -> list:
        with without_liger():
            return [trace(loss) for loss in ("chunked", "own")]

    before = traced()
    apply_liger_kernel(tiny_llama(num_layers=1), NO_FUSED_LOSS | {"cross_entropy": True})
    replaced = modeling_llama.LlamaRMSNorm, torch.nn.functional.cross_entropy
    return [
        before == traced(),
        all(value.__module__.startswith("liger_kernel") for value in replaced),
        replaced == (modeling_llama.LlamaRMSNorm, torch.nn.functional.cross_entropy),
    ]


def steps_of_the_gpu_benchmark() -> dict:
    """The method with Liger of benchmarks/cost/gpu.py, which has no plan."""
    launched = interpret_liger()
    from benchmarks.common import runs
    from benchmarks.cost.gpu import LIGER

    run = runs.Run(LIGER, runs.shrunk_config("llama2-7b", 64, LAYERS), interval=INTERVAL)
    run.steps(INTERVAL + 1, LENGTH)
    return {"launched": set(launched), "planned": run.planned_bytes(LENGTH)}


@needs_liger
@pytest.mark.full
def test_the_arm_of_the_gpu_benchmark():
    (found,) = run_ranks(steps_of_the_gpu_benchmark, 1, interpret=True)
    assert {"_triton_rope", "_rms_norm_backward_kernel", "liger_cross_entropy_kernel"} <= found["launched"]
    assert found["planned"] is None


@pytest.mark.full
@needs_liger
def test_a_plan_runs_the_modeling_code_without_liger():
    assert run_ranks(fake_run_after_liger, 1, interpret=True)[0] == [True, True, True]


# At the start


def arguments_with(**changes) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", use_cpu=True, use_liger_kernel=True, **changes)


def outcome_of_check(model: str, kernels: dict | None, settings: dict, changes: dict, trl_head: bool) -> tuple:
    unset_hf_deepspeed_config()
    config = (tiny_gpt2 if model == "gpt2" else tiny_llama)().config
    if model == "llama with relu":
        config.hidden_act = "relu"
    args = arguments_with(liger_kernel_config=kernels, **changes)
    try:
        return check_liger(args, config, LisaConfig.plain(**settings), trl_head), args.liger_kernel_config
    except UserError as error:
        return str(error), None


def reasons_against_its_loss() -> list[str | None]:
    args, config = arguments_with(), LisaConfig.plain()
    args.loss_type = "nll"
    reasons = [why_no_liger_loss(args, model.config, config) for model in (tiny_llama(), tiny_gpt2(), tiny_mixtral())]
    reasons.append(why_no_liger_loss(args, tiny_llama().config, LisaConfig.plain(**HEAD_ALONE)))
    args.loss_type = "dft"
    return [*reasons, why_no_liger_loss(args, tiny_llama().config, config)]


@needs_liger
@pytest.mark.full
def test_where_the_loss_of_liger_cannot_be_had():
    assert run_ranks(reasons_against_its_loss, 2, interpret=True)[0] == [
        None,
        "liger-kernel has no kernels for model type gpt2",
        "it would count the loss of the model's routers twice",
        "it has no gradient for a head that trains alone, which --lisa_always_on rest would prevent",
        "--loss_type dft needs the loss of each token",
    ]


HEAD_ALONE = {"lisa_always_on": "", "lisa_block_probability": "head=0.2"}


@needs_liger
@pytest.mark.parametrize(
    ("model", "kernels", "settings", "changes", "trl_head", "said", "chosen"),
    [
        ("llama", None, {}, {}, False, "rope, fused_linear_cross_entropy, rms_norm, swiglu", None),
        ("llama", {"rope": False}, {}, {}, True, "rms_norm, swiglu (", {"rope": False} | NO_FUSED_LOSS),
        ("llama", None, HEAD_ALONE, {}, False, "off, since it has no gradient", NO_FUSED_LOSS),
        ("llama", None, HEAD_ALONE | {"lisa_always_on": "rest"}, {}, False, "fused_linear_cross_entropy, ", None),
        ("llama", None, {}, {"label_smoothing_factor": 0.1}, False, "label smoothing needs logits", NO_FUSED_LOSS),
        ("llama", {"cross_entropy": True}, {}, {}, False, "rope, cross_entropy, rms_norm",
         {"cross_entropy": True} | NO_FUSED_LOSS),
        ("llama", {"fused_linear_cross_entropy": True}, {}, {}, True, "own fused head takes its place; leave it", None),
        ("llama", {"geglu": True}, {}, {}, False, "there is no geglu for llama; choose from rope, ", None),
        ("llama", {"geglu": False}, {}, {}, False, "Liger kernels: rope, fused", {"geglu": False}),
        ("llama with relu", None, {}, {}, False, "computes silu, and the model's hidden_act is relu; write ", None),
        ("llama with relu", {"swiglu": False}, {}, {}, False, "entropy, rms_norm", {"swiglu": False}),
        ("gpt2", None, {}, {}, False, "no kernels for model type gpt2; leave it out.", None),
    ],
)  # fmt: skip
def test_what_liger_may_replace(model, kernels, settings, changes, trl_head, said, chosen):
    outcome = run_ranks(outcome_of_check, 2, model, kernels, settings, changes, trl_head, interpret=True)[0]
    assert said in outcome[0]
    assert outcome[1] == chosen


def settled() -> list:
    """What is taken on a GPU and without one, where nobody has said it and where somebody has."""
    llama, gpt2 = tiny_llama().config, tiny_gpt2().config
    relu = copy.deepcopy(llama)
    relu.hidden_act = "relu"
    cases = [(llama, None, {}, True), (llama, False, {}, True), (llama, None, {}, False)]
    cases += [(llama, None, {"torch_compile": True}, True), (gpt2, None, {}, True), (relu, None, {}, True)]
    found = []
    for config, given, changes, on_gpu in cases:
        args = arguments_with()
        args.use_liger_kernel = given
        vars(args).update(changes)
        with mock.patch.object(torch.cuda, "is_available", return_value=on_gpu):
            settle_liger(args, config, LisaConfig.plain())
        found.append((args.use_liger_kernel, args.liger_kernel_config))
    return found


@needs_liger
def test_its_kernels_are_taken_on_a_gpu_unless_they_are_refused():
    taken, *others = run_ranks(settled, 1, interpret=True)[0]
    assert taken == (True, {"fused_linear_cross_entropy": False})
    assert others == [(False, None)] * 5


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("device", "need a CUDA device; leave it out"),
        ("package", r"not installed \(pip install 'lisa_dist\[gpu\]'\); leave it out"),
        ("import", "cannot be imported"),
        ("compiler", "there is no C compiler, which Triton needs; leave it out"),
    ],
)
def test_it_needs_a_device_a_compiler_and_the_package(monkeypatch, missing, said):
    if missing == "device":
        monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing == "compiler")
    monkeypatch.setattr(liger, "why_no_compiler", lambda: "there is no C compiler, which Triton needs")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if missing == "package" else name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as one that fails at its import
    with pytest.raises(UserError, match=said):
        check_liger(arguments_with(), tiny_llama().config, LisaConfig.plain())
