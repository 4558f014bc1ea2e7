"""Words of other libraries that a run leaves out; all others stay."""

import logging

import datasets
import pytest

from lisa_dist.train.quiet import leave_out_useless_words, without_bars_of_datasets


@pytest.mark.parametrize(
    ("logger", "said", "is_shown"),
    [
        ("DeepSpeed", "**** You are using ZeRO with an untested optimizer, proceed with caution *****", False),
        ("DeepSpeed", "a gradient overflowed", True),
        ("accelerate.accelerator", "Gradient accumulation steps mismatch: 1 and 2", False),
        ("accelerate.accelerator", "something else", True),
        ("transformers.tokenization_utils_base", "Token indices sequence length is longer than 1024", False),
        ("transformers.tokenization_utils_base", "a token is missing", True),
    ],
)
def test_what_nobody_can_act_on_is_left_out(caplog, monkeypatch, logger, said, is_shown):
    monkeypatch.delenv("RANK", raising=False)
    filters = list(logging.getLogger(logger).filters)
    leave_out_useless_words()
    leave_out_useless_words()  # which adds nothing
    try:
        assert len(logging.getLogger(logger).filters) == len(filters) + 1
        with caplog.at_level(logging.WARNING):
            logging.getLogger(logger).addHandler(caplog.handler)
            logging.getLogger(logger).warning(said)
        assert bool(caplog.records) == is_shown
    finally:
        logging.getLogger(logger).removeHandler(caplog.handler)
        for name in ("DeepSpeed", "accelerate.accelerator", "transformers.tokenization_utils_base"):
            for one in logging.getLogger(name).filters[:]:
                if type(one).__name__ == "_LeaveOut":
                    logging.getLogger(name).removeFilter(one)


def test_bars_come_back():
    assert not datasets.are_progress_bars_disabled()
    with without_bars_of_datasets():
        assert datasets.are_progress_bars_disabled()
        with without_bars_of_datasets():
            pass
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled()
