"""Arguments of a trainer that LISA cannot train with."""

from types import SimpleNamespace

import pytest
from models import save_tiny_llama
from runs import flags_for
from transformers import TrainingArguments

from lisa_dist import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.check_run import check_config
from lisa_dist.train.checks import check_trainer


@pytest.mark.parametrize(
    ("cpu", "said"), [("true", "ACCELERATE_USE_CPU, which .* turns DeepSpeed off"), ("false", "give a config")]
)
def test_a_run_without_deepspeed_says_why(tmp_path, monkeypatch, cpu, said):
    monkeypatch.setenv("ACCELERATE_USE_CPU", cpu)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match=said):
        check_trainer(args, None, LisaConfig.plain(), "adamw_torch", None, None)


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
