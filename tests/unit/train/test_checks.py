"""Weights and arithmetic of fewer than 16 bits are refused, before a model is loaded where a config shows them."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models import save_tiny_llama, tiny_llama
from runs import flags_for
from transformers import AutoConfig, TrainingArguments
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lisa_dist import LisaConfig
from lisa_dist.core.controller import LisaController
from lisa_dist.errors import UserError
from lisa_dist.train.arguments import parse_arguments
from lisa_dist.train.checks import check_trainer
from lisa_dist.train.run import check_config


@pytest.mark.parametrize(
    ("cpu", "said"), [("true", "ACCELERATE_USE_CPU, which .* turns DeepSpeed off"), ("false", "give a config")]
)
def test_a_run_without_deepspeed_says_why(tmp_path, monkeypatch, cpu, said):
    monkeypatch.setenv("ACCELERATE_USE_CPU", cpu)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match=said):
        check_trainer(args, None, LisaConfig(), "adamw_torch", None, None)


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


@pytest.mark.parametrize(
    ("name", "flag"),
    [("attn_implementation", "attn_implementation"), ("torch_dtype", "dtype"), ("revision", "model_revision")],
)
def test_what_has_a_flag_is_not_taken_beside_it(tmp_path, name, flag):
    """It would win over the flag, without the flag's checks."""
    save_tiny_llama(tmp_path / "model")
    flags = flags_for(tmp_path, tmp_path / "out", model_init_kwargs=json.dumps({name: "eager"}))
    with pytest.raises(UserError, match=rf"^--model_init_kwargs {name}: give --{flag} in its place\.$"):
        check_config(parse_arguments(flags))


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_ranks_that_share_layers_or_rows_are_refused(tmp_path, monkeypatch, name):
    save_tiny_llama(tmp_path / "model")
    config = parse_arguments(flags_for(tmp_path, tmp_path / "out"))
    refused = f"^parallelism_config has {name} = 2: ranks share the model by ZeRO alone"
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        patch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
        with pytest.raises(UserError, match=refused):
            check_config(config)
    config.training.parallelism_config = SimpleNamespace(**{name: 2})
    with pytest.raises(UserError, match=refused):
        check_trainer(config.training, {}, config.lisa, "adamw_torch", None, None)


def test_eight_bit_arithmetic_is_refused(tmp_path, monkeypatch):
    save_tiny_llama(tmp_path / "model")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match=r"ACCELERATE_MIXED_PRECISION=fp8: .* give --bf16 True"):
        check_config(parse_arguments(flags_for(tmp_path, tmp_path / "out")))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_in_any_loop(dtype):
    model = tiny_llama()
    projection = model.model.layers[1].mlp.up_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is (int8|float8_e4m3fn): LISA trains"):
        LisaController(model, LisaConfig())
