"""The header of a run: what it says of flags that belong to another method."""

import pytest
from runs import flags_for

from lisa_dist.run.arguments import parse_arguments, run_parser
from lisa_dist.run.header import _describe_rate, _without_effect


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": "lora", "lisa_preset": "adapters", "lisa_activated_layers": 2},  # 2 is its default
            "--lisa_activated_layers, --lisa_interval_steps, --lisa_debug, --lisa_preset, which are for --method lisa",
        ),
        (
            {"method": "full", "lisa_preset": "paper"},
            "--lisa_interval_steps, --lisa_debug, --lisa_preset, which are for --method lisa",
        ),
        ({"lora_r": 16, "use_rslora": True}, "--lora_r, --use_rslora, which are for --method lora"),
    ],
)
def test_flags_of_another_method_are_listed(folder, tmp_path, changes, said):
    words = flags_for(folder, tmp_path / "out", **changes)
    config = parse_arguments(words)
    assert _without_effect(config, run_parser(config.run.task).given(words)) == [said]


@pytest.mark.parametrize(
    ("flags", "rate", "said"),
    [
        ("--method lora", 2e-4, "2e-04 (default of --method lora)"),
        ("--method full", 2e-5, "2e-05 (default of --method full)"),
        ("--method lisa", 2e-4, "2e-04 (default of --method lisa); embed 2e-05, head 2e-05"),
        ("--method lisa --lisa_preset paper", 2e-5, "2e-05 (default of --method lisa)"),
        ("--method lora --task dpo", 1e-5, "1e-05 (default of --method lora)"),
        ("--method lora --learning_rate 2e-5", 2e-5, "2e-05"),
        (
            "--learning_rate 2e-5 --lisa_adapters 32 --lisa_activated_layers 2",
            2e-5,
            "2e-05; embed 4e-05, head 4e-05, adapters 2.3e-04",
        ),
    ],
)
def test_the_learning_rate_is_that_of_the_method_unless_it_is_given(folder, tmp_path, flags, rate, said):
    words = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "rows.jsonl")]
    words += ["--output_dir", str(tmp_path / "out"), *flags.split()]
    config = parse_arguments(words)
    assert config.training.learning_rate == rate
    assert _describe_rate(config, run_parser(config.run.task).given(words)) == said


def test_a_recipe_gives_the_learning_rate_or_the_method(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: m\ndataset_name: rows.jsonl\noutput_dir: {tmp_path}\nmethod: lora\n")
    words = ["--config", str(recipe)]
    assert parse_arguments(words).training.learning_rate == 2e-4
    assert parse_arguments([*words, "--method", "full"]).training.learning_rate == 2e-5
    recipe.write_text(recipe.read_text() + "learning_rate: 3.0e-5\n")
    assert parse_arguments(words).training.learning_rate == 3e-5
