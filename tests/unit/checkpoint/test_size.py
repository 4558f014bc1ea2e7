"""The size of a checkpoint by calculation."""

import pytest
import torch
from models import save_tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_dist.checkpoint.size import checkpoint_bytes
from lisa_dist.errors import UserError


def test_weights_in_their_precision_and_twelve_bytes_for_each_active_element(tmp_path):
    save_tiny_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    total = model.num_parameters()
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    flags = {"model_name_or_path": str(tmp_path), "bf16": "false", "lisa_preset": "none"}
    assert checkpoint_bytes(flags) == (4 * total, 12 * (total - 4 * layer))  # two of six layers
    assert checkpoint_bytes(flags | {"bf16": True}) == (2 * total, 12 * (total - 4 * layer))
    assert checkpoint_bytes(flags | {"lisa_activated_layers": "9"}) == (4 * total, 12 * total)
    assert checkpoint_bytes(flags | {"lisa_activated_layers": "auto"}) == (4 * total, 12 * total)  # at most
    linear = [one for one in model.model.layers.modules() if isinstance(one, torch.nn.Linear)]
    more = total + 4 * sum(one.in_features + one.out_features for one in linear)
    assert checkpoint_bytes(flags | {"lisa_adapters": "4"}) == (4 * more, 12 * (more - 4 * layer))
    assert checkpoint_bytes(flags | {"method": "full"}) == (4 * total, 12 * total)
    del flags["lisa_preset"]
    assert checkpoint_bytes(flags | {"lisa_state": "keep"}) == (4 * total, 12 * (total - 4 * layer))
    # By default adapters of rank 32 train, whose moments have 32 bits, and no layer.
    adapters = 32 * sum(one.in_features + one.out_features for one in linear)
    assert checkpoint_bytes(flags) == (4 * (total + adapters), 2 * (total - 6 * layer) + 8 * adapters)


def gated(name):
    """As transformers raises it for a model whose licence was not accepted."""
    raise OSError(f"You are trying to access a gated repo.\nMake sure to have access to it at https://hub/{name}.")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "--save_within needs the run's --model_name_or_path"),
        ({"method": "lora", "model_name_or_path": "model"}, "--save_within with --method lora"),
        ({"model_name_or_path": "no/such-model"}, "--model_name_or_path no/such-model: no such folder"),
        (
            {"model_name_or_path": "org/gated"},
            "--model_name_or_path org/gated: is gated: accept its licence .* `hf auth login`",
        ),
    ],
)
def test_what_has_no_size_is_refused(monkeypatch, flags, said):
    if flags.get("model_name_or_path") == "org/gated":
        monkeypatch.setattr(AutoConfig, "from_pretrained", gated)
    with pytest.raises(UserError, match=f"^{said}"):
        checkpoint_bytes(flags)
