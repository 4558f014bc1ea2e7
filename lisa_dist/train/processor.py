"""The processor of a vision-language model: rows with images go by it, and it is saved with the model."""

from typing import Any, TypeAlias

from transformers import AutoProcessor, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from lisa_dist.tasks import REWARD
from lisa_dist.text import in_one_line
from lisa_dist.train.arguments import RunConfig

Processing: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase
_TOKENIZER_ALONE = ("orpo", REWARD)  # tasks whose trainers of TRL take no processor


def load_processor(
    config: RunConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Processing, str]:
    """The processor with this tokenizer, or the tokenizer where there is none; and what is to be said of it.

    The second is empty for a model of texts alone, and begins with "none" where one should be there. A tokenizer
    without a chat template has the processor's then.
    """
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
        return tokenizer, "none, and the model is saved without one: there are no files of one beside it"
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processor.chat_template
    if config.run.task in _TOKENIZER_ALONE:
        return tokenizer, f"none: TRL's trainer of {config.run.task} takes a tokenizer, which is saved with the model"
    vars(processor)["tokenizer"] = tokenizer
    return processor, f"{type(processor).__name__}, saved with the model"
