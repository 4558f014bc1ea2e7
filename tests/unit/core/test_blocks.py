"""Block discovery on real architectures built from their configs, with random weights."""

import peft
import pytest
import torch
import transformers
from models import tiny_gpt2, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lisa_dist import LisaConfig
from lisa_dist.core.blocks import find_blocks, split_into_modules
from lisa_dist.core.controller import LisaController
from lisa_dist.core.matrices import quantizable_matrices
from lisa_dist.core.sampling import ActiveSet

# Architecture -> where its layers are, whether its head is tied by default.
CAUSAL = {
    "llama": ("model.layers", False),
    "mistral": ("model.layers", False),
    "mixtral": ("model.layers", False),
    "qwen2": ("model.layers", False),
    "qwen3": ("model.layers", False),
    "qwen3_moe": ("model.layers", False),
    "gemma2": ("model.layers", True),
    "gemma3_text": ("model.layers", True),
    "gpt2": ("transformer.h", True),
    "gpt_neox": ("gpt_neox.layers", False),
    "opt": ("model.decoder.layers", True),
    "bloom": ("transformer.h", True),
    "falcon": ("transformer.h", True),
    "phi3": ("model.layers", False),
}


def build(model_type: str, model_class=AutoModelForCausalLM, **changes):
    """On the meta device; of a model of several, `num_hidden_layers` is that of each."""
    config = AutoConfig.for_model(model_type)
    for name, value in changes.items():
        for one in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
            if one is not None:
                setattr(one, name, value)
    with torch.device("meta"):
        return getattr(model_class, "from_config", model_class)(config)


def check_partition(model, blocks) -> None:
    """Every parameter is in exactly one block."""
    named = dict(model.named_parameters())
    held = [name for block in blocks for name in block.parameters]
    assert sorted(held) == sorted(named)
    assert all(block.parameters[name] is named[name] for block in blocks for name in block.parameters)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_models(model_type):
    layers_path, tied = CAUSAL[model_type]
    model = build(model_type)
    blocks = find_blocks(model)
    check_partition(model, blocks)
    assert blocks.layers_path == layers_path
    assert len(blocks.layers) == model.config.num_hidden_layers
    for index, layer in enumerate(blocks.layers):
        assert layer.parameters
        assert all(name.startswith(f"{layers_path}.{index}.") for name in layer.parameters)
    embedding = model.get_input_embeddings().weight
    assert any(parameter is embedding for parameter in blocks.embed.parameters.values())
    assert blocks.tied == tied
    assert bool(blocks.head.parameters) == (not tied)
    assert blocks.rest.parameters
    assert not blocks.outside.parameters


def test_linear_modules_take_the_place_of_layers():
    model = build("qwen2", num_hidden_layers=3)
    blocks = split_into_modules(model, find_blocks(model))
    check_partition(model, blocks)
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    of_layer = [*(f"self_attn.{name}" for name in attention), *(f"mlp.{name}" for name in mlp)]
    assert [block.name for block in blocks.layers] == [f"layers.{n}.{name}" for n in range(3) for name in of_layer]
    assert blocks.num_layers == 3
    for block in blocks.layers:
        (name,) = block.parameters
        assert name == f"model.{block.name}.weight"
    assert "model.layers.2.self_attn.q_proj.bias" in blocks.rest.parameters
    assert "model.layers.2.input_layernorm.weight" in blocks.rest.parameters


