"""Attention: which implementation a run gets, that it equals eager attention, and that packed documents stay apart.

With a GPU and flash-attn the same tests of equality run with flash-attn too, in bf16.
"""

import itertools
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from cases import full
from datasets import Dataset
from models import VOCABULARY, tiny_llama
from ranks import run_ranks
from runs import run_alone
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lisa_dist import LisaConfig, LisaTrainer
from lisa_dist.config import UserError
from lisa_dist.optim.ops import has_fp8
from lisa_dist.run.task_configs import LisaSFTConfig
from lisa_dist.train import attention
from lisa_dist.train.attention import choose_attention, documents_see_each_other, packs_documents

LENGTHS = (5, 1, 7)
TURING, AMPERE, HOPPER, BLACKWELL = (7, 5), (8, 0), (9, 0), (10, 0)
FP32, BF16 = torch.float32, torch.bfloat16
IMPLEMENTATIONS = [("sdpa", FP32), ("sdpa", BF16), ("flash_attention_3", BF16), ("flash_attention_2", BF16)]


def sharpened(model):
    """Weights so large that attention is far from a mean, and that are the same in bf16."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6).copy_(parameter.bfloat16())
    return model.train()


def llama(kv_heads: int, attention: str = "eager", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = tiny_llama().config
    config.num_key_value_heads = kv_heads
    torch.manual_seed(0)
    model = sharpened(LlamaForCausalLM(config)).to("cuda" if "flash" in attention else "cpu", dtype)
    model.set_attn_implementation(attention)
    return model


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def alone(model) -> list[torch.Tensor]:
    """Logits of each document in a batch of its own."""
    return [model(tokens[None], use_cache=False).logits[0] for tokens in documents()]


def weigh(logits: list[torch.Tensor]) -> torch.Tensor:
    """A loss that every token of every document is in."""
    pairs = zip(logits, documents(), strict=True)
    return sum(cross_entropy(of_one.float(), tokens.to(of_one.device)) for of_one, tokens in pairs)


def padded_left() -> tuple[dict, list[tuple[int, slice]]]:
    rows = [{"input_ids": tokens.flip(0).tolist()} for tokens in documents()]
    batch = {name: value.flip(1) for name, value in DataCollatorForLanguageModeling(pad_token_id=0)(rows).items()}
    return batch, [(row, slice(max(LENGTHS) - length, None)) for row, length in enumerate(LENGTHS)]


def padded_right() -> tuple[dict, list[tuple[int, slice]]]:
    batch = DataCollatorForLanguageModeling(pad_token_id=0)([{"input_ids": one.tolist()} for one in documents()])
    return batch, [(row, slice(length)) for row, length in enumerate(LENGTHS)]


def packed(*names: str) -> tuple[dict, list[tuple[int, slice]]]:
    """As TRL's collator makes it, or with nothing but positions."""
    tokens = torch.cat(documents()).tolist()
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        [{"input_ids": tokens, "labels": tokens, "seq_lengths": list(LENGTHS)}]
    )
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    where = [(0, slice(end - length, end)) for end, length in zip(ends, LENGTHS, strict=True)]
    return {name: batch[name] for name in names or batch}, where


BATCHES = {
    "padded on the left": padded_left,
    "padded on the right": padded_right,
    "packed": packed,
    "packed, by positions alone": partial(packed, "input_ids", "position_ids"),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda one: f"{one[0]} {one[1]}")
def test_logits_and_gradients_equal_those_of_eager_attention_on_each_document_alone(implementation):
    try:
        choose_attention(implementation[0], True, LlamaConfig())
    except UserError as error:
        pytest.skip(str(error))
    tolerance = 1e-5 if implementation[1] == FP32 else 0.15  # bf16 has 8 bits, and rounds at every layer
    for kv_heads in (4, 2, 1):
        reference = llama(kv_heads)
        expected = alone(reference)
        weigh(expected).backward()
        for batch, recomputed in itertools.product(BATCHES, (False, True)):
            case, model = (kv_heads, batch, recomputed), llama(kv_heads, *implementation)
            if recomputed:
                model.gradient_checkpointing_enable()
            inputs, where = BATCHES[batch]()
            inputs.pop("labels", None)
            logits = model(**send_to_device(inputs, model.device), use_cache=False).logits
            found = [logits[row, place] for row, place in where]
            weigh(found).backward()
            for one, two in zip(expected, found, strict=True):
                assert (two.float().cpu() - one).abs().max() < tolerance, case
            for (name, one), two in zip(reference.named_parameters(), model.parameters(), strict=True):
                gap = (two.grad.float().cpu() - one.grad).abs().max()
                assert gap < tolerance * max(1, one.grad.abs().max()), (case, name, gap)


