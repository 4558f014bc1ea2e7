"""What a host has of a model's weights, while it is loaded and for frozen layers, and what its bus carries of them."""

import torch
from transformers import PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import Form
from lisa_dist.core.frozen_forms import quantized_bytes
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.memory.trace import FakeRun
from lisa_dist.tasks import SFT


def stored_bytes(run: FakeRun, bits: Form) -> list[int]:
    """By decoder layer, bytes of the matrices that are or may be frozen, in these bits in a store."""
    return [quantized_bytes([one.parameter.shape for one in matrices], bits) for matrices in run.matrices]


# Of an RTX 4090: bytes a second over PCIe 4.0 x16, and half of the FLOP a second that its bf16 products reach at most.
BUS, PRODUCTS = 25e9, 82e12


def bus_and_products(run: FakeRun, config: LisaConfig) -> tuple[float, float]:
    """Seconds of a micro-batch in which frozen layers are copied twice, and in which products are computed.

    Those of a pass, of its backward pass by the inputs and of one that is checkpointed; of experts those of a token.
    """
    copied = max(0, len(run.matrices) - int(config.lisa_activated_layers)) / len(run.matrices)
    text = run.model.config.get_text_config()
    names = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token")
    chosen = next((number for name in names if (number := getattr(text, name, None))), 1)
    used = sum(
        one.parameter.numel() if one.is_linear else one.parameter[0].numel() * min(chosen, len(one.parameter))
        for of_layer in run.matrices
        for one in of_layer
    )
    checkpointed = run.workload.checkpointed_layers / len(run.matrices)
    flops = 2 * run.workload.tokens * used * (2 + checkpointed)
    return 2 * copied * sum(stored_bytes(run, config.frozen_form)) / BUS, flops / PRODUCTS


def copies_to_load(
    run: FakeRun, config: PretrainedConfig, lisa: LisaConfig, arguments: PlanArguments, stage: int
) -> int:
    """Bytes of the copies of the model that a host's ranks make: none of files that are mapped as they are.

    Those are of the same dtype, and not of a mixture, whose experts come one by one and are stacked.
    """
    is_packed = getattr(config, "quantization_config", None) is not None
    is_stacked = not all(matrix.is_linear for layer in run.matrices for matrix in layer)
    if (config.dtype or torch.bfloat16) == run.workload.dtype and not (is_packed or is_stacked):
        return 0
    one_loads = stage == 3 or (lisa.frozen_flags and arguments.task == SFT)
    models = (1 if one_loads else max(arguments.ranks_of_hosts)) * (1 + arguments.has_reference)
    return models * sum(parameter.nbytes for parameter in run.model.parameters())