def without_modules():
    """A model of whose layers norms are left."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = torch.nn.Identity(), torch.nn.Identity()
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: build("mamba", num_hidden_layers=2), r"A_log is a matrix, and of no linear module; sample"),
        (without_modules, "layers of LlamaForCausalLM have no linear modules; leave it out"),
    ],
)
def test_layers_that_cannot_be_split_into_modules_are_named(make, said):
    model = make()
    with pytest.raises(ValueError, match=said):
        split_into_modules(model, find_blocks(model))


@pytest.mark.parametrize(
    ("model_type", "read_elsewhere"),
    [
        ("jamba", {"mamba.dt_proj"}),
        ("mamba", {"mixer.dt_proj", "mixer.x_proj", "mixer.out_proj"}),  # the latter two by a fused kernel
        ("bamba", {"mamba.out_proj"}),
        ("gemma3n_text", {"altup.correction_coefs", "altup.prediction_coefs"}),
        ("falcon", set()),  # whose linear modules are of a subclass
        ("qwen2", set()),
    ],
)
def test_linear_modules_read_elsewhere_are_left_out(model_type, read_elsewhere):
    model = build(model_type, **({} if model_type == "gemma3n_text" else {"num_hidden_layers": 5}))
    blocks = find_blocks(model)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = quantizable_matrices(model, [layer.parameters for layer in blocks.layers])
    names = {name for layer in found for name in layer} & linear  # without experts
    in_layers = {name for layer in blocks.layers for name in layer.parameters} & linear
    left_out = {name.removeprefix(f"{blocks.layers_path}.") for name in in_layers - names}
    assert {name.partition(".")[2].removesuffix(".weight") for name in left_out} == read_elsewhere
    assert names <= in_layers


def test_linear_modules_that_share_a_matrix_are_left_out():
    model = build("qwen2", num_hidden_layers=2)
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    layers = quantizable_matrices(model, [layer.parameters for layer in find_blocks(model).layers])
    assert [len(layer) for layer in layers] == [6, 6]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_matrix_is_counted_once(tied):
    model = tiny_llama(tied=tied)
    blocks = find_blocks(model)
    assert blocks.tied == tied
    assert sum(block.numel for block in blocks) == sum(parameter.numel() for parameter in model.parameters())
    assert blocks.head.numel == (0 if tied else 64 * 128)


def test_learned_positions_belong_to_the_embedding():
    assert set(find_blocks(tiny_gpt2()).embed.parameters) == {"transformer.wte.weight", "transformer.wpe.weight"}


@pytest.mark.parametrize(
    ("model_type", "model_class", "outside", "rest"),
    [
        ("git", AutoModelForCausalLM, "git.image_encoder.", "git.visual_projection.visual_projection.0.weight"),
        # The head is of the model inside.
        (
            "blip",
            transformers.BlipForConditionalGeneration,
            "vision_model.",
            "text_decoder.cls.predictions.transform.dense.weight",
        ),
    ],
)
def test_models_inside_a_model_are_outside_whatever_the_config_says(model_type, model_class, outside, rest):
    model = build(model_type, model_class, num_hidden_layers=2)
    blocks = find_blocks(model)
    check_partition(model, blocks)
    named = {name for name in dict(model.named_parameters()) if name.startswith(outside)}
    assert set(blocks.outside.parameters) == named != set()
    assert rest in blocks.rest.parameters
    assert blocks.tied == (model_type == "blip")


def test_the_only_list_of_modules_is_that_of_the_layers():
    """Whatever the config counts: that of Blenderbot has the layers of an encoder that this class does not have."""
    model = build("blenderbot", decoder_layers=3)
    assert find_blocks(model).layers_path == "model.decoder.layers"


def test_what_was_frozen_before_stays_outside():
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.requires_grad_(False)
    lisa = LisaController(model, LisaConfig.plain())
    check_partition(model, lisa.blocks)
    assert set(lisa.blocks.outside.parameters) == {
        name for name in dict(model.named_parameters()) if "mlp" in name or "embed" in name
    }
    assert lisa.blocks.frozen_numel == lisa.blocks.outside.numel == 64 * 128 + 6 * 3 * 64 * 96
    lisa.selection.activate(ActiveSet(tuple(range(6))))
    assert not any(parameter.requires_grad for parameter in lisa.blocks.outside.parameters.values())


def test_what_lisa_has_frozen_is_not_taken_for_the_users_choice():
    model = tiny_llama()
    blocks = find_blocks(model)
    for layer in blocks.layers:
        layer.requires_grad_(False)
    blocks.layers[0].requires_grad_(True)
    model.lm_head.requires_grad_(False)
    blocks.head.requires_grad_(False)  # as it is already
    again = LisaController(model, LisaConfig.plain()).blocks
    assert set(again.outside.parameters) == {"lm_head.weight"}
    blocks.layers[0].requires_grad_(True)
    model.model.layers[0].requires_grad_(False)  # by the user, after LISA has let it train
    with pytest.raises(ValueError, match=r"layers\.1 has parameters of the kinds .* freeze the same in each"):
        LisaController(model, LisaConfig.plain())


def test_a_model_with_nothing_left_to_train_is_refused():
    model = tiny_llama()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the decoder layers is frozen"):
        LisaController(model, LisaConfig.plain())


@pytest.mark.parametrize("wrapped", [True, False])
def test_adapters_are_refused(wrapped):
    model = tiny_llama()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    if wrapped:
        model = peft.get_peft_model(model, lora)
    else:
        peft.inject_adapter_in_model(lora, model)
    with pytest.raises(ValueError, match=r"has adapters \(peft\): .* --method lora"):
        LisaController(model, LisaConfig.plain())


def test_as_many_experts_as_layers_are_no_layers():
    model = build("mixtral", num_hidden_layers=4, num_local_experts=4)
    assert find_blocks(model).layers_path == "model.layers"


def test_a_vision_language_model_gives_its_language_layers():
    config = AutoConfig.for_model("qwen2_5_vl")
    config.vision_config.depth = config.text_config.num_hidden_layers = 4
    config.text_config.layer_types = config.text_config.layer_types[:4]
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    blocks = find_blocks(model)
    check_partition(model, blocks)
    assert blocks.layers_path == "model.language_model.layers"
    assert blocks.outside.parameters
    assert all("visual" in name for name in blocks.outside.parameters)
    assert not any("visual" in name for name in blocks.rest.parameters)


def test_what_is_neither_embedding_nor_layer_nor_head_is_rest():
    config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=64, vocab_size=99)
    reward = find_blocks(transformers.LlamaForSequenceClassification(config))
    assert "score.weight" in reward.rest.parameters
    assert not reward.outside.parameters
    roberta = build("roberta", is_decoder=True, num_hidden_layers=2)
    assert "lm_head.dense.weight" in find_blocks(roberta).rest.parameters | find_blocks(roberta).head.parameters


@pytest.mark.parametrize(("num_layers", "more", "path"), [(17, 4, "model.layers"), (6, 6, "model.more_layers")])
def test_where_the_layers_are_not_clear_lists_are_named_and_one_can_be_chosen(num_layers, more, path):
    model = tiny_llama()
    model.config.num_hidden_layers = num_layers
    model.model.more_layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(more))
    with pytest.raises(ValueError, match="lisa_layers_attribute") as error:
        find_blocks(model)
    lists = f"model.layers (6 modules), model.more_layers ({more} modules)"
    assert f"num_hidden_layers = {num_layers}, and its module lists are: {lists}" in str(error.value)
    assert len(find_blocks(model, path).layers) == 6


@pytest.mark.parametrize(
    ("make", "attribute", "said"),
    [
        (tiny_llama, "model.blocks", "--lisa_layers_attribute model.blocks: LlamaForCausalLM has no such module"),
        (tiny_llama, "model.norm", "--lisa_layers_attribute model.norm: a LlamaRMSNorm, which is no list of modules"),
        (lambda: torch.nn.Linear(2, 2), None, "Linear has no input embedding"),
        (lambda: build("t5", AutoModelForSeq2SeqLM), None, "is an encoder-decoder: LISA trains causal language models"),
        (lambda: build("bart", AutoModelForSeq2SeqLM), None, "is an encoder-decoder: LISA trains causal language mode"),
    ],
)
def test_what_has_no_blocks_is_refused(make, attribute, said):
    model = make()
    with pytest.raises(ValueError, match=said):
        find_blocks(model, attribute)
