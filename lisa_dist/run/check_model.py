"""The arguments of a run that depend on its model, by the model's configuration, before ranks meet and it is loaded."""

import copy

from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import AUTO_LAYERS, LORA_LAYERS, PLANNED_LAYERS
from lisa_dist.core.blocks import (
    find_blocks,
    model_without_weights,
    number_of_decoder_layers,
    split_into_modules,
    why_not_trained,
)
from lisa_dist.core.checkpointing import AUTO, number_of_layers, parse_checkpointed_layers
from lisa_dist.core.layer_weights import load_layer_weights
from lisa_dist.core.selection import unit_budget
from lisa_dist.errors import UserError
from lisa_dist.loss.liger import check_liger
from lisa_dist.memory.planner import fewest_of_lora
from lisa_dist.run.arguments import RunConfig, model_config_of
from lisa_dist.run.choose_loss import check_loss_of_run
from lisa_dist.tasks import REWARD
from lisa_dist.text import in_one_line, no_such_model

# Sizes in a model's configuration.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def check_model(config: RunConfig) -> None:
    """Raise UserError for a model that cannot be trained, or not by these arguments."""
    model_config = _known_model_config(config)
    if (why := why_not_trained(model_config, config.run.task)) is not None:
        raise UserError(f"--model_name_or_path {config.model.model_name_or_path}: {why}.")
    if config.run.loss != AUTO:
        check_loss_of_run(config, model_config)
    if config.run.method != "lora":  # whose adapters train on any weights
        _check_quantization(str(config.model.model_name_or_path), model_config)
    if config.run.method == "lisa":
        _check_layers(config, model_config)


def _check_quantization(model: str, config: PretrainedConfig) -> None:
    """Raise UserError for a model whose weights are stored quantized, before it is loaded."""
    given = getattr(config, "quantization_config", None)
    if given is not None:
        how = given if isinstance(given, dict) else given.to_dict()
        raise UserError(
            f"--model_name_or_path {model}: its weights are quantized (quant_method {how.get('quant_method')}), and "
            "they are what trains; give a model in bf16, or save this one dequantized."
        )


def _check_layers(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Check what depends on the number of layers."""
    if config.training.use_liger_kernel:
        check_liger(copy.copy(config.training), model_config, config.lisa, trl_head=config.run.task != REWARD)
    num_layers = number_of_decoder_layers(model_config)
    _check_sampling(config.lisa, model_config, num_layers)
    checkpointed = parse_checkpointed_layers(config.run.checkpointed_layers)
    if isinstance(checkpointed, int):
        number_of_layers(checkpointed, num_layers)
    if config.lisa.lisa_weights_file is not None:
        num_active = config.lisa.lisa_activated_layers
        fewest = {LORA_LAYERS: fewest_of_lora(num_layers), AUTO_LAYERS: 1}
        num_active = fewest.get(num_active, num_active)
        load_layer_weights(config.lisa.lisa_weights_file, num_layers, num_active)


def _check_sampling(config: LisaConfig, model_config: PretrainedConfig, num_layers: int) -> None:
    """Raise UserError for layers or modules that this model cannot have.

    Modules of models that come with their own code, or see and hear too, are checked once they are loaded.
    """
    if config.lisa_activated_layers not in PLANNED_LAYERS:
        config.check_num_layers(num_layers)
    if config.by_module and type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model = model_without_weights(model_config)
        modules = split_into_modules(model, find_blocks(model, config.lisa_layers_attribute)).layers
        unit_budget(config, [module.numel for module in modules])


def _known_model_config(config: RunConfig) -> PretrainedConfig:
    try:
        model_config = model_config_of(config)
        sizes = model_config.get_text_config().to_dict()  # some models have one for each layer
        for name in _SIZES:
            if isinstance(size := sizes.get(name), int) and size < 0:
                raise ValueError(f"{name} {size}")
        return model_config
    except OSError as error:
        raise UserError(no_such_model(f"--model_name_or_path {config.model.model_name_or_path}", error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(
            f"--model_name_or_path {config.model.model_name_or_path}: its config.json is of no model that can be "
            f"trained ({in_one_line(error)})."
        ) from error
