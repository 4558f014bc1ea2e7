"""What a run trains on: its tokenizer, the processor of a vision-language model, and its examples."""

from typing import Any, TypeAlias

from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from lisa_dist.data.dataset import Data, load_data
from lisa_dist.data.encoding import set_chat_template
from lisa_dist.data.image_rows import have_images, load_image_data
from lisa_dist.data.task_rows import check_template, load_task_data
from lisa_dist.distributed.collectives import raise_shared
from lisa_dist.errors import UserError
from lisa_dist.run.arguments import RunConfig, model_config_of
from lisa_dist.tasks import REWARD, SFT
from lisa_dist.text import in_one_line

Processing: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase
_TOKENIZER_ALONE = ("orpo", REWARD)  # tasks whose trainers of TRL take no processor


def load_processing(config: RunConfig) -> tuple[Processing, str, str]:
    """What makes rows of texts and images, a line about its chat template, and one about its processor, or ""."""
    tokenizer = load_tokenizer(config)
    processing, described = _load_processor(config, tokenizer)
    template = set_chat_template(tokenizer, path := getattr(config.training, "chat_template_path", None))
    if path is not None or not processing.chat_template:
        processing.chat_template = tokenizer.chat_template
    return processing, template, described


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the end of a turn that `--eos_token` gives."""
    try:
        tokenizer = config.load(AutoTokenizer)
    except Exception as error:
        # The library tokenizers, which is in Rust, raises Exception itself for files that it cannot read; the others
        # are of transformers, which reads the model's config too.
        known = OSError | ValueError | TypeError | KeyError | AttributeError | StrictDataclassError
        if type(error) is not Exception and not isinstance(error, known):
            raise
        flag = f"--model_name_or_path {config.model.model_name_or_path}"
        raise UserError(f"{flag}: its tokenizer cannot be loaded ({in_one_line(error)}).") from error
    for flag in ("eos_token", "pad_token"):
        token = getattr(config.training, flag, None)  # not every task has both
        if token is not None and token not in tokenizer.get_vocab():
            raise UserError(f"--{flag} {token}: the tokenizer has no such token.")
    if getattr(config.training, "eos_token", None) is not None:
        tokenizer.eos_token = config.training.eos_token  # before rows are made of it
    return tokenizer


def _load_processor(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Processing, str]:
    """The processor with this tokenizer, or the tokenizer where there is none; and what is to be said of it.

    The second is empty for a model of texts alone, and begins with "none" where one should be there. A tokenizer
    without a chat template has the processor's then.
    """
    model_config = model_config_of(config)
    if model_config.get_text_config() is model_config:
        return tokenizer, ""
    try:
        processor: Any = config.load(AutoProcessor)
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


def load_examples(config: RunConfig, processing: Processing, processor: str = "") -> Data:
    """The examples of a run: of sft as tokens, which TRL takes as they are; all ranks call it, one of a host works.

    `processing` is the tokenizer, or a processor with it, for which rows with images stay rows; `processor` is
    the line about it of `load_processing`.
    """
    ranks, problem, training = PartialState(), None, config.training
    tokenizer: Any = getattr(processing, "tokenizer", processing)
    with ranks.main_process_first(), ranks.local_main_process_first():  # the others find what was cached, as in TRL
        try:
            if config.run.task == SFT and processor and have_images(config.data):
                if config.data.streaming:
                    raise UserError("--streaming: rows with images are not streamed; leave it out.")
                if processing is tokenizer:
                    raise UserError(
                        f"--dataset_name {' '.join(config.data.dataset_name or [])}: its rows have images, and the "
                        f"model's processor is {processor}; save it beside the model, or leave the column out."
                    )
                data = load_image_data(config.data, training.seed)
            elif config.run.task == SFT:
                data = load_data(
                    config.data,
                    tokenizer,
                    max_length=training.max_length,
                    seed=training.seed,
                    num_proc=training.dataset_num_proc,
                    packing=training.packing_strategy if training.packing else None,
                )
                if config.data.streaming and training.data_seed is not None:
                    data.train.seed = training.data_seed
            else:
                data = load_task_data(config.data, config.run.task, training.seed)
                check_template(tokenizer, data.train)
        except UserError as error:
            problem = str(error)
    raise_shared(problem)
    return data
