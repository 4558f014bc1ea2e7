"""The baseline `--method lora` from the command line: modules that train whole, and weights in 4 bits (QLoRA)."""

import re
import shutil

import pytest
import torch
from cases import full
from models import tiny_llama, tiny_tokenizer
from peft import PeftModel
from runs import flags_for, on_two_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("cpu_ops")
EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


@pytest.mark.parametrize(("stage", "tied"), [full("zero1", False), ("zero2", True), full("zero3", False)])
def test_modules_to_save_train_whole_and_are_saved(folder, tmp_path, stage, tied):
    """As peft has them: a tied embedding and head become two copies, which the header says."""
    changes = {"method": "lora", "lora_r": 4, "lora_dropout": 0.0, "deepspeed": stage, "max_steps": 6}
    words = flags_for(folder, tmp_path / "out", **changes)
    if tied:
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(tmp_path / "tied")
        tiny_llama(tied=True, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tied")
        words[words.index("--model_name_or_path") + 1] = str(tmp_path / "tied")
    said = on_two_ranks([*words, "--lora_modules_to_save", "embed_tokens", "lm_head"], tmp_path)
    copies = "trained whole +copies of embed_tokens, lm_head, saved with the adapters"
    copies += "; embedding and head, tied in this model, are separate from now on" if tied else "\n"
    assert re.search(copies, said)
    assert "ensure_weight_tying" not in said
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(words[words.index("--model_name_or_path") + 1])
    assert (adapter[EMBED] - base.get_input_embeddings().weight).abs().max() > 1e-3
    assert (adapter[HEAD] - base.get_output_embeddings().weight).abs().max() > 1e-3
    assert not torch.equal(adapter[EMBED], adapter[HEAD])
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").base_model.model
    assert torch.equal(loaded.get_input_embeddings().weight, adapter[EMBED])
    assert torch.equal(loaded.lm_head.weight, adapter[HEAD])


def test_adapters_of_weights_in_4_bits_train_and_resume_bit_for_bit(folder, tmp_path):
    changes = {"method": "lora", "lora_r": 4, "deepspeed": "zero2", "bf16": True, "max_steps": 6}
    changes |= {"load_in_4bit": True, "use_bnb_nested_quant": True, "save_strategy": "steps", "save_steps": 4}
    words = flags_for(folder, tmp_path / "out", **changes)
    said = on_two_ranks(words, tmp_path)
    assert "on all linear layers but the head, whose weights have 4 bits (nf4, double quantization)" in said
    whole = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and value.any() for name, value in whole.items())
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    on_two_ranks([*words, "--resume_from_checkpoint", "true"], tmp_path)
    resumed = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path / "out")
    assert torch.isfinite(adapted(torch.ones(1, 8, dtype=torch.long)).logits).all()
