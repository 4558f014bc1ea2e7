"""How large a checkpoint of a run will be, from the run's flags and the config of its model alone."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import AUTO_LAYERS, parse_share
from lisa_dist.core.adapters import add_adapters
from lisa_dist.core.blocks import find_blocks, model_without_weights
from lisa_dist.errors import UserError
from lisa_dist.presets import ADAPTERS, NONE, with_preset
from lisa_dist.text import no_such_model


def checkpoint_bytes(flags: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the weights, and of masters and moments of the active blocks.

    An estimate: embeddings may be frozen and states may have 8 bits. Raises UserError without a model to read.
    """
    name = flags.get("model_name_or_path")
    if flags.get("method") == "lora":
        raise UserError("--save_within with --method lora: a checkpoint of adapters is small; leave it out.")
    if name is None:
        raise UserError("--save_within needs the run's --model_name_or_path, or a --config that has it.")
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise UserError(no_such_model(f"--model_name_or_path {name}", error)) from error
    model = model_without_weights(config)
    blocks = find_blocks(model)
    is_lisa = flags.get("method", "lisa") == "lisa"
    settings = with_preset(flags) if is_lisa else {**flags, "lisa_preset": NONE}
    if (rank := settings.get("lisa_adapters")) is not None:
        add_adapters(model, blocks, int(rank))
    layers = [block.numel for block in blocks.layers]
    given = settings.get("lisa_activated_layers", LisaConfig.plain().lisa_activated_layers)
    gamma = len(layers) if given == AUTO_LAYERS else int(given)  # at most
    total = active = sum(block.numel for block in blocks)
    if is_lisa:
        of_layers = min(gamma, len(layers)) * max(layers)
        if budget := str(flags.get("lisa_budget") or ""):
            of_layers = math.ceil(parse_share("--lisa_budget", budget) * sum(layers))
        active = total - sum(layers) + of_layers
    # In bf16 unless told otherwise where there are GPUs, as the run itself.
    in_bf16 = str(flags.get("bf16", torch.cuda.is_available())).lower() == "true"
    # A master and two moments, or moments in 8 bits and no master; of adapters two moments in 32 bits.
    small = is_lisa and settings["lisa_preset"] == ADAPTERS and "lisa_state_bits" not in flags
    adapters = blocks.adapters.numel
    states = 2 * (active - adapters) + 8 * adapters if small else 12 * active
    return total * (2 if in_bf16 else 4), states
