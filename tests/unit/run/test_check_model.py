"""Models that cannot be trained are refused, where their configuration shows it before they are loaded."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models import save_tiny_llama, tiny_llama
from runs import flags_for, refused, save_tiny_run
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lisa_dist import LisaConfig
from lisa_dist.core.controller import LisaController
from lisa_dist.errors import UserError
from lisa_dist.files import write_json
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.run import check_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_run(tmp_path_factory.mktemp("given"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "is a reward model, which scores texts and writes none",
        ),
        ({"architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM: LISA trains causal language models"),
        (
            {"is_encoder_decoder": True, "architectures": ["BartForConditionalGeneration"]},
            "is a BartForConditionalGeneration, an encoder-decoder: LISA trains causal language models",
        ),
    ],
)
def test_models_that_write_no_text(folder, tmp_path, changes, said):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    write_json(model / "config.json", json.loads((model / "config.json").read_text()) | changes)
    config = parse_arguments(flags_for(folder, tmp_path / "out", model_name_or_path=model))
    assert said in refused(check_config, config)


@pytest.fixture
def quantized(tmp_path):
    """A folder whose model says that its weights are in FP8."""
    save_tiny_llama(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    return tmp_path


@pytest.mark.parametrize("method", ["lisa", "full"])
def test_a_quantized_model_is_refused(quantized, method):
    with pytest.raises(ValueError, match=r"its weights are quantized \(quant_method fp8\).* give a model in bf16"):
        check_config(parse_arguments(flags_for(quantized, quantized / "out", method=method)))


def test_adapters_of_a_quantized_model_are_not_refused(quantized):
    check_config(parse_arguments(flags_for(quantized, quantized / "out", method="lora")))


def test_the_config_of_every_architecture_is_taken_or_refused_in_one_line(tmp_path):
    """Some have sizes that differ by layer, as a list, or as attributes of single layers; some have no layers."""
    save_tiny_llama(tmp_path / "model")
    taken = 0
    for model_type in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}):
        try:
            model_config = AutoConfig.for_model(model_type)
        except (StrictDataclassError, ValueError):  # one that cannot be made without sizes
            continue
        try:
            has_layers = hasattr(model_config.get_text_config(), "num_hidden_layers")
        except ValueError:  # of two text models
            has_layers = False
        model_config.save_pretrained(tmp_path / "model")
        config = parse_arguments(flags_for(tmp_path, tmp_path / "out"))
        with contextlib.nullcontext() if has_layers else pytest.raises(UserError, match=r"^[^\n]+$"):
            check_config(config)
            taken += 1
    assert taken > 200


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_in_any_loop(dtype):
    model = tiny_llama()
    projection = model.model.layers[1].mlp.up_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is (int8|float8_e4m3fn): LISA trains"):
        LisaController(model, LisaConfig())
