"""Training arguments keep their tokens for use, and write none of them."""

import copy
from types import SimpleNamespace

import torch
from transformers import TrainingArguments

from lisa_dist.train.monitoring import hide_secrets_of

SECRET = "the secret"


def test_arguments_are_written_without_secrets(tmp_path):
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, hub_token=SECRET, lr_scheduler_kwargs={"token": SECRET, "power": 2}
    )
    ds_config = SimpleNamespace(config={"comet": {"api_key": SECRET}})
    args.deepspeed_plugin = SimpleNamespace(hf_ds_config=ds_config, deepspeed_config=ds_config.config)
    args.hf_deepspeed_config = ds_config
    for _ in range(2):  # a second trainer may have the same arguments
        hide_secrets_of(args)
        torch.save(args, tmp_path / "training_args.bin")
        assert SECRET.encode() not in (tmp_path / "training_args.bin").read_bytes()
        loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
        assert type(loaded) is TrainingArguments
        assert loaded.lr_scheduler_kwargs == {"token": "***", "power": 2}
        assert loaded.learning_rate == args.learning_rate
        for text in (args.to_json_string(), str(args.to_sanitized_dict())):
            assert SECRET not in text
    for used in (args, copy.copy(args), copy.deepcopy(args)):
        assert isinstance(used, TrainingArguments)
        assert used.hub_token == SECRET
        assert used.lr_scheduler_kwargs["token"] == SECRET
        assert used.deepspeed_plugin.hf_ds_config.config == {"comet": {"api_key": SECRET}}
