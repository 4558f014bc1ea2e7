"""Tiny models with random weights, the same on every rank for the same seed."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MixtralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

VOCABULARY = 128
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_llama(
    seed: int = 0, num_layers: int = 6, tied: bool = False, vocab_size: int = VOCABULARY
) -> LlamaForCausalLM:
    """A Llama of `num_layers` layers, 64 wide, in fp32."""
    torch.manual_seed(seed)
    sizes = SIZES | {"vocab_size": vocab_size, "num_hidden_layers": num_layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))


def tiny_mixtral(seed: int = 0):
    """A mixture of experts, which transformers holds under other names than the files on the hub have."""
    torch.manual_seed(seed)
    config = MixtralConfig(vocab_size=128, num_hidden_layers=3, num_local_experts=2, **SIZES)
    return AutoModelForCausalLM.from_config(config)


def tiny_qwen3_moe(seed: int = 0):
    """A mixture of four experts, of which two compute a token."""
    torch.manual_seed(seed)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(vocab_size=128, num_hidden_layers=6, **experts, **SIZES))


def tiny_gpt_oss(seed: int = 0):
    """One whose experts have biases, and their gate too; every other layer attends to the last 8 tokens."""
    torch.manual_seed(seed)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}
    config = GptOssConfig(vocab_size=128, num_hidden_layers=6, **experts, **SIZES)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for a byte, with a chat template."""
    special = ["<pad>", "<end>", "<user>", "<assistant>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": special[2:]})
    fast.chat_template = TEMPLATE
    return fast


def save_tiny_llama(folder: Path) -> None:
    """A tiny Llama's folder, with that tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)


def save_tiny_llava(folder: Path) -> None:
    """A tiny Llama that sees, with a tower, a projector and a processor, whose template has contents as parts alone."""
    save_tiny_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<image>"]})
    text = LlamaConfig(**SIZES, num_hidden_layers=6, vocab_size=len(tokenizer))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=32)
    torch.manual_seed(0)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.chat_template = None
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=PARTS_TEMPLATE,
    ).save_pretrained(folder)


def tiny_gpt2(seed: int = 0, num_layers: int = 6, dropout: float = 0.0):
    """A GPT-2: tied embeddings, learned positions, biases."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": num_layers, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**sizes, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    return AutoModelForCausalLM.from_config(config)


def token_batches(num_steps: int, rows: int, micro_batches: int = 1, length: int = 16) -> torch.Tensor:
    """Token ids of shape (steps, micro-batches, rows, length): the same on every rank, for it to take its rows."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(0, VOCABULARY, (num_steps, micro_batches, rows, length), generator=generator)


def model_with_head(name: str):
    """A model with one kind of head: "llama", "tied llama", "gpt2", "mixtral", "capped", "scaled" or "biased"."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    kinds = {
        "capped": lambda: Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=0.5),
        "scaled": lambda: CohereConfig(**sizes, logit_scale=3.0),
        "biased": lambda: PhiConfig(**sizes),
    }
    torch.manual_seed(0)
    if name in kinds:
        return AutoModelForCausalLM.from_config(kinds[name]())
    if name == "mixtral":
        model = tiny_mixtral()
        model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
        return model
    return tiny_gpt2() if name == "gpt2" else tiny_llama(tied=name == "tied llama")