def test_the_tests_of_equality_would_see_a_missing_mask():
    """The same tokens as one document: far outside of what is tolerated."""
    model = llama(2)
    together = model(torch.cat(documents())[None], use_cache=False).logits[0, -LENGTHS[-1] :]
    assert (together - alone(model)[-1]).abs().max() > 1


@pytest.fixture
def device(monkeypatch):
    """Sets the GPU, and what of flash-attn can be imported on it."""

    def set_device(capability, *importable, kernels=False, problem="is not installed"):
        monkeypatch.setattr(attention, "gpu_capability", lambda: capability)
        monkeypatch.setattr(attention, "is_kernels_available", lambda: kernels)
        monkeypatch.setattr(
            attention,
            "import_problem",
            lambda flash: None if flash.package in importable else f"{flash.package} {problem}",
        )

    return set_device


BOTH = ("flash-attn", "flash-attn-3")
BLOOM = LlamaConfig(architectures=["BloomForCausalLM"])
WITH_FLASH_3, WITH_FLASH_2 = "flash-attn-3 is installed", "flash-attn is installed; flash-attn-3 "
WIDE = "flash-attn takes heads of at most 256, and the model's are 512"


@pytest.mark.parametrize(
    ("changes", "chosen", "why"),
    [
        ({"capability": None}, "sdpa", "no CUDA device"),
        ({"use_cpu": True}, "sdpa", "no CUDA device"),
        ({}, "flash_attention_3", WITH_FLASH_3),
        ({"importable": ["flash-attn"]}, "flash_attention_2", f"{WITH_FLASH_2}is not installed"),
        ({"importable": []}, "sdpa", "flash-attn-3 is not installed; flash-attn is not installed"),
        ({"capability": AMPERE}, "flash_attention_2", f"{WITH_FLASH_2}needs a Hopper GPU"),
        ({"capability": BLACKWELL}, "flash_attention_2", f"{WITH_FLASH_2}needs a Hopper GPU"),
        (
            {"capability": TURING}, "sdpa",
            "flash-attn-3 needs a Hopper GPU; flash-attn needs an Ampere GPU or newer",
        ),
        ({"half_precision": False}, "sdpa", "flash-attn needs bf16 or fp16"),
        ({"config": LlamaConfig(attention_dropout=0.1)}, "flash_attention_2", f"{WITH_FLASH_2}has no dropout"),
        ({"config": LlamaConfig(head_dim=512)}, "sdpa", WIDE),
        ({"config": Gemma2Config()}, "flash_attention_3", WITH_FLASH_3),
        (
            {"capability": None, "config": BLOOM}, "eager",
            "no CUDA device; BloomForCausalLM does not support SDPA",
        ),
        (
            {"config": BLOOM}, "eager",
            "BloomForCausalLM does not support flash-attn; BloomForCausalLM does not support SDPA",
        ),
        (
            {"config": GptOssConfig()}, "eager",
            "GptOssForCausalLM does not support flash-attn-3; GptOssForCausalLM does not support flash-attn; "
            "GptOssForCausalLM does not support SDPA",
        ),
        (
            {"config": PretrainedConfig(architectures=["NobodysForCausalLM"])}, "sdpa",
            "a model with code of its own may not support flash-attn",
        ),
    ],
)  # fmt: skip
def test_without_a_wish_the_best_that_can_run_is_taken(device, changes, chosen, why):
    found = {"capability": HOPPER, "importable": BOTH, "half_precision": True, "config": LlamaConfig()} | changes
    device(found.pop("capability"), *found.pop("importable"))
    assert choose_attention(None, **found) == (chosen, why)


