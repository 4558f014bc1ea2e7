"""Words of other libraries that a run leaves out; all others stay."""

import logging

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from lisa_dist.run.quiet import leave_out_bars_of_other_ranks, leave_out_useless_words, without_bars_of_datasets


@pytest.mark.parametrize(
    ("logger", "said", "is_shown"),
    [
        ("DeepSpeed", "**** You are using ZeRO with an untested optimizer, proceed with caution *****", False),
        ("DeepSpeed", "a gradient overflowed", True),
        ("accelerate.accelerator", "Gradient accumulation steps mismatch: 1 and 2", False),
        ("accelerate.accelerator", "[RANK 0] Gradient accumulation steps mismatch: 1 and 2", False),
        ("transformers.tokenization_utils_base", "Token indices sequence length is longer than 1024", False),
        ("transformers.tokenization_utils_base", "a token is missing", True),
        ("transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens that differ from the model's", False),
    ],
)
def test_what_nobody_can_act_on_is_left_out(monkeypatch, logger, said, is_shown):
    theirs = logging.getLogger(logger)
    monkeypatch.setattr(theirs, "filters", [])
    leave_out_useless_words()
    record = theirs.makeRecord(logger, logging.WARNING, "file.py", 1, said, (), None)
    assert bool(theirs.filter(record)) == is_shown


def test_bars_come_back():
    with without_bars_of_datasets():
        assert datasets.are_progress_bars_disabled()
        with without_bars_of_datasets():
            pass
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_one_rank_shows_bars(monkeypatch, rank, shown):
    monkeypatch.setenv("RANK", rank)
    leave_out_bars_of_other_ranks()
    try:
        assert datasets.are_progress_bars_disabled() != shown
        assert transformers_logging.is_progress_bar_enabled() == shown
    finally:
        datasets.enable_progress_bars()
        transformers_logging.enable_progress_bar()
