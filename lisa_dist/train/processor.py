"""The processor of a model that sees or hears too: its tokenizer trains here, and it is saved with the model."""

from typing import Any, TypeAlias

from transformers import AutoProcessor, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from lisa_dist.text import in_one_line
from lisa_dist.train.arguments import RunConfig

Processing: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase


def load_processor(
    config: RunConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Processing, str]:
    """The processor with this tokenizer, or the tokenizer of a model that has none; and what is to be said of it."""
    if model_config.get_text_config() is model_config:
        return tokenizer, ""
    try:
        processor: Any = AutoProcessor.from_pretrained(
            config.model.model_name_or_path,
            revision=config.model.model_revision,
            trust_remote_code=config.training.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:  # no files of one, or no package for its images
        return tokenizer, f"none, and the model is saved without one: {in_one_line(error)[:200]}"
    if not isinstance(processor, ProcessorMixin):
        return tokenizer, ""
    vars(processor)["tokenizer"] = tokenizer
    if getattr(config.training, "chat_template_path", None) or not processor.chat_template:
        processor.chat_template = tokenizer.chat_template
    return processor, f"{type(processor).__name__}, saved with the model"