@pytest.mark.parametrize(
    ("requested", "why"),
    [
        ("eager", "as asked for; packed rows by a block-diagonal mask"),
        ("sdpa", "as asked for; packed rows by a block-diagonal mask"),
        ("flex_attention", "as asked for; packed rows by a block-diagonal mask"),
        ("flash_attention_2", "as asked for; packed rows by its variable-length kernel"),
        ("flash_attention_3", "as asked for; packed rows by its variable-length kernel"),
        (
            "flash_attention_4",
            "as asked for; flash-attn-4 is not installed, transformers takes a kernel of the hub; packed rows by its "
            "variable-length kernel",
        ),
        ("kernels-community/flash-attn2", "as asked for; packed rows by its variable-length kernel"),
        ("somebody/attention", "as asked for"),
        (None, "flash-attn-3 is installed; packed rows by its variable-length kernel"),
    ],
)
def test_what_can_be_used_is_taken_as_asked_for(device, requested, why):
    device(HOPPER, *BOTH, kernels=True)
    chosen = choose_attention(requested, True, LlamaConfig(), packed=True)
    assert chosen == (requested or "flash_attention_3", why)
    assert choose_attention(requested, True, LlamaConfig())[1] == why.split("; packed")[0]


def test_a_gpu_of_amd_is_no_hopper_gpu(device, monkeypatch):
    """ROCm reports capability 9.0 for the MI200 series and 9.4 for the MI300 series."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    device((9, 4), *BOTH)
    assert choose_attention(None, True, LlamaConfig())[0] == "flash_attention_2"
    with pytest.raises(UserError, match="flash-attn-3 needs a Hopper GPU"):
        choose_attention("flash_attention_3", True, LlamaConfig())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not has_fp8(torch.device("cuda"))


LEAVE = "leave the flag out for SDPA."


@pytest.mark.parametrize(
    ("requested", "capability", "changes", "said"),
    [
        ("flash_attention_2", None, {}, f"no CUDA device; {LEAVE}"),
        ("paged|flash_attention_2", None, {}, f"no CUDA device; {LEAVE}"),
        (
            "flash_attention_2", AMPERE, {"half_precision": False},
            f"flash-attn needs bf16 or fp16; give --bf16 true, or {LEAVE}",
        ),
        ("flash_attention_2", TURING, {}, f"flash-attn needs an Ampere GPU or newer; {LEAVE}"),
        ("flash_attention_3", AMPERE, {}, f"flash-attn-3 needs a Hopper GPU; {LEAVE}"),
        ("flash_attention_4", AMPERE, {}, f"flash-attn-4 needs a Hopper GPU or newer; {LEAVE}"),
        (
            "flash_attention_2", AMPERE, {},
            f"flash-attn is not installed; pip install flash-attn --no-build-isolation, or {LEAVE}",
        ),
        (
            "flash_attention_3", HOPPER, {},
            f"flash-attn-3 is not installed; install it from the folder hopper of flash-attention, or {LEAVE}",
        ),
        (
            "flash_attention_4", BLACKWELL, {},
            f"flash-attn-4 is not installed; pip install flash-attn-4, or {LEAVE}",
        ),
        ("flash_attention_2", AMPERE, {"config": BLOOM}, f"BloomForCausalLM does not support flash-attn; {LEAVE}"),
        ("flash_attention_2", AMPERE, {"config": LlamaConfig(head_dim=512)}, f"{WIDE}; {LEAVE}"),
    ],
)  # fmt: skip
def test_a_flash_attn_that_was_asked_for_and_cannot_run_is_refused(device, requested, capability, changes, said):
    device(capability)
    with pytest.raises(UserError) as error:
        choose_attention(requested, **{"half_precision": True, "config": LlamaConfig()} | changes)
    assert str(error.value) == f"--attn_implementation {requested.removeprefix('paged|')}: {said}"


def test_a_flash_attn_that_is_installed_and_broken_is_refused_even_where_the_hub_has_one(device):
    device(AMPERE, kernels=True, problem="2.8.3 cannot be imported (undefined symbol: x)")
    with pytest.raises(UserError, match=r"flash_attention_2: flash-attn 2\.8\.3 cannot be imported \(undefined"):
        choose_attention("flash_attention_2", True, LlamaConfig())
    assert choose_attention(None, True, LlamaConfig())[0] == "sdpa"


@pytest.mark.parametrize(
    ("name", "version", "code", "found"),
    [
        ("flash_attention_2", None, "", "flash-attn is not installed"),
        ("flash_attention_3", None, "", "flash-attn-3 is not installed"),
        ("flash_attention_2", "2.2.0", "", "flash-attn 2.2.0 is older than 2.3.3"),
        ("flash_attention_2", "2.8.3", "raise ImportError('undefined\\nsymbol')",
         "flash-attn 2.8.3 cannot be imported (undefined symbol)"),
        ("flash_attention_3", "3.0.0", "raise OSError('libcudart.so.12')",
         "flash-attn-3 3.0.0 cannot be imported (libcudart.so.12)"),
        ("flash_attention_2", "2.8.3", "", None),
        ("flash_attention_3", "3.0.0b1", "", None),
    ],
)  # fmt: skip
def test_only_an_import_tells_whether_flash_attn_is_there(tmp_path, monkeypatch, name, version, code, found):
    flash = attention._FLASH[name]
    *package, module = flash.module.split(".")
    folder = tmp_path.joinpath(*package)
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    (folder / f"{module}.py").write_text(code)
    if version is not None:
        info = tmp_path / f"{flash.package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {flash.package}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for part in ("flash_attn", flash.module):
        monkeypatch.delitem(sys.modules, part, raising=False)
    assert attention.import_problem(flash) == found


@pytest.mark.parametrize(
    ("flags", "packed"),
    [
        ({}, False),
        ({"packing": True}, True),
        ({"packing": True, "packing_strategy": "bfd_split"}, True),
        ({"padding_free": True, "max_length": None}, True),
        ({"packing": True, "eval_packing": False}, True),
        ({"packing_strategy": "wrapped"}, False),
        ({"packing": True, "packing_strategy": "wrapped"}, "--packing_strategy wrapped: documents in a row"),
        ({"packing_strategy": "wrapped", "eval_packing": True}, "--packing_strategy wrapped: documents in a row"),
        ({"eval_packing": True}, "--eval_packing true without --packing true"),
    ],
)
def test_whether_documents_share_rows(tmp_path, flags, packed):
    """Rows without the ends of their documents are refused."""
    config = SFTConfig(output_dir=str(tmp_path), bf16=False, **flags)
    if isinstance(packed, bool):
        assert packs_documents(config) == packed
        return
    with pytest.raises(UserError, match=f"^{packed}"):
        packs_documents(config)


def tiny_opt(vocab_size: int = VOCABULARY):
    """Its forward pass takes positions and builds masks without them."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=vocab_size, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=6,
            num_attention_heads=4, max_position_embeddings=64, dropout=0.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("build", "mixed"), [(tiny_llama, False), (tiny_opt, True)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("vocab_size", [VOCABULARY, 40])
def test_a_model_that_lets_packed_documents_see_each_other_is_found(build, mixed, implementation, vocab_size):
    model = build(vocab_size=vocab_size).eval()
    model.set_attn_implementation(implementation)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=20)
    with torch.no_grad():
        found = documents_see_each_other(
            lambda batch: model(**batch, use_cache=False).logits, collate, vocab_size=vocab_size
        )
    assert found is mixed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models, words for tokens, and documents that fill four rows of 32."""
    folder = tmp_path_factory.mktemp("attention")
    words = {"<pad>": 0, "<end>": 1} | {f"w{n}": n for n in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, model in (("llama", tiny_llama()), ("opt", tiny_opt())):
        sharpened(model).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(
            folder / name
        )
    generator = torch.Generator().manual_seed(0)
    lengths = (25, 20, 17, 15, 12, 11, 11, 10, 7)
    rows = [torch.randint(2, VOCABULARY, (length - 1,), generator=generator).tolist() for length in lengths]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": " ".join(f"w{n}" for n in row)}) for row in rows))
    return folder


def train_packed(folder: str, model: str, output_dir: str, changes: dict) -> tuple[list[float], str | None]:
    """The loss of the one step, in which weights stand still, and the error before it."""
    unset_hf_deepspeed_config()
    values = {"deepspeed": "zero2", "bf16": False, "max_length": 32, "max_steps": 1, "learning_rate": 0.0} | changes
    args = LisaSFTConfig(output_dir=output_dir, logging_steps=1, save_strategy="no", report_to="none", **values)
    rows = Path(folder, "rows.jsonl").read_text().splitlines()
    trainer = LisaTrainer(
        model=f"{folder}/{model}",
        args=args,
        train_dataset=Dataset.from_list([json.loads(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/{model}"),
        lisa_config=LisaConfig.plain(lisa_debug=True),
    )
    try:
        trainer.train()
    except UserError as error:
        return [], str(error)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], None


def loss_of_documents_alone(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", attn_implementation="eager")
    total, count = 0.0, 0
    for line in (folder / "rows.jsonl").read_text().splitlines():
        tokens = torch.tensor([*(int(word[1:]) for word in json.loads(line)["text"].split()), 1])
        with torch.no_grad():
            total += float(cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="sum"))
        count += len(tokens) - 1
    return total / count


PACKING, PADDING_FREE = {"packing": True}, {"padding_free": True, "max_length": None}


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(
    ("world_size", "rows", "changes"),
    [
        (1, 4, PACKING),
        full(1, 1, PACKING | {"gradient_accumulation_steps": 4}),
        full(1, 4, PACKING | {"model_init_kwargs": {"attn_implementation": "eager"}}),
        (1, 9, PADDING_FREE),
        full(2, 2, PACKING | {"deepspeed": "zero3"}),
    ],
    ids=["batch", "accumulated", "eager", "padding-free", "zero3"],
)
def test_the_loss_of_a_packed_run_is_that_of_its_documents_alone(folder, tmp_path, world_size, rows, changes):
    changes |= {"per_device_train_batch_size": rows}
    (loss,), error = run_ranks(train_packed, world_size, str(folder), "llama", str(tmp_path), changes)[0]
    assert error is None
    assert loss == pytest.approx(loss_of_documents_alone(folder), abs=1e-5)


MIXED = "true: in OPTForCausalLM with attention sdpa, documents in a row see each other; leave the flag out, or give "


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(1, PACKING), full(1, PADDING_FREE), full(2, PACKING | {"deepspeed": "zero3"})],
    ids=["packing", "padding-free", "zero3"],
)
def test_a_model_that_mixes_packed_documents_is_refused(folder, tmp_path, world_size, changes):
    expected = [], f"--{next(iter(changes))} {MIXED}another --attn_implementation."
    assert run_ranks(train_packed, world_size, str(folder), "opt", str(tmp_path), changes) == [expected] * world_size


COMMANDS = {
    "llama --packing true --attn_implementation eager --method full": (
        "eager (as asked for; packed rows by a block-diagonal mask)"
    ),
    "opt": "sdpa (no CUDA device)",
    "opt --packing true --method full": f"lisa-dist: --packing {MIXED}",
    "llama --attn_implementation flash_attention_2": "lisa-dist: --attn_implementation flash_attention_2: no CUDA",
}


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_the_command_line_says_what_attention_does_and_what_it_refuses(folder, tmp_path):
    for number, (words, line) in enumerate(COMMANDS.items()):
        model, *flags = words.split()
        always = f"--model_name_or_path {folder / model} --dataset_name {folder / 'rows.jsonl'} --max_length 32"
        always += f" --max_steps 1 --save_strategy no --report_to none --output_dir {tmp_path / str(number)}"
        status, said = run_alone([*always.split(), *flags], tmp_path / f"{number}.txt")
        assert line in said, said[-3000:]
        refused = line.startswith("lisa-dist")
        assert (status, "trained in" in said) == ((2, False) if refused else (0, True))
