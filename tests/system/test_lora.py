"""The baseline `--method lora` from the command line: modules that train whole next to the adapters."""

import re

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


@pytest.mark.parametrize(("stage", "tied"), [full("zero1", False), ("zero2", True), ("zero3", False)])
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
