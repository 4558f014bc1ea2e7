"""Which loss a run has, and why; losses and metrics of TRL's trainer with each of them."""

import json

import pytest
import torch
from cases import stages
from datasets import Dataset
from models import save_tiny_llama, tiny_llama, token_batches
from ranks import run_ranks
from reference import train_reference
from tokenizers import Tokenizer, models
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig

from lisa_dist import LisaConfig, LisaTrainer
from lisa_dist.ds_config import find_ds_config
from lisa_dist.loss import liger
from lisa_dist.loss.chunked import LogProbsInChunks
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.memory.planner import Planner
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.settle import check_loss_of_run, choose_loss

STEPS, ACCUMULATION, INTERVAL, LAYERS, LR, LENGTH = 4, 2, 2, 3, 1e-2, 16

pytestmark = pytest.mark.usefixtures("cpu_ops")


class InOrder(LisaTrainer):
    """The rows in order, for the reference to take them so too; it notes what its head computes."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, model, inputs, *args, **kwargs):
        self.labels.append(int((inputs["labels"][:, 1:] != -100).sum()))
        return super().training_step(model, inputs, *args, **kwargs)


def train(output_dir: str, ds_config: str, loss: str, prompt: int, changes: dict) -> dict:
    """Steps of two micro-batches with an evaluation; in each row so many tokens at first, or more, have no label."""
    unset_hf_deepspeed_config()
    rows = [row.tolist() for row in token_batches(STEPS * ACCUMULATION, rows=2, length=LENGTH).flatten(0, 2)]
    masked = [[-100] * (prompt and prompt + number // 3 % 3) for number in range(len(rows))]
    labels = [mask + row[len(mask) :] for mask, row in zip(masked, rows, strict=True)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(number): number for number in range(128)}, unk_token="0")),
        eos_token="1",
        pad_token="2",
    )
    args = SFTConfig(
        output_dir=output_dir,
        deepspeed=find_ds_config(ds_config),
        use_cpu=True,
        max_steps=STEPS,
        gradient_accumulation_steps=ACCUMULATION,
        per_device_train_batch_size=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **{"max_length": LENGTH, "bf16": False} | changes,
    )
    dtype = torch.bfloat16 if changes.get("bf16") else torch.float32
    data = Dataset.from_dict({"input_ids": rows, "labels": labels})
    trainer = InOrder(
        model=tiny_llama(num_layers=LAYERS, tied=ds_config == "zero2").to(dtype),
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer,
        lisa_config=LisaConfig(lisa_interval_steps=INTERVAL, lisa_activated_layers=1, lisa_debug=True),
        loss=loss,
    )
    trainer.labels, computed = [], []
    trainer.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: computed.append(logits.shape[:-1].numel()) if torch.is_grad_enabled() else None
    )
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return {
        "logged": [[line[name] for name in names] for line in trainer.state.log_history if "loss" in line],
        "held_out": [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line],
        "layers": [record.layers for record in trainer.lisa.records],
        "labels": trainer.labels,
        "computed": computed,
    }


@pytest.mark.parametrize("ds_config", stages("zero2", "zero3"))
def test_losses_equal_the_reference(tmp_path, ds_config):
    found = run_ranks(train, 2, str(tmp_path), ds_config, "logits", 0, {})[0]
    model = tiny_llama(num_layers=LAYERS, tied=ds_config == "zero2")
    batches = token_batches(STEPS * ACCUMULATION, rows=2, length=LENGTH).view(STEPS, ACCUMULATION, 2, LENGTH)
    losses = train_reference(
        model, list(model.model.layers), found["layers"], INTERVAL, batches, lr=LR, weight_decay=0.0
    )
    assert [line[0] for line in found["logged"]] == pytest.approx(losses, abs=1e-5)
    assert len(set(map(tuple, found["layers"]))) > 1


PACKED = {"packing": True, "eval_packing": True, "packing_strategy": "bfd", "max_length": 3 * LENGTH}


@pytest.mark.parametrize(("ds_config", "changes"), [("zero2", {}), ("zero3", PACKED)])
def test_few_positions_with_a_label_and_metrics_as_with_the_loss_in_chunks(tmp_path, ds_config, changes):
    """Micro-batches of unlike numbers of labels: each counts as much as it has."""
    by_loss = {loss: run_ranks(train, 2, str(tmp_path), ds_config, loss, 10, changes) for loss in ("logits", "chunked")}
    for found, chunked in zip(by_loss["logits"], by_loss["chunked"], strict=True):
        assert found["computed"] == found["labels"], "logits of other positions are not made"
        assert max(found["labels"]) <= 6 * (3 if changes else 1)
        assert len(set(found["labels"])) > 1
        assert chunked["computed"] == []
        for line, other in zip(found["logged"], chunked["logged"], strict=True):
            assert line == pytest.approx(other, rel=1e-4)
        assert found["held_out"] == pytest.approx(chunked["held_out"], abs=1e-5)
        assert len(found["held_out"]) > 1


def train_by_chunks(output_dir: str, ds_config: str, words: int | None) -> dict:
    LogProbsInChunks.rows = words
    return train(output_dir, ds_config, "chunked", 10, {"bf16": True})


@pytest.mark.parametrize("ds_config", ["zero2", "zero3"])
def test_the_gradient_of_a_head_by_chunks_of_words_is_the_whole_one_s(tmp_path, ds_config):
    """Of 128 words in chunks of 48; on ZeRO stage 3 the head is gathered for it."""
    by_chunks, whole = (run_ranks(train_by_chunks, 2, str(tmp_path), ds_config, words)[0] for words in (48, None))
    for line, other in zip(by_chunks["logged"], whole["logged"], strict=True):
        assert line == pytest.approx(other, rel=2e-3)


# Which one


def choose(folder: str, changes: dict) -> str:
    """The loss and the line that says why, or the refusal."""
    flags = {"model_name_or_path": folder, "dataset_name": "rows.jsonl", "output_dir": "out"}
    flags |= {"max_length": 64, "per_device_train_batch_size": 2, "report_to": "none"} | changes
    unset_hf_deepspeed_config()
    config = parse_arguments([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    config.training.max_length = config.training.max_length or None  # as `max_length: null` of a recipe has it
    model_config = AutoConfig.from_pretrained(folder)
    if config.run.loss != "auto":
        try:
            check_loss_of_run(config, model_config)
        except ValueError as error:
            return str(error)
    return ": ".join(choose_loss(config, model_config))


BUDGET = {"checkpointed_layers": "auto", "gpu_memory": "1GiB"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {},
            "logits: logits of the positions with a label, computed once (auto: 0.1 MiB of logits, and a sixteenth of",
        ),
        (BUDGET, " MiB planned with logits, of 1.00 GiB)"),
        (BUDGET | {"method": "full"}, "(auto: 0.1 MiB of logits, "),  # which has no budget
        (
            BUDGET | {"words": 2**18, "gpu_memory": "300MiB"},
            " MiB planned with logits, and there are 300.0 MiB; Liger's Triton kernels need a CUDA device)",
        ),
        ({"words": 2**33 // 512}, "chunked: logits in chunks, computed twice (auto: 8.00 GiB of logits"),
        (
            {"max_length": -1},
            "(auto: no --max_length bounds the logits; Liger's Triton kernels need a CUDA device)",
        ),
        ({"label_smoothing_factor": 0.1}, "chunked: logits in chunks, computed twice (for the metrics: label smooth"),
        ({"loss": "chunked"}, "chunked: logits in chunks, computed twice (--loss chunked)"),
        ({"loss": "chunked", "label_smoothing_factor": 0.1}, "--loss chunked: --label_smoothing_factor 0.1 has a loss"),
        ({"loss": "liger"}, "--loss liger: Liger's Triton kernels need a CUDA device; leave it out."),
        ({"loss": "logits", "loss_type": "dft"}, "logits: logits of the positions with a label, computed once (--loss"),
        (
            {"loss": "logits", "type": "xlstm"},
            "--loss logits: xLSTMForCausalLM takes no logits_to_keep, its logits are",
        ),
        (
            {"type": "xlstm"},
            "(auto: xLSTMForCausalLM takes no logits_to_keep, its logits are of all positions; Liger's",
        ),
    ],
)
def test_the_loss_of_a_run_and_why(tmp_path, changes, said):
    save_tiny_llama(tmp_path)
    if "words" in changes:
        LlamaConfig(vocab_size=changes["words"], hidden_size=8, num_attention_heads=2, num_hidden_layers=2,
                    intermediate_size=16).save_pretrained(tmp_path)  # fmt: skip
    if "type" in changes:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": changes["type"], "num_heads": 2}))
    changes = {name: value for name, value in changes.items() if name not in ("words", "type")}
    assert said in run_ranks(choose, 1, str(tmp_path), changes)[0]


def choose_where_liger_runs(folder: str, changes: dict) -> dict[str, str]:
    """The losses of a run with just so much memory as each loss is planned with."""
    liger.why_no_liger = lambda model_type: None
    peaks, found = {}, {}
    for loss in ("chunked", "liger", "logits"):
        unset_hf_deepspeed_config()
        arguments = PlanArguments(
            folder,
            gpus=1,
            seq_length=512,
            micro_batch_size=changes["per_device_train_batch_size"],
            checkpointed_layers="none",
            loss=loss,
            optim="adamw_torch",
        )
        planner = Planner(AutoConfig.from_pretrained(folder), arguments, LisaConfig.plain(), on_cpu=True)
        peaks[loss] = planner.plan(find_ds_config("zero2"), 0, loss).gpu.peak
    assert sorted(peaks, key=lambda loss: peaks[loss]) == list(peaks)
    for loss, peak in peaks.items():
        found[loss] = choose(folder, changes | {"gpu_memory": f"{peak}B"})
    return found


def test_liger_s_loss_is_taken_where_it_fits(tmp_path):
    """It sums the gradient of the head in fp32, which the loss in chunks has of a few words at a time."""
    save_tiny_llama(tmp_path)
    LlamaConfig(vocab_size=2**16, hidden_size=64, num_attention_heads=2, num_hidden_layers=2,
                intermediate_size=16).save_pretrained(tmp_path)  # fmt: skip
    flags = {
        "bf16": True,
        "dtype": "bfloat16",
        "lisa_preset": "none",
        "checkpointed_layers": "auto",
        "max_length": 512,
        "per_device_train_batch_size": 40,  # of fewer a CPU has all logits in the least memory
    }
    said = run_ranks(choose_where_liger_runs, 1, str(tmp_path), flags)[0]
    assert {loss: line.split(":")[0] for loss, line in said.items()} == {loss: loss for loss in said}
    assert "; Liger's needs " in said["chunked"]
    assert " planned with logits, and there are " in said["liger"]


def test_a_trainer_of_ones_own_does_not_choose():
    for loss, rule in (("auto", "lisa-dist train chooses by a plan"), ("dft", "unknown; choose one of auto, logits")):
        with pytest.raises(ValueError, match=rule):
            LisaTrainer("no model is loaded for it", loss=loss)
