"""What a run need not say: other libraries' words that nobody can act on, and bars of what takes no time."""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator

import datasets
from transformers.utils import logging as transformers_logging

# By logger, the beginnings of what is left out, and why.
_USELESS = {
    "DeepSpeed": ("**** You are using ZeRO with an untested optimizer",),  # its own are two; ours are tested
    "accelerate.accelerator": ("Gradient accumulation steps mismatch",),  # DeepSpeed's count is the one that counts
    # The trainer gives the model's configs the tokenizer's, which is what they are for.
    **dict.fromkeys(("transformers.trainer", "transformers.trainer_utils"), ("The tokenizer has new PAD/BOS/EOS",)),
    "transformers.tokenization_utils_base": ("Token indices sequence length is longer",),  # examples are cut after it
}


# Of FutureWarnings; DeepSpeed and TRL use these names, and will until the releases that we support end.
_DEPRECATED = (
    "`use_liger_kernel=True` is deprecated",  # which nobody has given
    r"`torch\.distributed\.\w+` is deprecated",
    r"`(is_)?gradient_checkpointing(_\w+)?` is deprecated",
)


def _is_of_use(record: logging.LogRecord) -> bool:
    said = re.sub(r"^\[RANK \d+\] ", "", record.getMessage())  # as accelerate begins its own
    return not said.startswith(_USELESS[record.name])


def leave_out_useless_words() -> None:
    """From now on."""
    for warning in _DEPRECATED:
        warnings.filterwarnings("ignore", warning, FutureWarning)
    # peft's, of tied models; the header says it.
    warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
    for name in _USELESS:
        logging.getLogger(name).addFilter(_is_of_use)  # which a logger has once


def leave_out_bars_of_other_ranks() -> None:
    """Where this rank is not the first, which RANK says by now."""
    if os.environ["RANK"] != "0":
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()


@contextlib.contextmanager
def without_bars_of_datasets() -> Iterator[None]:
    """For what goes over rows that are tokenized already."""
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
