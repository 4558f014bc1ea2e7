"""The header of a run: what it says of flags that belong to another method."""

import pytest
from runs import flags_for

from lisa_dist.run.arguments import parse_arguments, run_parser
from lisa_dist.run.header import _without_effect


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": "lora", "lisa_preset": "adapters", "lisa_activated_layers": 2},  # 2 is its default
            "--lisa_preset, --lisa_activated_layers, --lisa_interval_steps, --lisa_debug, which are for --method lisa",
        ),
        (
            {"method": "full", "lisa_preset": "paper"},
            "--lisa_preset, --lisa_interval_steps, --lisa_debug, which are for --method lisa",
        ),
        ({"lora_r": 16, "use_rslora": True}, "--lora_r, --use_rslora, which are for --method lora"),
    ],
)
def test_flags_of_another_method_are_listed(folder, tmp_path, changes, said):
    words = flags_for(folder, tmp_path / "out", **changes)
    config = parse_arguments(words)
    assert _without_effect(config, run_parser(config.run.task).given(words)) == [said]
